"""From shards in storage to batches on lanes. README.md draws the pipeline."""
