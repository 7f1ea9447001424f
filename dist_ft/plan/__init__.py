"""Arithmetic about runs that have not happened yet."""
