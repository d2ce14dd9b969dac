"""Many videos: a queue, workers whose models stay loaded, and what clients talk to."""
