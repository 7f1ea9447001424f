"""A run on Ray Train workers."""
