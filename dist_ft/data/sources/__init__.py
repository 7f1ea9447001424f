"""Rows where they lie: discovery, JSON Lines, tables, the hub, ranged reads, row formats."""
