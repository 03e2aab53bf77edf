"""Looks inside saved models, and reads stores, with the parts that watch a training run."""
