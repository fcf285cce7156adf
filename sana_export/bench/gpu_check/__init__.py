"""Every check and timing that needs a GPU, in one run of a few minutes with one report (docs/gpu.md).

Each part (parts.py) runs in a child process with its own time limit, so that a crash or hang affects no other part.
"""
