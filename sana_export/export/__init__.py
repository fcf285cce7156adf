"""Exports deployment graphs to ONNX and checks that they equal their reference."""
