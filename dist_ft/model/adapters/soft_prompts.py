"""Virtual tokens before each sample: prompt tuning, P-tuning and prefix tuning.

`peft` provides the modules that compute their vectors. Prompt tuning and P-tuning
(arXiv:2104.08691, arXiv:2103.10385): ids below zero stand for virtual tokens, -1 for the first; the
input embedding looks them up here. So code that handles ids (packed rows, masks, positions,
`generate`) handles them too. Prefix tuning (arXiv:2101.00190): every layer finds keys and values of
the virtual tokens in its cache. A prefix cannot be used with packing: all samples of a row would
share one.

Dimensions: B rows of a batch, T tokens of a row, P virtual tokens, H hidden size, D width of a
head.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dist_ft.config.sections.task import TaskSection
from dist_ft.config.sections.tuning import TuningSection
from dist_ft.core.errors import ModelError
from dist_ft.data.batch import IGNORE_INDEX, Batch
from dist_ft.model.model_task import model_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "virtual_tokens"
"""Name of the module in a model."""


class IdsAndMask(NamedTuple):
    """Token ids and attention mask, (B, T) each."""

    ids: torch.Tensor
    mask: torch.Tensor


class VirtualTokens(nn.Module):
    """`count` trained vectors, or a trained cache, before each sample of a model.

    Attributes:
        encoder: peft's module that computes the vectors.
        count: the number of virtual tokens, P.
        config: peft's config of `encoder`.
        is_prefix: the tokens are keys and values of every layer, not input vectors.
        numbers: (P,) 0 to P - 1.
    """

    def __init__(self, encoder: nn.Module, count: int, config: Any) -> None:
        """Wrap peft's `encoder` of `count` tokens, built from peft's `config`."""
        super().__init__()
        self.encoder = encoder
        self.count = count
        self.config = config
        self.is_prefix = config.peft_type == "PREFIX_TUNING"

        # A buffer, to move to the model's device; not saved, because it follows from `count`.
        self.numbers: torch.Tensor
        self.register_buffer("numbers", torch.arange(count), persistent=False)

    def forward(self) -> torch.Tensor:
        """Return the vectors (P, H); of a prefix (P, layers x 2 x H of keys)."""
        return self.encoder(self.numbers[None])[0]

    @property
    def ids(self) -> range:
        """The ids of the virtual tokens in order; empty for a prefix."""
        return range(0) if self.is_prefix else range(-1, -1 - self.count, -1)

    def prepend(self, ids: torch.Tensor, mask: torch.Tensor) -> IdsAndMask:
        """Return ids and mask (B, T) with the virtual tokens in front, (B, P + T).

        A prefix does not change them.
        """
        virtual_ids = torch.tensor(self.ids, dtype=ids.dtype, device=ids.device)
        virtual_ids = virtual_ids.expand(len(ids), -1)  # (B, P)
        virtual_mask = torch.ones_like(virtual_ids, dtype=mask.dtype)
        return IdsAndMask(torch.cat([virtual_ids, ids], 1), torch.cat([virtual_mask, mask], 1))

    def embed(self, ids: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """Return `vectors` (B, T, H), replaced by virtual ones where `ids` (B, T) are negative."""
        # Id -1 is row 0. Real tokens look up row 0 too, and `where` discards it.
        virtual_vectors = self()[(-1 - ids).clamp(min=0)].to(vectors.dtype)  # (B, T, H)
        return torch.where((ids < 0)[..., None], virtual_vectors, vectors)

    def prefix_cache(self, model: PreTrainedModel, batch_size: int) -> Any:
        """Return a transformers cache that holds the prefix for `batch_size` rows."""
        from transformers import DynamicCache, EncoderDecoderCache

        config = self.config
        num_heads, num_layers = config.num_attention_heads, config.num_layers
        head_width = config.token_dim // num_heads

        vectors = self().to(model.dtype)
        vectors = vectors.view(self.count, 2 * num_layers, num_heads, head_width)
        states = vectors.permute(1, 2, 0, 3)[:, None]  # (2 layers, 1, heads, P, D)
        states = states.expand(-1, batch_size, -1, -1, -1)  # (2 layers, B, heads, P, D)

        # The order in which peft assigns states to layers.
        is_encoder_decoder = model.config.is_encoder_decoder
        stride = 4 if is_encoder_decoder else 2
        key_indices = [stride * layer % len(states) for layer in range(num_layers)]
        cache = DynamicCache([(states[index], states[index + 1]) for index in key_indices])
        return EncoderDecoderCache(cache, DynamicCache()) if is_encoder_decoder else cache


def find_virtual_tokens(model: PreTrainedModel) -> VirtualTokens | None:
    """Return a model's virtual tokens, if it has any."""
    module = getattr(model, NAME, None)
    return module if isinstance(module, VirtualTokens) else None


