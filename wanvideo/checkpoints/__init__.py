"""Checkpoint files: reading them, what they hold, the diffusion transformer and LoRAs from them."""
