"""ComfyUI for tests: `stand_in.py` imitates what the nodes touch, `real.py` runs a checkout. Both have the interface of run.py."""
