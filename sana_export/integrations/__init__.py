"""Doors into the tools that people already use. Each module needs the package that it is for, and nothing else imports them."""
