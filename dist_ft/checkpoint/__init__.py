"""Fragments, manifests, commits, restores, exports."""
