"""Looking at runs: list, show, watch, report, verify, model card."""
