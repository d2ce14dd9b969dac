"""How the small talking model of the demo is made: its data, its training, its files. See docs/demo-model.md."""
