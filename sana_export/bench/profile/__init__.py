"""Time per layer, as each backend's own profiler reports it."""
