"""Contradictions between fields that no single field's bounds can express."""
