"""Shards of tokens: taken as they are, refused where they can not be."""

import numpy as np
import pyarrow as pa
import pytest
from unit.data.data_helpers import data_section

from dist_ft.core.errors import DataError
from dist_ft.data.encoding.chat import Encoder


def encoder(tokenizer, **values):
    return Encoder(tokenizer, data_section(**values))


def test_tables_and_lists_are_taken_as_they_are(tokenizer):
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


def test_without_targets_all_is_learned(tokenizer):
    found = encoder(tokenizer, format="tokens").encode(pa.table({"input_ids": [[5, 6]]}), "s")
    assert found.targets.tolist() == [1, 1] and found.tokens.dtype == np.int32


@pytest.mark.parametrize(
    ("table", "what"),
    [
        (
            pa.table({"input_ids": [[5], [10**6]]}),
            r"s row 8: input_ids has 1000000; 0 to \d+ are allowed; the shard was written",
        ),
        (pa.table({"input_ids": [[5], [-1]]}), r"s row 8: input_ids has -1"),
        (
            pa.table({"input_ids": [[5, 6], [7]], "targets": [[1, 1], [1, 1]]}),
            "s row 8: input_ids and targets differ in length",
        ),
        (
            pa.table({"input_ids": [["a"]]}),
            "s: the column input_ids is list<.*string>; lists of whole numbers are needed",
        ),
        (pa.table({"input_ids": [5]}), "s: the column input_ids is int64; lists of whole numbers"),
        (
            pa.table({"input_ids": [[5], None]}),
            "s row 8: has no input_ids, as other rows have; shards of tokens are used whole",
        ),
        (
            pa.table({"input_ids": [[5], [6, None]]}),
            r"s row 8: input_ids has a gap \(null\); a number for each token is needed",
        ),
        (pa.table({"input_ids": [[5], [2**32 + 5]]}), "s row 8: input_ids has 4294967301; 0 to"),
        (
            pa.table({"input_ids": [[5], [6, 7]], "targets": [[1], [1, -100]]}),
            "s row 8: targets has -100; 0 to 1 are allowed",
        ),
        (
            pa.table({"input_ids": [[5], [6]], "targets": [[1], [2]]}),
            "s row 8: targets has 2; 0 to 1 are allowed",
        ),
        (
            [{"input_ids": [5]}, {"input_ids": [6], "targets": [0]}],
            "s row 7: has no targets, as other rows have",
        ),
        (
            [{"targets": [0]}, {"input_ids": [6], "targets": [0]}],
            "s row 7: has no input_ids, as other rows have",
        ),
        ([{"input_ids": [5]}, {"input_ids": "x"}], "s: its tokens are not lists of whole numbers"),
        ([{"input_ids": [2**70]}], "s: its tokens are not lists of whole numbers"),
        (
            pa.table({"text": ["a"]}),
            "s: data.format=tokens, and there are the columns text; input_ids is needed",
        ),
        ([{"input_ids": [1]}, DataError("row 2: broken")], "row 2: broken"),
    ],
)
def test_what_is_refused(tokenizer, table, what):
    with pytest.raises(DataError, match=what):
        encoder(tokenizer, format="tokens").encode(table, "s", 7)


def test_columns_are_those_of_any_row(tokenizer):
    with pytest.raises(DataError, match="s row 1: has no input_ids, as other rows have"):
        encoder(tokenizer).encode([{"text": "a"}, {"input_ids": [6]}], "s")


def test_bad_rows_are_not_skipped_and_the_error_says_so(tokenizer):
    with pytest.raises(
        DataError,
        match=r"row 2: broken \(shards of tokens are used whole or not at all; write the shard",
    ):
        encoder(tokenizer, bad_rows="skip").encode(
            [{"input_ids": [1]}, DataError("row 2: broken")], "s"
        )
