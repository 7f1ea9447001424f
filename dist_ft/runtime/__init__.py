"""Where a run happens: this process or Ray workers."""
