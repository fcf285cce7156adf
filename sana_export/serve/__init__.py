"""Serving a bundle: over HTTP, on a page, on many machines."""
