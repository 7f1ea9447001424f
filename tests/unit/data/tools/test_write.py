"""The writer's own refusals (what it writes is read back in test_source)."""

import io

import pyarrow.parquet
import pytest

from dist_ft.core.errors import DataError
from dist_ft.data.tools.write import as_parquet, write_jsonl, write_parquet
from dist_ft.storage.filesystem import Store


@pytest.mark.parametrize("write", [write_parquet, write_jsonl])
def test_refusals(tmp_path, write):
    store = Store(str(tmp_path))
    with pytest.raises(DataError, match="there is no row to write"):
        write([], store, "train", 4)
    with pytest.raises(DataError, match="rows_per_shard=0: is too small"):
        write([{"a": 1}], store, "train", 0)
    assert store.walk() == []


def test_columns_that_only_later_rows_have_are_kept():
    rows = [{"text": "a"}, {"text": "b", "source": "web"}]
    found = pyarrow.parquet.read_table(io.BytesIO(as_parquet(rows))).to_pylist()
    assert found == [{"text": "a", "source": None}, rows[1]]
