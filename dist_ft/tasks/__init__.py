"""Tasks: one class for each, with its columns, labels, head, loss, outputs, metrics and errors."""
