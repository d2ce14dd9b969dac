"""What is made when: from files to a video, window after window."""
