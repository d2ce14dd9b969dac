"""The DiT: layout contracts, attention backends, blocks and the model."""
