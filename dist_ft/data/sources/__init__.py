"""Read rows from storage: discovery, JSON Lines, tables, the hub, ranged reads, row formats."""
