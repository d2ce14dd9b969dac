"""Wan2.1: the diffusion transformer with its kernels and linear layers, its encoders, and their checkpoint files."""
