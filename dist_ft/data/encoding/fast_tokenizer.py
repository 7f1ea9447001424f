"""What is asked of a tokenizer: that it is a fast one, whose tokens tell which characters they stand for."""

from __future__ import annotations

from typing import Any

from dist_ft.core.errors import ModelError


def exact_backend(tokenizer: Any) -> Any:
    """Return a copy of a fast tokenizer's backend that neither cuts nor pads and tells every token's whole range.

    Byte-level tokenizers usually trim blanks from the ranges they tell; indentation would be lost from the mask.

    Raises:
        ModelError: the tokenizer is not a fast one.
    """
    from tokenizers import Tokenizer

    require_fast(tokenizer)
    backend = Tokenizer.from_str(
        tokenizer.backend_tokenizer.to_str().replace('"trim_offsets":true', '"trim_offsets":false')
    )
    backend.no_truncation()
    backend.no_padding()
    return backend


def require_fast(tokenizer: Any) -> None:
    """Refuse a tokenizer that can not say which characters a token stands for.

    Raises:
        ModelError: names it.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"model.tokenizer={tokenizer_name(tokenizer)}: is not a fast tokenizer; one with character offsets "
            "(tokenizer.json) is needed; convert it, or name another in model.tokenizer"
        )


def tokenizer_name(tokenizer: Any) -> str:
    """Return what errors call a tokenizer."""
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
