"""Compares bundles with diffusers: parity of graphs and images, ranges of tensors, and the quality of images."""
