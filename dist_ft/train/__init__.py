"""The training loop and what it watches."""
