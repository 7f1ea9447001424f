"""Arithmetic of memory, FLOPs, traffic and goodput."""
