"""Which model learns, and what it minimises."""
