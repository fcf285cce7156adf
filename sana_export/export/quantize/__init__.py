"""Quantizes the weights of a graph and of the embedding table during an export (docs/quantization.md)."""
