"""A row to tokens and labels: chat, task, prompt, pre-tokenized."""
