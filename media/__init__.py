"""Recordings, videos, images, masks, colors: what is read and written. No model is in here."""
