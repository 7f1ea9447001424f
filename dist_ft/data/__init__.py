"""From shards in storage to batches on lanes."""
