"""A run on Kubernetes: manifests that follow from its config, and what is wrong with manifests. Needs no cluster."""
