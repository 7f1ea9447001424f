"""Pure scores: the same numbers at every world size."""
