"""Errors of generation that come from a model's files: its vocabulary and its generation config."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dist_ft.core.errors import ModelError
from dist_ft.core.native_errors import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def vocabulary_size(model: PreTrainedModel) -> float:
    """Return the number of tokens that a model takes; infinity if its config does not say."""
    config = model.config.get_text_config()
    return getattr(config, "vocab_size", None) or float("inf")


def check_vocabulary(model: PreTrainedModel, requests: Sequence[Any]) -> None:
    """Raise ModelError for a token that the model has no embedding for.

    On a GPU it would end the process.
    """
    largest = max((int(row.ids.max()) for row in requests if len(row.ids)), default=0)
    size = vocabulary_size(model)
    if largest >= size:
        raise ModelError(
            f"model.path={model.config.name_or_path}: its tokenizer gives the token {largest}, but "
            f"the model has {size} entries (vocab_size). The tokenizer of the model is needed. Set "
            "model.tokenizer, or download the model again."
        )


def first_token(model: PreTrainedModel, candidates: Sequence[int | None]) -> int:
    """Return the first of `candidates` that the model has an embedding for."""
    size = vocabulary_size(model)
    return next(token for token in candidates if token is not None and 0 <= token < size)


@contextlib.contextmanager
def generation_errors() -> Iterator[None]:
    """Convert refusals of transformers, of settings in generation_config.json, into ModelError."""
    try:
        yield
    except (ValueError, TypeError, IndexError) as error:
        raise ModelError(
            f"generation: transformers refuses it ({first_line(error)}). Settings that fit the "
            "model are needed. Check its generation_config.json."
        ) from error
