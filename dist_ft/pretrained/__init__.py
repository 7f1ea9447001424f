"""What others wrote: model folders, tokenizers, templates. Read through one door, within limits."""
