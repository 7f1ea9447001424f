"""The model and the data of a drill, made on the spot: no network, the same bits every time."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from dist_ft.data.write import write_jsonl
from dist_ft.storage import Store

TEXT = ("the quick brown fox jumps over lazy dogs while seven wise owls watch rivers run between old stones and every "
        "child counts stars until morning comes with bread and tea and news of distant towns")
WORDS = TEXT.split()
ROWS_A_LANE = 24
"""So that a drill's steps make more than one epoch."""


def make(store: Store, num_lanes: int) -> None:
    """Write `model/` (weights, config, tokenizer) and `data/` (instruction pairs in shards) into `store`."""
    rows = pairs(ROWS_A_LANE * num_lanes)
    write_jsonl(rows, store, "data/pairs", -(-len(rows) // 3))
    with tempfile.TemporaryDirectory(prefix="dist_ft-drill-") as folder:
        _model(Path(folder))
        for path in sorted(Path(folder).iterdir()):
            store.write(f"model/{path.name}", path.read_bytes())


def pairs(count: int) -> list[dict[str, str]]:
    """Return `count` instruction pairs of unequal lengths."""
    rng = random.Random(0)
    return [{"prompt": f"say {' '.join(rng.choices(WORDS, k=rng.randint(1, 8)))}",
             "response": " ".join(rng.choices(WORDS, k=rng.randint(4, 40)))} for _ in range(count)]


def _model(folder: Path) -> None:
    """Write a Llama of some 0.4 million random weights and a tokenizer of bytes and common words."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([TEXT] * 4, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.save_pretrained(folder)
    logging.disable_progress_bar()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(fast), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, attention_dropout=0.1, bos_token_id=0, eos_token_id=0,
        pad_token_id=0)).save_pretrained(folder)
