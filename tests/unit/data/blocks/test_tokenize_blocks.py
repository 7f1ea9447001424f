"""A tokenizer process creates the encoder of its parent."""

from __future__ import annotations

import json

import pytest

from dist_ft.config.schema import DataSection, PromptingSection, TaskSection
from dist_ft.data.blocks.token_cache import compute_fingerprint
from dist_ft.data.blocks.tokenize_blocks import describe_encoder, load_encoder
from dist_ft.data.encoding.make_encoder import make_encoder

LABELS = {"name": "sequence_classification", "labels": ("a", "b")}
PROMPTING = {
    "method": "likelihood",
    "templates": ("{text}\nit is",),
    "verbalizers": {"a": " good", "b": " bad"},
    "normalize": "mean",
}


@pytest.mark.parametrize(
    ("task", "prompting"),
    [
        ({}, {}),
        (LABELS, {}),
        (LABELS, PROMPTING),
        ({"name": "masked_lm", "mask_probability": 0.3}, {}),
        ({"name": "question_answering", "stride": 8}, {}),
    ],
    ids=["causal", "classification", "prompting", "masked", "answers"],
)
def test_process_creates_the_encoder_of_its_parent(tokenizer, tmp_path, task, prompting):
    tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": "<|endoftext|>"})
    tokenizer.save_pretrained(tmp_path)
    encoder = make_encoder(
        tokenizer,
        DataSection(train="x", overlong="truncate"),
        TaskSection(**task),
        64,
        PromptingSection(**prompting),
    )

    setup = json.loads(json.dumps(describe_encoder(encoder, str(tmp_path), 1e9, {})))
    loaded = load_encoder(setup)

    assert type(loaded) is type(encoder)
    assert compute_fingerprint(loaded) == compute_fingerprint(encoder)
