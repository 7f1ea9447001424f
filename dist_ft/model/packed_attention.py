"""Attention over packed rows that computes nothing between samples, with torch's own kernels (model.attention=sdpa).

By itself transformers gives such rows a mask (B, 1, T, T), and the kernel computes all of it to throw most away. Here
each sample is one causal call. Where a model wants more than plain causal attention (a window shorter than a sample,
masks of its own), or outside a training forward, all is as transformers does it. Flash attention has its own way.

Of all models of a process one at a time may run such a forward and its backward: two in threads would see each other's
samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "sdpa_by_sample"


class PackedSamples:
    """Which samples lie in the rows of the training forward under way, or of the last: its backward may ask again."""

    def __init__(self) -> None:
        self._lengths: Sequence[Sequence[int]] | None = None
        self._under_way = False

    @contextmanager
    def told(self, lengths: Sequence[Sequence[int]]) -> Iterator[None]:
        """Within, rows hold samples of these lengths in tokens (by row, padding counted as one)."""
        self._lengths, self._under_way = lengths, True
        try:
            yield
        finally:
            self._under_way = False

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
        """Make the mask transformers asks for, or none where `attend` does without (transformers' mask interface)."""
        from transformers.masking_utils import sdpa_mask

        lengths = self._lengths = self._lengths if self._under_way else None
        plain = (
            lengths is not None
            and attention_mask is None
            and not use_vmap
            and q_length == kv_length
            and (local_size is None or max(map(max, lengths)) <= local_size)
        )
        return (
            None
            if plain
            else sdpa_mask(
                batch_size=batch_size,
                q_length=q_length,
                kv_length=kv_length,
                local_size=local_size,
                attention_mask=attention_mask,
                use_vmap=use_vmap,
                **kwargs,
            )
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
        """Return attention (B, T, heads, D) of query (B, heads, T, D) (transformers' attention interface)."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        causal = kwargs.get("is_causal") is not False and getattr(module, "is_causal", True)
        lengths = self._lengths if attention_mask is None and causal else None
        if lengths is None or (len(lengths), sum(lengths[0])) != (query.shape[0], query.shape[2]):
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        rows = []
        for row, sizes in enumerate(lengths):
            parts = (
                torch.split(tensor[row : row + 1], list(sizes), dim=2)
                for tensor in (query, key, value)
            )
            rows.append(
                torch.cat(
                    [
                        sdpa_attention_forward(module, q, k, v, None, **kwargs)[0]
                        for q, k, v in zip(*parts, strict=True)
                    ],
                    dim=1,
                )
            )
        return torch.cat(rows), None


_SAMPLES = PackedSamples()  # transformers finds attention by name, for all models of a process


def enable_packed_attention(model: PreTrainedModel) -> PackedSamples | None:
    """Let `model` attend sample by sample; return what must be told of each forward, None if it attends otherwise."""
    if model.config._attn_implementation != "sdpa":
        return None
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _SAMPLES.attend)
    AttentionMaskInterface.register(NAME, _SAMPLES.mask)
    model.set_attn_implementation(NAME)
    return _SAMPLES if model.config._attn_implementation == NAME else None  # type: ignore[comparison-overlap]


def sample_lengths(position_ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Return, by row of (B, T), the lengths of the samples in it: one begins where positions do not go on."""
    found = []
    for row in position_ids:
        begins = np.flatnonzero(np.diff(row) != 1) + 1
        found.append(tuple(np.diff(np.concatenate([[0], begins, [len(row)]])).tolist()))
    return tuple(found)
