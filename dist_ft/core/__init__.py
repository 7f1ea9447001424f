"""Base of all other packages: errors, logs, ranks and collectives, seeds, fault injection."""
