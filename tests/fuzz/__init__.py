"""Fuzzing of everything that dist_ft reads: commands, configs, run folders, models, rows."""
