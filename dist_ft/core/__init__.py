"""What everything else builds on: errors, logs, the world of ranks, fault injection."""
