"""The unit of reading and caching: index, block store, token cache, tokenizer pool."""
