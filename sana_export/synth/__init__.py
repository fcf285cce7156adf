"""Synthetic Sana checkpoints: the real classes and file formats, with seeded random weights."""
