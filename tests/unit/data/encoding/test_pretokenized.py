"""Shards of tokens: used as they are, or refused."""

import numpy as np
import pyarrow as pa
import pytest
from unit.data.data_helpers import data_section

from dist_ft.core.errors import DataError
from dist_ft.data.encoding.chat import Encoder


def encoder(tokenizer, **values):
    return Encoder(tokenizer, data_section(**values))


def test_tables_and_lists_are_used_as_they_are(tokenizer):
    rows = [
        {"input_ids": [5, 6, 7], "targets": [0, 1, 1]},
        {"input_ids": [], "targets": []},
        {"input_ids": [8], "targets": [1]},
    ]
    for given in (rows, pa.Table.from_pylist(rows), pa.Table.from_pylist(rows).slice(0)):
        found = encoder(tokenizer).encode(given, "s")
        assert found.tokens.tolist() == [5, 6, 7, 8] and found.targets.tolist() == [0, 1, 1, 1]
        assert found.offsets.tolist() == [0, 3, 3, 4] and (found.format, found.rows_per_range) == (
            "tokens",
            (3,),
        )
    part = encoder(tokenizer).encode(pa.Table.from_pylist(rows).slice(2), "s")
    assert part.tokens.tolist() == [8] and part.offsets.tolist() == [0, 1]


def test_without_targets_every_token_is_a_target(tokenizer):
    found = encoder(tokenizer, format="tokens").encode(pa.table({"input_ids": [[5, 6]]}), "s")
    assert found.targets.tolist() == [1, 1] and found.tokens.dtype == np.int32


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (
            pa.table({"input_ids": [[5], [10**6]]}),
            r"s row 8: input_ids has 1000000. 0 to \d+ are allowed. The shard was written",
        ),
        (pa.table({"input_ids": [[5], [-1]]}), r"s row 8: input_ids has -1"),
        (
            pa.table({"input_ids": [[5, 6], [7]], "targets": [[1, 1], [1, 1]]}),
            "s row 8: input_ids and targets differ in length",
        ),
        (
            pa.table({"input_ids": [["a"]]}),
            "s: the column input_ids is list<.*string>. It must be lists of integers",
        ),
        (
            pa.table({"input_ids": [5]}),
            "s: the column input_ids is int64. It must be lists of integers",
        ),
        (
            pa.table({"input_ids": [[5], None]}),
            "s row 8: has no input_ids, which other rows have. Shards of tokens are used whole",
        ),
        (
            pa.table({"input_ids": [[5], [6, None]]}),
            r"s row 8: input_ids has a null. Each token needs a number",
        ),
        (pa.table({"input_ids": [[5], [2**32 + 5]]}), "s row 8: input_ids has 4294967301. 0 to"),
        (
            pa.table({"input_ids": [[5], [6, 7]], "targets": [[1], [1, -100]]}),
            "s row 8: targets has -100. 0 to 1 are allowed",
        ),
        (
            pa.table({"input_ids": [[5], [6]], "targets": [[1], [2]]}),
            "s row 8: targets has 2. 0 to 1 are allowed",
        ),
        (
            [{"input_ids": [5]}, {"input_ids": [6], "targets": [0]}],
            "s row 7: has no targets, which other rows have",
        ),
        (
            [{"targets": [0]}, {"input_ids": [6], "targets": [0]}],
            "s row 7: has no input_ids, which other rows have",
        ),
        ([{"input_ids": [5]}, {"input_ids": "x"}], "s: its tokens are not lists of integers"),
        ([{"input_ids": [2**70]}], "s: its tokens are not lists of integers"),
        (
            pa.table({"text": ["a"]}),
            "s: data.format=tokens, but the columns are text. It needs input_ids",
        ),
        ([{"input_ids": [1]}, DataError("row 2: broken")], "row 2: broken"),
    ],
)
def test_bad_shards_are_refused(tokenizer, table, problem):
    with pytest.raises(DataError, match=problem):
        encoder(tokenizer, format="tokens").encode(table, "s", 7)


def test_rows_must_have_the_columns_of_any_row(tokenizer):
    with pytest.raises(DataError, match="s row 1: has no input_ids, which other rows have"):
        encoder(tokenizer).encode([{"text": "a"}, {"input_ids": [6]}], "s")


def test_bad_rows_are_never_skipped(tokenizer):
    with pytest.raises(
        DataError,
        match=r"row 2: broken. Shards of tokens are used whole or not at all. Write the shard",
    ):
        encoder(tokenizer, bad_rows="skip").encode(
            [{"input_ids": [1]}, DataError("row 2: broken.")], "s"
        )
