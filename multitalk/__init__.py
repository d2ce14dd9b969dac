"""InfiniteTalk: audio features, audio cross-attention, windows and the generation loop."""
