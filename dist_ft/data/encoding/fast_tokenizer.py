"""The requirement on tokenizers: fast ones, whose tokens report their character ranges."""

from __future__ import annotations

from typing import Any

from dist_ft.core.errors import ModelError


def exact_backend(tokenizer: Any) -> Any:
    """Return a copy of a fast tokenizer's backend that neither truncates nor pads.

    It reports the whole character range of each token. Byte-level tokenizers usually trim blanks
    from the ranges, so the target mask would lose indentation.

    Raises:
        ModelError: the tokenizer is not a fast one.
    """
    from tokenizers import Tokenizer

    require_fast(tokenizer)

    # Edited as JSON, because the setting may be in the pre-tokenizer, the post-processor, or one
    # within a sequence of either. A copy: the tokenizer itself keeps its settings.
    settings = tokenizer.backend_tokenizer.to_str()
    settings = settings.replace('"trim_offsets":true', '"trim_offsets":false')
    backend = Tokenizer.from_str(settings)

    backend.no_truncation()
    backend.no_padding()
    return backend


def require_fast(tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot report the character range of a token.

    Raises:
        ModelError: names the tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"model.tokenizer={tokenizer_name(tokenizer)}: is not a fast tokenizer. One with "
            "character offsets (tokenizer.json) is needed. Convert it, or name another in "
            "model.tokenizer."
        )


def tokenizer_name(tokenizer: Any) -> str:
    """Return the name of a tokenizer for error messages."""
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
