"""Virtual tokens before each sample: prompt tuning, P-tuning and prefix tuning, put into the model itself.

What makes their vectors is `peft`'s. Prompt and P-tuning (arXiv:2104.08691, arXiv:2103.10385): ids below zero stand for
virtual tokens, -1 for the first; the input embedding looks them up here. So whatever handles ids (packed rows,
masks, positions, `generate`) handles them too. Prefix tuning (arXiv:2101.00190): every layer finds keys and values
of the virtual tokens in its cache. Does not pack a prefix: all samples of a row would share one.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from dist_ft.config.sections.task import TaskSection
from dist_ft.config.sections.tuning import TuningSection
from dist_ft.core.errors import ModelError
from dist_ft.data.batch import IGNORE_INDEX, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "virtual_tokens"
"""What the module is called in a model."""
PEFT_TASK_TYPES = {
    "causal_lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "sequence_classification": "SEQ_CLS",
    "multi_label": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "embedding": "FEATURE_EXTRACTION",
}
"""What peft calls the tasks it knows virtual tokens for."""


class VirtualTokens(nn.Module):
    """`count` learned vectors, or a learned cache, that a model finds before each of its samples."""

    def __init__(self, encoder: nn.Module, count: int, config: Any) -> None:
        """Wrap peft's `encoder` of `count` tokens, made by peft's `config`."""
        super().__init__()
        self.encoder = encoder
        self.count = count
        self.config = config
        self.is_prefix = config.peft_type == "PREFIX_TUNING"
        self.numbers: torch.Tensor
        self.register_buffer("numbers", torch.arange(count), persistent=False)

    def forward(self) -> torch.Tensor:
        """Return the vectors (count, H), of a prefix (count, layers x 2 x H of keys)."""
        return self.encoder(self.numbers[None])[0]

    @property
    def ids(self) -> range:
        """The ids that stand for virtual tokens, in their order; of a prefix there are none."""
        return range(0) if self.is_prefix else range(-1, -1 - self.count, -1)

    def before(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask (B, T) with the virtual tokens in front, (B, count + T); of a prefix as they are."""
        virtual = torch.tensor(self.ids, dtype=ids.dtype, device=ids.device).expand(len(ids), -1)
        return torch.cat([virtual, ids], 1), torch.cat(
            [torch.ones_like(virtual, dtype=mask.dtype), mask], 1
        )

    def embed(self, ids: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """Return `vectors` (B, T, H) with those of virtual tokens where `ids` (B, T) are below zero."""
        own = self()[(-1 - ids).clamp(min=0)].to(vectors.dtype)
        return torch.where((ids < 0)[..., None], own, vectors)

    def cache(self, model: PreTrainedModel, batch_size: int) -> Any:
        """Return the cache that holds the prefix for `batch_size` rows."""
        from transformers import DynamicCache, EncoderDecoderCache

        config = self.config
        heads = config.num_attention_heads
        vectors = (
            self()
            .to(model.dtype)
            .view(self.count, 2 * config.num_layers, heads, config.token_dim // heads)
        )
        states = vectors.permute(1, 2, 0, 3)[:, None].expand(
            -1, batch_size, -1, -1, -1
        )  # (2 layers, B, heads, V, D)
        two = model.config.is_encoder_decoder
        firsts = [
            (4 if two else 2) * layer % len(states) for layer in range(config.num_layers)
        ]  # so peft deals them
        made = DynamicCache([(states[first], states[first + 1]) for first in firsts])
        return EncoderDecoderCache(made, DynamicCache()) if two else made


def find_virtual_tokens(model: PreTrainedModel) -> VirtualTokens | None:
    """Return a model's virtual tokens, if it has any."""
    found = getattr(model, NAME, None)
    return found if isinstance(found, VirtualTokens) else None


def prepend_virtual_tokens(virtual: VirtualTokens | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return a model's inputs (B, T), padded on the right, with its virtual tokens, if any, in front."""
    if virtual is None or not virtual.ids:
        return given
    ids, mask = virtual.before(given["input_ids"], given["attention_mask"])
    made = given | {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in given:
        types = given["token_type_ids"]
        made["token_type_ids"] = torch.cat(
            [torch.zeros_like(types[:, :1]).expand(-1, virtual.count), types], 1
        )
    return made


def add_virtual_tokens(
    model: PreTrainedModel,
    section: TuningSection,
    seed: int,
    task: TaskSection,
    text_ids: Sequence[int] = (),
) -> None:
    """Give `model` the virtual tokens of `section`, drawn by `seed` or begun as the tokens `text_ids`.

    Raises ModelError for a model whose embeddings or layers can not be given any.
    """
    from peft.tuners.p_tuning.model import PromptEncoder
    from peft.tuners.prefix_tuning.model import PrefixEncoder
    from peft.tuners.prompt_tuning.model import PromptEmbedding

    words = _embeddings(model)
    try:
        config = peft_config(model, section, task)
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"tuning.method={section.method}: peft does not know such a {model.config.model_type} model "
            f"({str(error).splitlines()[0][:150]}); use tuning.method=lora"
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if section.method == "prefix_tuning":
            encoder: nn.Module = PrefixEncoder(config)
        else:
            encoder = (
                PromptEncoder(config)
                if section.method == "p_tuning"
                else PromptEmbedding(config, words)
            )
        made = VirtualTokens(encoder, section.prompt.tokens, config).to(model.dtype)
        if section.method == "prompt_tuning":
            _begin(encoder.embedding.weight, model, words, section, text_ids)  # type: ignore[union-attr, arg-type]
    attach_virtual_tokens(model, made)


def attach_virtual_tokens(model: PreTrainedModel, made: VirtualTokens) -> None:
    """Let `model` find its virtual tokens."""
    model.add_module(NAME, made)
    if made.is_prefix:
        names = list(inspect.signature(model.base_model.forward).parameters)
        model.base_model.register_forward_pre_hook(
            lambda _, args, given: (
                (),
                _with_prefix(model, made, dict(zip(names, args, strict=False)) | given),
            ),
            with_kwargs=True,
        )
        return
    under_way: list[torch.Tensor] = []

    def keep(_words: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        under_way[:] = [args[0]]
        return (args[0].clamp(min=0), *args[1:])

    words = _embeddings(model)
    words.register_forward_pre_hook(keep)
    words.register_forward_hook(lambda _words, _args, vectors: made.embed(under_way.pop(), vectors))


def peft_config(model: PreTrainedModel, section: TuningSection, task: TaskSection) -> Any:
    """Return peft's config of the virtual tokens of `section`, for a model of this shape."""
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
    from peft.utils.other import _prepare_prompt_learning_config

    prompt = section.prompt
    given: dict[str, Any] = {"task_type": PEFT_TASK_TYPES[task.name], "num_virtual_tokens": prompt.tokens}
    hidden: dict[str, Any] = {"encoder_hidden_size": prompt.hidden_size or None}
    if section.method == "prefix_tuning":
        made: Any = PrefixTuningConfig(
            **given, **hidden, **_decoder(model.config), prefix_projection=prompt.projection
        )
    elif section.method == "p_tuning":
        made = PromptEncoderConfig(**given, **hidden, num_transformer_submodules=1)
    else:
        made = PromptTuningConfig(**given, num_transformer_submodules=1)
    return _prepare_prompt_learning_config(made, model.config)


def _decoder(config: Any) -> dict[str, Any]:
    """Return the shape of what a prefix stands in: of an encoder-decoder the decoder, which peft does not ask for."""
    if not config.is_encoder_decoder:
        return {"num_transformer_submodules": 1}
    found = {
        "num_transformer_submodules": 2,
        "num_layers": config.num_hidden_layers,
    }  # peft keeps one for both parts
    for name in ("decoder_layers", "num_decoder_layers"):
        found["num_layers"] = getattr(config, name, None) or found["num_layers"]
    heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
    width = heads * config.d_kv if hasattr(config, "d_kv") else config.hidden_size
    return found | {"num_attention_heads": heads, "token_dim": width}


def insert_virtual_tokens(batch: Batch, ids: Sequence[int]) -> Batch:
    """Return `batch` with virtual tokens `ids` before each sample that has targets; rows are padded to the longest."""
    rows = [
        _row(*row, ids=np.array(ids))
        for row in zip(batch.input_ids, batch.target_ids, batch.position_ids, strict=True)
    ]
    length = max(len(row[0]) for row in rows)
    fills: tuple[Any, ...] = (
        lambda size: np.zeros(size, np.int64),
        lambda size: np.full(size, IGNORE_INDEX, np.int64),
        np.arange,
    )
    padded = [
        np.stack([np.concatenate([row[i], fill(length - len(row[i]))]) for row in rows])
        for i, fill in enumerate(fills)
    ]
    return replace(batch, input_ids=padded[0], target_ids=padded[1], position_ids=padded[2])


def _row(
    tokens: np.ndarray, targets: np.ndarray, positions: np.ndarray, ids: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Return one row of a batch, each (T,), with virtual tokens before each sample that has targets."""
    begins = np.concatenate([[0], np.flatnonzero(np.diff(positions) != 1) + 1])
    learned = np.add.reduceat(targets != IGNORE_INDEX, begins) > 0
    places = np.repeat(begins[learned], len(ids))
    further = np.repeat(learned, np.diff(np.concatenate([begins, [len(tokens)]]))) * len(ids)
    return (
        np.insert(tokens, places, np.tile(ids, learned.sum())),
        np.insert(targets, places, IGNORE_INDEX),
        np.insert(positions + further, places, np.tile(np.arange(len(ids)), learned.sum())),
    )


def _embeddings(model: PreTrainedModel) -> nn.Module:
    """Return the module that looks up what a model is given (of an encoder-decoder, the encoder's)."""
    part: Any = model.get_encoder() if model.config.is_encoder_decoder else model
    return part.get_input_embeddings()


def _begin(
    weight: torch.Tensor,
    model: PreTrainedModel,
    words: Any,
    section: TuningSection,
    text_ids: Sequence[int],
) -> None:
    """Write the first values of a prompt: rows of the embeddings, or random ones of their width."""
    from peft.utils.integrations import gather_params_ctx

    config = model.config.get_text_config()
    if section.prompt.init == "random":
        std = float(getattr(config, "initializer_range", None) or 0.02)
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape) * std)
        return
    count = len(weight)
    drawn = torch.randint(config.vocab_size, (count,), device="cpu").tolist()
    chosen = (
        (list(text_ids) * count)[:count] if section.prompt.init == "text" and text_ids else drawn
    )
    with gather_params_ctx(list(words.parameters())), torch.no_grad():
        weight.copy_(words.weight[torch.tensor(chosen, device=words.weight.device)])


def _with_prefix(
    model: PreTrainedModel, made: VirtualTokens, given: dict[str, Any]
) -> dict[str, Any]:
    """Return what a forward is given, with the prefix in its cache, and mask and positions that know of it."""
    two = model.config.is_encoder_decoder
    ids, name = given.get("input_ids"), "decoder_attention_mask" if two else "attention_mask"
    rows = len(
        next(
            found
            for found in (ids, given.get("inputs_embeds"), given.get("decoder_input_ids"))
            if found is not None
        )
    )
    cache = given.get("past_key_values")
    if cache is None or not cache.get_seq_length():
        cache = made.cache(model, rows)
    changes: dict[str, Any] = {"past_key_values": cache}
    mask = given.get(name)
    if mask is not None:
        changes[name] = torch.cat([torch.ones_like(mask[:, :1]).expand(-1, made.count), mask], 1)
    if given.get("position_ids") is not None:
        changes["position_ids"] = given["position_ids"] + made.count
    return given | changes
