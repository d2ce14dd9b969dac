"""InfiniteTalk's and MultiTalk's audio layers, and the speech features that they read."""
