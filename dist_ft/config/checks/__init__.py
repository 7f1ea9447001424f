"""Contradictions between sections, and checks of a whole config."""
