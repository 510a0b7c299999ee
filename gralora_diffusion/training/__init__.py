"""The trainer: options, data, caches, objectives, checkpoints and the loop."""
