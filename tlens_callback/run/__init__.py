"""One training run, watched: when to look, what goes wrong, what it costs."""
