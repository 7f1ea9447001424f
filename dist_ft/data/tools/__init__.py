"""Tools for datasets: inspect, preview, split, import, rewrite."""