def prepend_virtual_tokens(virtual: VirtualTokens | None, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a model's inputs (B, T), padded on the right, with virtual tokens in front."""
    if virtual is None or not virtual.ids:
        return inputs
    ids, mask = virtual.prepend(inputs["input_ids"], inputs["attention_mask"])
    result = inputs | {"input_ids": ids, "attention_mask": mask}

    # Virtual tokens belong to the first text, whose type is 0.
    if "token_type_ids" in inputs:
        types = inputs["token_type_ids"]
        virtual_types = torch.zeros_like(types[:, :1]).expand(-1, virtual.count)
        result["token_type_ids"] = torch.cat([virtual_types, types], 1)
    return result


def add_virtual_tokens(
    model: PreTrainedModel,
    section: TuningSection,
    seed: int,
    task: TaskSection,
    text_ids: Sequence[int] = (),
) -> None:
    """Add the virtual tokens of `section` to `model`.

    They are initialized by `seed`, or from the tokens `text_ids`.

    Raises:
        ModelError: peft does not support virtual tokens for this model.
    """
    from peft.tuners.p_tuning.model import PromptEncoder
    from peft.tuners.prefix_tuning.model import PrefixEncoder
    from peft.tuners.prompt_tuning.model import PromptEmbedding

    embedding = _input_embedding(model)
    try:
        config = peft_config(model, section, task)
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"tuning.method={section.method}: peft does not support this {model.config.model_type} "
            f"model ({str(error).splitlines()[0][:150]}). Use tuning.method=lora."
        ) from error

    encoder: nn.Module
    # The caller's random state stays, and the draws follow from the seed alone.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if section.method == "prefix_tuning":
            encoder = PrefixEncoder(config)
        elif section.method == "p_tuning":
            encoder = PromptEncoder(config)
        else:
            encoder = PromptEmbedding(config, embedding)
        virtual = VirtualTokens(encoder, section.prompt.tokens, config).to(model.dtype)
        if section.method == "prompt_tuning":
            weight: Any = encoder.embedding.weight  # type: ignore[union-attr]
            _initialize_prompt(weight, model, embedding, section, text_ids)

    attach_virtual_tokens(model, virtual)


