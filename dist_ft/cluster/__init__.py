"""Runs as Ray jobs and as Kubernetes manifests."""
