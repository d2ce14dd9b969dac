"""Wan2.1: the diffusion transformer, its text, picture and video codecs, schedulers and checkpoint files."""
