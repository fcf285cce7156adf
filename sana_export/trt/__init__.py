"""TensorRT and TensorRT-RTX as one: load the module, plan and build engines ahead of time."""
