"""Runs on Ray Train workers."""
