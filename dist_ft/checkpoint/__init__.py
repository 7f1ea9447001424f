"""What survives: fragments, manifests, commits, exports."""
