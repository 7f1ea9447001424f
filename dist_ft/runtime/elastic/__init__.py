"""Supervised training processes that restart and resize."""
