"""Compares the latency of backends with eager diffusers: workloads, interleaved measurement, reports."""
