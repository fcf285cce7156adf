"""Deployment graphs: the checkpoint's models restated for inference, one torch module a graph."""
