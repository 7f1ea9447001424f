"""Which weights are trained, and which are added."""
