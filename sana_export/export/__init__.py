"""Export: deployment graphs to ONNX, and the proof that they equal their reference."""
