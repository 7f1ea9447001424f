"""Compares what config.json describes with what the weight files hold, before memory is taken.

transformers creates each weight that the files lack, or hold in another shape, at the size that the
config gives, and only then reports it.

Dimensions of a weight are those of its file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dist_ft.core.errors import ModelError

MAX_RATIO = 16
"""Layers that share weights are described once each: up to 12 of ALBERT, for one in the files."""
ALWAYS_ALLOWED = 50_000_000
"""Elements of any model."""
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "embedding_size")
_ROWS = (
    "vocab_size",
    "n_positions",
    "type_vocab_size",
    "intermediate_size",
    "moe_intermediate_size",
    "n_inner",
    "d_ff",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "max_source_positions",
    "max_target_positions",
    "relative_attention_num_buckets",
)
_POSITIONS = "max_position_embeddings"
_NO_POSITION_WEIGHTS = ("rope", "rotary", "alibi")
"""Parts of the keys of models whose number of positions is no number of weights."""
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
MATRICES_PER_LAYER = 4


def check_size(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], shown: str) -> None:
    """Raise ModelError if a config describes a model far larger than the tensors of its files.

    Args:
        config: content of config.json.
        shapes: shape of each tensor.
        shown: names the model in errors.
    """
    if not shapes:
        return  # transformers reports that there are no weights

    num_stored = sum(math.prod(shape) for shape in shapes.values())
    num_described = max(_num_elements(part) for part in _parts(config))
    if num_described > MAX_RATIO * num_stored + ALWAYS_ALLOWED:
        raise ModelError(
            f"{shown}: config.json describes a model of about {num_described:,} weights, and the "
            f"files hold {num_stored:,}. Both must belong to one model. Download it again."
        )


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the config and those in it, of a text model for example."""
    parts = [config]
    for value in config.values():
        if isinstance(value, dict):
            parts.append(value)
    return parts


def _num_elements(config: Mapping[str, Any]) -> int:
    """Return about how many weights a config describes, from below."""
    width = _largest(config, _WIDTHS, 1)
    rows = list(_ROWS)
    has_weights = not any(part in key for key in config for part in _NO_POSITION_WEIGHTS)
    if has_weights:
        rows.append(_POSITIONS)
    num_elements = sum(_largest(config, (name,), 0) * width for name in rows)
    num_layers = _largest(config, _LAYERS, 0)
    return num_elements + num_layers * MATRICES_PER_LAYER * width * width


def _largest(config: Mapping[str, Any], names: Sequence[str], default: int) -> int:
    values = [config.get(name) for name in names]
    return max((value for value in values if isinstance(value, int)), default=default)
