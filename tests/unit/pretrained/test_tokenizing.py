"""A row that a tokenizer cannot take is named, and can be skipped."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_tasks
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dist_ft.config.schema import DataSection, TaskSection
from dist_ft.core.errors import DataError
from dist_ft.data.encoding.make_encoder import make_encoder
from dist_ft.pretrained import tokenizing

GOOD = {"text": "the fox"}
SURROGATE = {"text": "the \ud800 fox"}


@pytest.fixture(scope="module")
def panicking() -> Any:
    """A tokenizer whose pattern takes too many steps for long runs of "a"."""
    backend = Tokenizer.from_str(tiny_tasks.make_tokenizer().backend_tokenizer.to_str())
    pattern = Regex("(?:a|aa|a?a)+$x|b")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), backend.pre_tokenizer]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", pad_token="[PAD]")


def encoder(tokenizer: Any, task: str = "causal_lm", **fields: Any) -> Any:
    data = DataSection.model_validate({"train": "x", **fields})
    section = TaskSection.model_validate(
        {"name": task, "labels": ["a", "b"] if task == "sequence_classification" else []}
    )
    return make_encoder(tokenizer, data, section, 32)


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification"])
def test_row_with_a_lone_surrogate_is_named_and_skippable(task):
    tokenizer = tiny_tasks.make_tokenizer()
    tokenizer.eos_token = tokenizer.sep_token
    rows = [{**row, "label": "a"} for row in (GOOD, SURROGATE, GOOD)]
    with pytest.raises(DataError, match=r"shard row 12: the tokenizer cannot take its text \("):
        encoder(tokenizer, task, format="text").encode(rows, "shard", 11)

    encoded = encoder(tokenizer, task, format="text", bad_rows="skip").encode(rows, "shard", 11)
    (problem,) = encoded.bad_rows
    assert problem.startswith("shard row 12: ") and "\n" not in problem
    lengths = [
        stop - start for start, stop in zip(encoded.offsets, encoded.offsets[1:], strict=False)
    ]
    assert lengths[1] == 0 and lengths[0] == lengths[2] > 0


def test_row_that_makes_native_code_panic_is_named_and_skippable(panicking):
    rows = [GOOD, {"text": "a" * 60}, GOOD]
    with pytest.raises(DataError, match="shard row 2: the tokenizer cannot take its text"):
        encoder(panicking, format="text").encode(rows, "shard")
    encoded = encoder(panicking, format="text", bad_rows="skip").encode(rows, "shard")
    assert len(encoded.bad_rows) == 1


def test_first_text_that_fails_is_found():
    tokenizer = tiny_tasks.make_tokenizer()
    assert tokenizing.find_error(tokenizer, {"a": ["x", {"b": "y"}]}) is None
    assert tokenizing.find_error(tokenizer, {"a": ["x", {"b": "\udfff"}]}) is not None


def test_ends_of_the_process_are_no_errors_of_a_tokenizer():
    with pytest.raises(KeyboardInterrupt), tokenizing.tokenizing_errors():
        raise KeyboardInterrupt
