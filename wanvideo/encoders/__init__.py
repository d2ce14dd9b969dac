"""Text encoder, CLIP vision tower and VAE: transformers' and diffusers' modules, filled from public checkpoints."""
