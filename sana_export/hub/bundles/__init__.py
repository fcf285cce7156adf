"""Bundles in repositories of the hub."""
