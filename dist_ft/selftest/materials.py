"""The models and the data of drills and selftests, made on the spot: no network, the same bits every time."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dist_ft.data.tools.write import write_jsonl
from dist_ft.storage.filesystem import Store

TEXT = (
    "the quick brown fox jumps over lazy dogs while seven wise owls watch rivers run between old stones and every "
    "child counts stars until morning comes with bread and tea and news of distant towns"
)
WORDS = TEXT.split()
ROWS_A_LANE = 24
"""So that a drill's steps make more than one epoch."""


@dataclass(frozen=True)
class Size:
    """How large a model is, and the sequences it is to take."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    length: int
    dropout: float = 0.0
    dtype: str = "float32"

    @property
    def num_parameters(self) -> int:
        """Weights of the layers, those of the small vocabulary left out."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)

    @property
    def flops_a_token(self) -> float:
        """Floating-point operations of forward and backward: 6 a weight, and causal attention."""
        return 6.0 * self.num_parameters + 6.0 * self.layers * self.hidden * self.length


SMALL = Size(128, 2, 256, 4, 64, dropout=0.1)


def make(store: Store, num_lanes: int) -> None:
    """Write `model/` (weights, config, tokenizer) and `data/` (instruction pairs in shards) into `store`."""
    rows = pairs(ROWS_A_LANE * num_lanes)
    write_jsonl(rows, store, "data/pairs", -(-len(rows) // 3))
    make_model(store, "model", SMALL)


def make_texts(store: Store, num_tokens: int) -> None:
    """Write `texts/`: long plain texts of at least so many tokens in all."""
    rng = random.Random(1)
    rows = [{"text": " ".join(rng.choices(WORDS, k=1000))} for _ in range(-(-num_tokens // 1000))]
    write_jsonl(rows, store, "texts/text", -(-len(rows) // 4))


def make_model(store: Store, name: str, size: Size) -> None:
    """Write a model of random weights, with config and tokenizer, as `name/` into `store`."""
    with tempfile.TemporaryDirectory(prefix="dist_ft-drill-") as folder:
        _model(Path(folder), size)
        for path in sorted(Path(folder).iterdir()):
            store.write(f"{name}/{path.name}", path.read_bytes())


def pairs(count: int) -> list[dict[str, str]]:
    """Return `count` instruction pairs of unequal lengths."""
    rng = random.Random(0)
    return [
        {
            "prompt": f"say {' '.join(rng.choices(WORDS, k=rng.randint(1, 8)))}",
            "response": " ".join(rng.choices(WORDS, k=rng.randint(4, 40))),
        }
        for _ in range(count)
    ]


def _model(folder: Path, size: Size) -> None:
    """Write a Llama of random weights and a tokenizer of bytes and common words."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT] * 4,
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
    fast.save_pretrained(folder)
    logging.disable_progress_bar()
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast),
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=size.length,
            attention_dropout=size.dropout,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    ).to(getattr(torch, size.dtype)).save_pretrained(folder)