def attach_virtual_tokens(model: PreTrainedModel, virtual: VirtualTokens) -> None:
    """Register `virtual` as a module of `model`, and the hooks that use it in each forward."""
    model.add_module(NAME, virtual)
    if virtual.is_prefix:
        # On the base model, which computes masks and positions from the cache. Its inputs may come
        # by position.
        names = list(inspect.signature(model.base_model.forward).parameters)

        def add_prefix(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            inputs = dict(zip(names, args, strict=False)) | kwargs
            return (), _with_prefix(model, virtual, inputs)

        model.base_model.register_forward_pre_hook(add_prefix, with_kwargs=True)
        return

    # Two hooks around the embedding: it cannot look up a negative id, and the second hook needs the
    # ids that the first one hides.
    current_ids: list[torch.Tensor] = []  # of the embedding's current call

    def hide_virtual_ids(_layer: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
        current_ids[:] = [args[0]]
        return (args[0].clamp(min=0), *args[1:])

    def insert_virtual_vectors(_layer: nn.Module, _args: Any, vectors: torch.Tensor) -> Any:
        return virtual.embed(current_ids.pop(), vectors)

    embedding = _input_embedding(model)
    embedding.register_forward_pre_hook(hide_virtual_ids)
    embedding.register_forward_hook(insert_virtual_vectors)


def peft_config(model: PreTrainedModel, section: TuningSection, task: TaskSection) -> Any:
    """Return peft's config of the virtual tokens of `section`, for a model of this shape."""
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
    from peft.utils.other import _prepare_prompt_learning_config

    prompt = section.prompt
    common: dict[str, Any] = {
        "task_type": model_task(task).virtual_token_type,
        "num_virtual_tokens": prompt.tokens,
    }
    hidden_size: dict[str, Any] = {"encoder_hidden_size": prompt.hidden_size or None}
    config: Any
    if section.method == "prefix_tuning":
        shape: dict[str, Any] = {**_prefix_shape(model.config)}
        config = PrefixTuningConfig(
            **common, **hidden_size, **shape, prefix_projection=prompt.projection
        )
    elif section.method == "p_tuning":
        config = PromptEncoderConfig(**common, **hidden_size, num_transformer_submodules=1)
    else:
        config = PromptTuningConfig(**common, num_transformer_submodules=1)
    return _prepare_prompt_learning_config(config, model.config)


def _prefix_shape(config: Any) -> dict[str, int]:
    """Return peft's arguments for the model part that gets the prefix.

    Of an encoder-decoder that is the decoder, whose shape peft does not read itself.
    """
    if not config.is_encoder_decoder:
        return {"num_transformer_submodules": 1}

    num_layers = config.num_hidden_layers
    for name in ("decoder_layers", "num_decoder_layers"):
        num_layers = getattr(config, name, None) or num_layers
    num_heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
    width = num_heads * config.d_kv if hasattr(config, "d_kv") else config.hidden_size
    return {
        "num_transformer_submodules": 2,  # peft stores one value for encoder and decoder
        "num_layers": num_layers,
        "num_attention_heads": num_heads,
        "token_dim": width,
    }


def insert_virtual_tokens(batch: Batch, virtual_ids: Sequence[int]) -> Batch:
    """Return `batch` with `virtual_ids` before each sample that has targets, padded again."""
    rows = []
    arrays = (batch.input_ids, batch.target_ids, batch.position_ids)
    for tokens, targets, positions in zip(*arrays, strict=True):
        rows.append(_insert_into_row(tokens, targets, positions, np.array(virtual_ids)))
    length = max(len(row.tokens) for row in rows)

    input_ids, target_ids, position_ids = [], [], []
    for row in rows:
        num_padding = length - len(row.tokens)
        zeros = np.zeros(num_padding, np.int64)
        ignored = np.full(num_padding, IGNORE_INDEX, np.int64)
        input_ids.append(np.concatenate([row.tokens, zeros]))
        target_ids.append(np.concatenate([row.targets, ignored]))
        # Positions that start at 0 make the padding a sample of its own.
        position_ids.append(np.concatenate([row.positions, np.arange(num_padding)]))

    return replace(
        batch,
        input_ids=np.stack(input_ids),
        target_ids=np.stack(target_ids),
        position_ids=np.stack(position_ids),
    )


class _Row(NamedTuple):
    """One row of a batch: token ids, targets and positions, (T,) each."""

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray


def _insert_into_row(
    tokens: np.ndarray, targets: np.ndarray, positions: np.ndarray, virtual_ids: np.ndarray
) -> _Row:
    """Return a row (T,) with virtual tokens before each sample that has targets."""
    # A sample starts where positions do not continue those before. Padding has no targets.
    starts = np.concatenate([[0], np.flatnonzero(np.diff(positions) != 1) + 1])
    lengths = np.diff(np.concatenate([starts, [len(tokens)]]))
    has_targets = np.add.reduceat(targets != IGNORE_INDEX, starts) > 0  # by sample
    num_samples, num_virtual = has_targets.sum(), len(virtual_ids)

    # `np.insert` takes places in the old row, so each is repeated for the tokens of one prompt.
    places = np.repeat(starts[has_targets], num_virtual)
    shifts = np.repeat(has_targets, lengths) * num_virtual  # (T,) of each token's position
    virtual_positions = np.tile(np.arange(num_virtual), num_samples)
    return _Row(
        np.insert(tokens, places, np.tile(virtual_ids, num_samples)),
        np.insert(targets, places, IGNORE_INDEX),
        np.insert(positions + shifts, places, virtual_positions),
    )


def _input_embedding(model: PreTrainedModel) -> nn.Module:
    """Return the input embedding (of an encoder-decoder, the encoder's)."""
    part: Any = model.get_encoder() if model.config.is_encoder_decoder else model
    return part.get_input_embeddings()


def _initialize_prompt(
    weight: torch.Tensor,
    model: PreTrainedModel,
    embedding: Any,
    section: TuningSection,
    text_ids: Sequence[int],
) -> None:
    """Write the initial vectors of a prompt: rows of the embedding, or random ones."""
    from peft.utils.integrations import gather_params_ctx

    config = model.config.get_text_config()
    if section.prompt.init == "random":
        std = float(getattr(config, "initializer_range", None) or 0.02)
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape) * std)
        return

    count = len(weight)
    if section.prompt.init == "text" and text_ids:
        token_ids = (list(text_ids) * count)[:count]  # repeated to the length of the prompt
    else:
        token_ids = torch.randint(config.vocab_size, (count,), device="cpu").tolist()

    # Under ZeRO-3 no rank holds the whole embedding, so reading rows of it is a collective call.
    with gather_params_ctx(list(embedding.parameters())), torch.no_grad():
        weight.copy_(embedding.weight[torch.tensor(token_ids, device=embedding.weight.device)])


def _with_prefix(
    model: PreTrainedModel, virtual: VirtualTokens, inputs: dict[str, Any]
) -> dict[str, Any]:
    """Return a forward's inputs with the prefix in cache, mask and positions."""
    ids = inputs.get("input_ids")
    candidates = (ids, inputs.get("inputs_embeds"), inputs.get("decoder_input_ids"))
    batch_size = len(next(value for value in candidates if value is not None))

    # Later steps of a generation bring the cache of the first, which holds the prefix.
    cache = inputs.get("past_key_values")
    if cache is None or not cache.get_seq_length():
        cache = virtual.prefix_cache(model, batch_size)
    changes: dict[str, Any] = {"past_key_values": cache}

    mask_name = "attention_mask"  # of the part that has the prefix
    if model.config.is_encoder_decoder:
        mask_name = "decoder_attention_mask"
    mask = inputs.get(mask_name)

    # In every step of a generation: its own mask never covers the prefix.
    if mask is not None:
        prefix_mask = torch.ones_like(mask[:, :1]).expand(-1, virtual.count)
        changes[mask_name] = torch.cat([prefix_mask, mask], 1)
    if inputs.get("position_ids") is not None:
        changes["position_ids"] = inputs["position_ids"] + virtual.count
    return inputs | changes
