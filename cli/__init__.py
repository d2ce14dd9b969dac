"""What a person types: the command `infinitetalk`, its terminal output, the demo, the doctor and the tiny models."""
