"""Measures what a checkpoint's layers read while it draws, for the export of a quantized bundle (docs/quantization.md)."""
