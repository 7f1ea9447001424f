"""Self-test and fault drill."""
