"""Image quality: what a bundle's images show, compared with those of diffusers and of another bundle."""
