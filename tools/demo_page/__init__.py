"""What tools/demo.py serves: `canvas`, `images` and `session` do the work, `page` is the layout."""
