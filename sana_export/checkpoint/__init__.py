"""Reads checkpoints from the hub, folders and single files, with LoRAs folded in."""
