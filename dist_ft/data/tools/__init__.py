"""Tools for data sets: inspect, preview, split, import, rewrite."""
