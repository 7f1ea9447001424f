"""From a config to a wired run: data, model, labels, network check, summary."""
