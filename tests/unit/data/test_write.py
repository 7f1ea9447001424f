"""The writer's own refusals (what it writes is read back in test_source)."""

import pytest

from dist_ft.data.write import write_jsonl, write_parquet
from dist_ft.errors import DataError
from dist_ft.storage import Store


@pytest.mark.parametrize("write", [write_parquet, write_jsonl])
def test_refusals(tmp_path, write):
    store = Store(str(tmp_path))
    with pytest.raises(DataError, match="there is no row to write"):
        write([], store, "train", 4)
    with pytest.raises(DataError, match="rows_per_shard=0: is too small"):
        write([{"a": 1}], store, "train", 0)
    assert store.walk() == []
