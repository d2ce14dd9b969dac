"""The DiT: attention and its backends, elementwise groups, blocks and the model."""
