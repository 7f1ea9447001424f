"""What a run stored about its samples still compares equal after config fields were renamed.

Version 0.1.0 computed the expected hashes.
"""

from __future__ import annotations

import pytest

from dist_ft.config import renames
from dist_ft.config.schema import DataSection, PromptingSection, TaskSection
from dist_ft.data.blocks.token_cache import compute_fingerprint
from dist_ft.data.encoding.make_encoder import make_encoder

LABELS = {"name": "sequence_classification", "labels": ("a", "b")}
PROMPTING = {
    "method": "likelihood",
    "templates": ("{text}\nit is",),
    "verbalizers": {"a": " good", "b": " bad"},
    "normalize": "mean",
}
CASES = {
    "mask probability": (
        {},
        {"name": "masked_lm", "mask_probability": 0.3},
        {},
        "cb9963092bb508d24db44cac466b7e35",
    ),
    "augmentation": (
        {"augment": {"probability": 0.5, "swap": 0.1}},
        LABELS,
        {},
        "0411af464866bc8d52e9ef87e88be77c",
    ),
    "prompting": ({}, LABELS, PROMPTING, "7c2958503b99fd3cb469e0e1345aa925"),
}


@pytest.mark.parametrize(("data", "task", "prompting", "expected"), CASES.values(), ids=CASES)
def test_fingerprints_are_those_of_0_1_0(tokenizer, data, task, prompting, expected):
    tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": "<|endoftext|>"})
    encoder = make_encoder(
        tokenizer,
        DataSection(train="x", **data),
        TaskSection(**task),
        64,
        PromptingSection(**prompting),
    )
    assert compute_fingerprint(encoder) == expected


def test_a_stored_recipe_has_the_names_of_0_1_0(tokenizer):
    prompting = PromptingSection(**PROMPTING)
    encoder = make_encoder(tokenizer, DataSection(train="x"), TaskSection(**LABELS), 64, prompting)
    stored = encoder.recipe["prompting"]
    assert stored["normalise"] == "mean" and stored["verbalisers"] == {"a": " good", "b": " bad"}
    assert not {"normalize", "verbalizers"} & set(stored)
    assert PromptingSection(**renames.RUN.migrate(stored, "prompting")) == prompting
