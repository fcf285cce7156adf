"""Quantization: the tables of schemes and of layers, and what a user may ask for. Needs neither PyTorch nor ONNX."""
