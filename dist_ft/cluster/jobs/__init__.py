"""Ray jobs: submit, status, logs, stop."""
