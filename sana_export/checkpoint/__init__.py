"""Everything that reads checkpoints: the hub, folders, single files, weights and LoRAs that are folded into them."""
