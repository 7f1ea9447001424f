"""What the writer refuses (test_discovery reads back what it writes)."""

import io

import pyarrow.parquet
import pytest

from dist_ft.core.errors import DataError
from dist_ft.data.tools.write import encode_parquet, write_jsonl, write_parquet
from dist_ft.storage.filesystem import Store


@pytest.mark.parametrize("write", [write_parquet, write_jsonl])
def test_bad_arguments_are_refused(tmp_path, write):
    store = Store(str(tmp_path))
    with pytest.raises(DataError, match="no rows to write"):
        write([], store, "train", 4)
    with pytest.raises(DataError, match="rows_per_shard=0: is too small"):
        write([{"a": 1}], store, "train", 0)
    assert store.walk() == []


def test_columns_of_later_rows_are_written():
    rows = [{"text": "a"}, {"text": "b", "source": "web"}]
    found = pyarrow.parquet.read_table(io.BytesIO(encode_parquet(rows))).to_pylist()
    assert found == [{"text": "a", "source": None}, rows[1]]
