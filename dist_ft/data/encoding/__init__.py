"""Encode a row as tokens and labels: chat, task, prompt, pre-tokenized."""
