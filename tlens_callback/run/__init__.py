"""Observes one training run: when to observe, what to do on failure, what it costs."""
