"""TensorRT and TensorRT-RTX behind one interface: load the module, plan, build and select engines."""
