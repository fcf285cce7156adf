"""Deployment graphs: the checkpoint's models rewritten for inference, one torch module per graph."""
