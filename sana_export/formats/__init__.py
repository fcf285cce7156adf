"""Readers of file formats: safetensors, and the weights that an ONNX file keeps outside itself."""
