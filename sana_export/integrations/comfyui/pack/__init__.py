"""The node pack. Copy or link this folder into ComfyUI's `custom_nodes`; ComfyUI's Python needs sana_export."""

from sana_export.integrations.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
