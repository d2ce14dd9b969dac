"""The ComfyUI nodes, one file per concern; each is an adapter: widgets -> typed configuration -> one call."""
