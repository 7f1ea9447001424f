"""Notifications about a run (`log.notify`): what happened, and its delivery."""
