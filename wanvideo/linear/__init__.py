"""Linear layers with weights stored in low precision."""
