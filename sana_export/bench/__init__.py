"""How long each backend takes beside eager diffusers: workloads, interleaved measuring, reports."""
