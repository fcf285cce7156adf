"""File formats: the table of dtypes, safetensors files, and the external weights of ONNX files."""
