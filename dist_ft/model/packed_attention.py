"""Attention over packed rows without products between samples, with torch's own kernels.

Used with model.attention=sdpa. By itself transformers gives packed rows a mask (B, 1, T, T), and
the kernel computes all of it to discard most. Here each sample is one causal call. Where a model
needs more than plain causal attention (a window shorter than a sample, masks of its own), and
outside a training forward, everything runs as in transformers. Flash attention has its own way.

Only one model of a process at a time may run such a forward and its backward: two models in threads
would use each other's sample lengths.

Dimensions: B rows of a batch, T tokens of a row, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION_NAME = "sdpa_by_sample"


class PackedSamples:
    """The sample lengths of the current training forward, or of the last one.

    The last one matters because its backward may recompute attention (activation checkpointing).
    """

    def __init__(self) -> None:
        self._lengths: Sequence[Sequence[int]] | None = None
        self._is_active = False

    @contextmanager
    def use(self, lengths: Sequence[Sequence[int]]) -> Iterator[None]:
        """Within, rows hold samples of these lengths in tokens (by row, padding counted as one)."""
        self._lengths = lengths
        self._is_active = True
        try:
            yield
        finally:
            # The lengths stay: the backward of this forward may recompute attention.
            self._is_active = False

    def mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        local_size: int | None = None,
        attention_mask: torch.Tensor | None = None,
        use_vmap: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """Return the mask for transformers, or None where `attend` needs none.

        Implements transformers' mask interface.
        """
        from transformers.masking_utils import sdpa_mask

        # A call of the model outside `use`, for example by `generate`: its rows are not packed, and
        # the lengths of the last forward must not apply to it.
        if not self._is_active:
            self._lengths = None
        lengths = self._lengths

        # A window no shorter than any sample hides nothing of it.
        is_plain_causal = (
            lengths is not None
            and attention_mask is None
            and not use_vmap
            and q_length == kv_length
            and (local_size is None or max(map(max, lengths)) <= local_size)
        )
        if is_plain_causal:
            return None

        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            local_size=local_size,
            attention_mask=attention_mask,
            use_vmap=use_vmap,
            **kwargs,
        )

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return attention (B, T, heads, D) of query, key and value (B, heads, T, D).

        Implements transformers' attention interface, which also returns attention weights: None
        here.
        """
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        is_causal = kwargs.get("is_causal") is not False and getattr(module, "is_causal", True)
        lengths = None
        if attention_mask is None and is_causal:
            lengths = self._lengths

        # Lengths that do not fit belong to other inputs, so attention runs as in transformers.
        num_rows, num_tokens = query.shape[0], query.shape[2]
        if lengths is None or (len(lengths), sum(lengths[0])) != (num_rows, num_tokens):
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

        rows = []
        for row, row_lengths in enumerate(lengths):
            # (1, heads, length, D) for each sample of the row
            sizes = list(row_lengths)
            queries = torch.split(query[row : row + 1], sizes, dim=2)
            keys = torch.split(key[row : row + 1], sizes, dim=2)
            values = torch.split(value[row : row + 1], sizes, dim=2)

            outputs = []
            for q, k, v in zip(queries, keys, values, strict=True):
                output, _ = sdpa_attention_forward(module, q, k, v, None, **kwargs)
                outputs.append(output)
            rows.append(torch.cat(outputs, dim=1))  # (1, T, heads, D)
        return torch.cat(rows), None


_PACKED_SAMPLES = PackedSamples()  # transformers looks attention up by name, for all models


def enable_packed_attention(model: PreTrainedModel) -> PackedSamples | None:
    """Make `model` attend sample by sample; return what takes the lengths of each forward.

    Returns None if the model's attention is not sdpa.
    """
    if model.config._attn_implementation != "sdpa":
        return None
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, _PACKED_SAMPLES.attend)
    AttentionMaskInterface.register(ATTENTION_NAME, _PACKED_SAMPLES.mask)
    model.set_attn_implementation(ATTENTION_NAME)

    # transformers may keep the old one, for models that do not look attention up by name.
    is_enabled = model.config._attn_implementation == ATTENTION_NAME  # type: ignore[comparison-overlap]
    return _PACKED_SAMPLES if is_enabled else None


def sample_lengths(position_ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Return for each row of (B, T) the lengths of its samples.

    A sample starts where positions do not continue those before.
    """
    found = []
    for row in position_ids:
        starts = np.flatnonzero(np.diff(row) != 1) + 1
        boundaries = np.concatenate([[0], starts, [len(row)]])
        found.append(tuple(np.diff(boundaries).tolist()))
    return tuple(found)
