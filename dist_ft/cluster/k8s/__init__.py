"""Kubernetes manifests rendered from a config, and checks of manifests. Needs no cluster."""
