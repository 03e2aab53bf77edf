"""Looking at saved models and at stores, with the parts that watch a training run."""
