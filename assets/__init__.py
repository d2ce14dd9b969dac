"""Image, recording and other files that the demo brings."""
