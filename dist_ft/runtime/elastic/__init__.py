"""Supervised worker processes that restart and resize."""
