"""Every check and timing that needs a GPU, in one run of a few minutes with one report. docs/gpu.md says what it answers.

Each part (parts.py) runs in a child process with its own share of the time, so that one which crashes or hangs costs only itself.
"""
