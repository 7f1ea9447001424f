"""One file by its path: relative, absolute, in the root folder, or behind a URL."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_ft.storage.single_files import locate_file, read_file, write_file


def test_a_file_is_found_by_each_kind_of_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for path in (
        "here.txt",
        "new/folder/there.txt",
        f"{tmp_path}/absolute.txt",
        "memory://m/x.txt",
    ):
        write_file(path, path.encode())
        assert read_file(path) == path.encode()
    assert (tmp_path / "here.txt").read_text() == "here.txt"


def test_a_file_in_the_root_folder_is_not_looked_up_in_the_current_one():
    store, name = locate_file("/hosts.txt")
    assert (store.full_url(), name) == ("/", "hosts.txt")
