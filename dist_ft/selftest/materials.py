"""Writes models and data of drills and self-tests, without network and bit-equal each time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_ft.core import scratch
from dist_ft.data.tools.write import write_jsonl
from dist_ft.storage.filesystem import Store

TEXT = (
    "the quick brown fox jumps over lazy dogs while seven wise owls watch rivers run between old "
    "stones and every child counts stars until morning comes with bread and tea and news of "
    "distant towns"
)
WORDS = TEXT.split()
ROWS_PER_LANE = 24
"""So few that the steps of a drill are more than one epoch."""


@dataclass(frozen=True)
class ModelSize:
    """The size of a model.

    Attributes:
        hidden_size: width (H).
        num_layers: number of decoder layers.
        intermediate_size: width of the feed-forward layers.
        num_heads: attention heads.
        sequence_length: longest sequence (T).
        dropout: dropout rate of attention.
        dtype: type of the weights.
    """

    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int
    sequence_length: int
    dropout: float = 0.0
    dtype: str = "float32"

    @property
    def num_parameters(self) -> int:
        """Weights of the layers, without those of the small vocabulary."""
        attention = 4 * self.hidden_size**2
        feed_forward = 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + feed_forward)

    @property
    def flops_per_token(self) -> float:
        """FLOPs of forward and backward: 6 per weight, plus causal attention."""
        attention = 6.0 * self.num_layers * self.hidden_size * self.sequence_length
        return 6.0 * self.num_parameters + attention


SMALL = ModelSize(128, 2, 256, 4, 64, dropout=0.1)


def write_materials(store: Store, num_lanes: int) -> None:
    """Write `model/` (weights, config, tokenizer) and `data/` (instruction pairs)."""
    # three files: a run must also read, shuffle and resume across files
    rows = instruction_pairs(ROWS_PER_LANE * num_lanes)
    write_jsonl(rows, store, "data/pairs", -(-len(rows) // 3))
    write_model(store, "model", SMALL)


def write_texts(store: Store, num_tokens: int) -> None:
    """Write `texts/`: long plain texts of at least `num_tokens` tokens in total."""
    rng = random.Random(1)
    rows = []
    for _ in range(-(-num_tokens // 1000)):
        # each word is at least one token
        rows.append({"text": " ".join(rng.choices(WORDS, k=1000))})
    write_jsonl(rows, store, "texts/text", -(-len(rows) // 4))


def write_model(
    store: Store,
    name: str,
    size: ModelSize,
    texts: Sequence[str] = (TEXT,),
    chat_template: str | None = None,
) -> None:
    """Write a model with random weights, with config and tokenizer, as `name/` into `store`.

    The tokenizer is trained on `texts`; `chat_template` (Jinja) says how it writes messages.
    """
    # transformers writes local folders only, and `store` may be a bucket
    with scratch.folder("drill") as folder:
        _write_tokenizer_and_weights(folder, size, texts, chat_template)
        for path in sorted(folder.iterdir()):
            store.write(f"{name}/{path.name}", path.read_bytes())


def instruction_pairs(count: int) -> list[dict[str, str]]:
    """Return `count` instruction pairs of unequal lengths."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        # drawn in this order: another one would give other rows
        prompt_words = rng.choices(WORDS, k=rng.randint(1, 8))
        response_words = rng.choices(WORDS, k=rng.randint(4, 40))
        rows.append(
            {"prompt": f"say {' '.join(prompt_words)}", "response": " ".join(response_words)}
        )
    return rows


def _write_tokenizer_and_weights(
    folder: Path, size: ModelSize, texts: Sequence[str], chat_template: str | None
) -> None:
    """Write a Llama with random weights, and a tokenizer of bytes and the words of `texts`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [*texts] * 4,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )
    if chat_template is not None:
        fast.chat_template = chat_template
    fast.save_pretrained(folder)

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast),
            hidden_size=size.hidden_size,
            intermediate_size=size.intermediate_size,
            num_hidden_layers=size.num_layers,
            num_attention_heads=size.num_heads,
            num_key_value_heads=size.num_heads,
            max_position_embeddings=size.sequence_length,
            attention_dropout=size.dropout,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    model.to(getattr(torch, size.dtype)).save_pretrained(folder)
