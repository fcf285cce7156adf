"""Seeded synthetic Sana checkpoints: real classes and file formats, random weights. Nothing here is imported eagerly."""
