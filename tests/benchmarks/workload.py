"""Models S and M, a word-level tokenizer and random data for the benchmarks, in a temporary folder.

Samples are random words of the vocabulary, of given lengths in tokens. Weights are random: the time
of a step does not depend on them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

SHAPES: dict[str, dict[str, Any]] = {
    "S": {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_attention_heads": 4,
        "vocab_size": 8192,
    },
    "M": {
        "num_hidden_layers": 8,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_attention_heads": 8,
        "vocab_size": 32768,
    },
}
END = "</s>"


def lognormal_lengths(
    count: int, seed: int, median: float = 350, sigma: float = 1.0, max_length: int = 2048
) -> np.ndarray:
    """Return the number of tokens of each sample (count,): lognormal, from 2 to `max_length`."""
    lengths = np.random.default_rng(seed).lognormal(np.log(median), sigma, count)
    return np.clip(lengths, 2, max_length).astype(np.int64)


def make_model(folder: Path, shape: str, max_length: int = 2048) -> str:
    """Write a Llama of `shape` and its tokenizer to `folder` and return its path."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = SHAPES[shape]
    words = {END: 0, **{f"w{i}": i for i in range(1, sizes["vocab_size"])}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=sizes["num_attention_heads"],
        tie_word_embeddings=False,
        max_position_embeddings=max_length,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def make_data(folder: Path, lengths: np.ndarray, vocab_size: int, seed: int) -> str:
    """Write samples of `lengths` tokens as JSON Lines; return their glob.

    The last token of each sample is the end token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    with open(folder / "texts.jsonl", "w", encoding="utf-8") as file:
        for length in lengths.tolist():
            words = random.integers(1, vocab_size, length - 1).tolist()
            file.write(json.dumps({"text": " ".join(f"w{word}" for word in words)}) + "\n")
    return str(folder / "*.jsonl")


def run_config(
    folder: Path,
    shape: str,
    *,
    name: str,
    train: str,
    sequence_length: int,
    micro_batch: int,
    lanes: int,
    steps: int,
    workers: int,
    stage: int = 1,
) -> dict[str, Any]:
    """Return the config of a run for `load_config`; the other fields have their defaults."""
    return {
        "run": {"name": name, "storage": str(folder / "runs")},
        "model": {"path": str(folder / f"model-{shape.lower()}"), "dtype": "float32"},
        "data": {"train": train, "cache_dir": str(folder / "cache"), "format": "text"},
        "batch": {
            "global_batch": micro_batch * lanes,
            "micro_batch": micro_batch,
            "sequence_length": sequence_length,
        },
        "optimizer": {"learning_rate": 1e-4, "weight_decay": 0.1},
        "schedule": {"name": "constant", "steps": steps},
        "zero": {"stage": stage},
        "cluster": {"workers": workers},
        "checkpoint": {"at_end": False},
        "log": {"level": "warning"},
    }
