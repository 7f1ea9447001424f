"""A tiny real model (GPT-2 family: dropout everywhere, tied weights), a tokenizer trained on the spot, and data."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = [
    "the",
    "a",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dogs",
    "while",
    "seven",
    "wise",
    "owls",
    "watch",
    "rivers",
    "run",
    "between",
    "old",
    "stones",
    "and",
    "every",
    "child",
    "counts",
    "stars",
    "until",
    "morning",
    "comes",
    "with",
    "bread",
    "tea",
    "and",
    "news",
    "of",
    "distant",
    "towns",
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_model(folder: Path, dropout: float = 0.1, positions: int = 64) -> Path:
    """Write model and tokenizer to `folder` and return it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(fast),
        n_positions=positions,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return `count` instruction pairs of very unequal lengths."""
    rng = random.Random(seed)
    return [
        {
            "prompt": f"say {' '.join(rng.choices(WORDS, k=rng.randint(1, 6)))}",
            "response": " ".join(rng.choices(WORDS, k=rng.randint(1, 24))),
        }
        for _ in range(count)
    ]


def make_data(folder: Path, count: int, shards: int = 3, seed: int = 0) -> str:
    """Write `count` pairs as JSON Lines shards and return the glob that finds them."""
    folder.mkdir(parents=True, exist_ok=True)
    every = rows(count, seed)
    for shard in range(shards):
        lines = [json.dumps(row) for row in every[shard::shards]]
        (folder / f"shard-{shard}.jsonl").write_text("\n".join(lines) + "\n")
    return f"{folder}/*.jsonl"


def config(
    base: Path, name: str, *, workers: int = 0, stage: int = 3, **changes: dict[str, Any]
) -> dict[str, Any]:
    """Return a run: two epochs, five lanes (which two and three workers do not divide), packed, dropout on."""
    document: dict[str, dict[str, Any]] = {
        "run": {"name": name, "storage": str(base / "runs"), "seed": 11},
        "model": {"path": str(base / "model"), "dtype": "float32"},
        "data": {
            "train": str(base / "data" / "*.jsonl"),
            "format": "instruction",
            "overlong": "truncate",
            "block_mib": 0.002,
            "shuffle_blocks": 2,
            "cache_dir": str(base / "cache"),
        },
        "batch": {"global_batch": 5, "micro_batch": 1, "sequence_length": 48},
        "optimizer": {"learning_rate": 5e-3, "weight_decay": 0.01},
        "schedule": {"name": "cosine", "epochs": 2, "warmup_steps": 2},
        "zero": {"stage": stage},
        "cluster": {"workers": workers, "cpus_per_worker": 0.5},
        "checkpoint": {"every_steps": 4},
        "log": {"tensorboard": False},
    }
    for section, fields in changes.items():
        document.setdefault(section, {}).update(fields)
    return document


def base(folder: Path, samples: int = 110) -> Path:
    """Make model and data below `folder` and return it."""
    make_model(folder / "model")
    make_data(folder / "data", samples)
    return folder
