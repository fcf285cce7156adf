"""Parity with the reference and the quality of images: where export and runtime meet."""
