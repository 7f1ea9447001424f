"""Tiny real encoders and encoder-decoders, and data that each task can be trained on: labels follow from the words of a text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tiny

KINDS = {
    "tea": "drink",
    "bread": "food",
    "fox": "animal",
    "owls": "animal",
    "rivers": "place",
    "towns": "place",
}
LABELS = ["animal", "drink", "food", "place"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = """
a b c d e f g h i j k l m n o p q r s t u v w x y z ##e ##v ##n ##r ##o ##w ##t ##u ##s ##i ##h ##a ##d ##c
##l ##y ##f ##m ##p ##g ##z ##x ##k ##ve ##nt ##il ##ver an br co st wi ##es ##ea ##ow ##hil and ##own be chil
do di ever fo ju la mo ne ow ol of over qu ru ri se th tea town unt wa whil ##ee ##ni ##ng ##nes ##rs ##rni
##ones ##ws ##wee ##th ##ta ##tc ##twee ##unt ##se ##sta ##ic ##ars ##ls ##mp ##mes ##gs ##zy ##ven ##vers
brea brown count comes stones stars with wise betwee child dogs dista every fox jump lazy morni news owls old
quic run rivers seven the towns until watc while bread counts between
"""
"""Word pieces of a vocabulary that was trained once: a tokenizer trainer breaks ties by chance."""
PLAIN = [word for word in tiny.WORDS if word not in KINDS]


def make_tokenizer() -> Any:
    """Return a WordPiece tokenizer as BERT has."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL, *PIECES.split()]
    made = Tokenizer(
        models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(SPECIAL)
    ends = [(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def make_encoder(folder: Path, dropout: float = 0.1) -> Path:
    """Write a tiny BERT with its masked language head, and its tokenizer."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
            initializer_range=0.2,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_encoder_decoder(folder: Path, dropout: float = 0.1) -> Path:
    """Write a tiny BART and its tokenizer."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    BartForConditionalGeneration(
        BartConfig(
            vocab_size=len(tokenizer),
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
            dropout=dropout,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
            decoder_start_token_id=tokenizer.sep_token_id,
            forced_eos_token_id=None,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _words(rng: random.Random, key: str, often: bool) -> list[str]:
    words = [
        key if often and rng.random() < 0.6 else word
        for word in rng.choices(PLAIN, k=rng.randint(1, 12))
    ]
    words.insert(rng.randrange(len(words) + 1), key)
    return words


def row(task: str, rng: random.Random) -> dict[str, Any]:
    """Return a row of a task."""
    key = rng.choice(list(KINDS))
    words = _words(rng, key, task in ("sequence_classification", "multi_label"))
    text, at = " ".join(words), words.index(key)
    if task == "sequence_classification":
        return {"text": text, "label": KINDS[key]}
    if task == "multi_label":
        return {
            "text": text,
            "label": [label for label in LABELS if label in {KINDS.get(word) for word in words}],
        }
    if task == "regression":
        return {"text": text, "label": len(words) / 4}
    if task == "token_classification":
        return {
            "tokens": words,
            "tags": [f"B-{KINDS[word]}" if word in KINDS else "O" for word in words],
        }
    if task == "question_answering":
        start = len(" ".join(words[:at])) + (1 if at else 0)
        return {
            "question": "the fox",
            "context": text,
            "answers": {"text": [key], "answer_start": [start]},
        }
    if task == "seq2seq":
        return {"source": text, "target": " ".join(sorted(words)[:3])}
    if task == "embedding":
        other = words[:]
        rng.shuffle(other)
        return {"text": text, "positive": " ".join(other)}
    return {"text": text}


def make_data(folder: Path, task: str, count: int, seed: int = 0) -> str:
    """Write `count` rows in two shards and return the glob that finds them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    rows = [row(task, rng) for _ in range(count)]
    for shard in range(2):
        (folder / f"shard-{shard}.jsonl").write_text(
            "".join(json.dumps(one) + "\n" for one in rows[shard::2])
        )
    return f"{folder}/*.jsonl"


def config(
    base: Path, kind: str, name: str, *, workers: int = 0, stage: int = 3, **changes: dict[str, Any]
) -> dict[str, Any]:
    """Return a run of the task `kind`: two epochs, five lanes of two rows, dropout on, evaluated at both ends."""
    return tiny.config(
        base,
        f"{kind.replace('_', '-')}-{name}",
        workers=workers,
        stage=stage,
        **{
            "model": {"path": str(base / ("bart" if kind == "seq2seq" else "bert"))},
            "task": {"name": kind, **changes.pop("task", {})},
            "data": {
                "train": make_data(base / "data" / kind, kind, 96),
                "format": "auto",
                "overlong": "truncate",
                "block_mib": 0.004,
                **changes.pop("data", {}),
            },
            "batch": {"global_batch": 10, "micro_batch": 2, "sequence_length": 40},
            "evaluation": {"data": make_data(base / "held-out" / kind, kind, 23, seed=1)},
            **changes,
        },
    )


def base(folder: Path) -> Path:
    """Make both models below `folder` and return it."""
    make_encoder(folder / "bert")
    make_encoder_decoder(folder / "bart")
    return folder
