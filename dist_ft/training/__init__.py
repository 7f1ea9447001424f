"""The training loop: steps, evaluation, checkpointing, metrics."""
