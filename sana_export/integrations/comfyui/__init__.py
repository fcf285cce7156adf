"""Nodes for ComfyUI (docs/comfyui.md). ComfyUI loads the folder `pack`, whose nodes are in nodes.py."""
