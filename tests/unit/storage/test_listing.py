"""Listings: patterns, and folders that cannot be listed are an error, not empty."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dist_ft.storage import listing

FILES = [
    "/d/a.jsonl",
    "/d/b.jsonl",
    "/d/c.txt",
    "/d/x/a.jsonl",
    "/d/x/y/a.jsonl",
    "/d/odd[1].txt",
    "/d/.tmp-a.jsonl",
]


class Broken(MemoryFileSystem):
    """A filesystem whose listings of some folders fail."""

    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False
    broken: tuple[str, ...] = ()

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        if path.rstrip("/") in self.broken:
            raise OSError("Internal Error")
        return super().ls(path, detail, **kwargs)


@pytest.fixture
def fs() -> Broken:
    found = Broken()
    found.store.clear()
    for name in FILES:
        found.pipe_file(name, b"x")
    return found


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("/d/*.jsonl", ["/d/a.jsonl", "/d/b.jsonl"]),
        ("/d/[bc].*", ["/d/b.jsonl", "/d/c.txt"]),
        ("/d/?.jsonl", ["/d/a.jsonl", "/d/b.jsonl"]),
        ("/d/*/a.jsonl", ["/d/x/a.jsonl"]),
        ("/d/*/y/*", ["/d/x/y/a.jsonl"]),
        ("/*/x/a.jsonl", ["/d/x/a.jsonl"]),
        (
            "/d/**",
            [
                "/d/a.jsonl",
                "/d/b.jsonl",
                "/d/c.txt",
                "/d/odd[1].txt",
                "/d/x/a.jsonl",
                "/d/x/y/a.jsonl",
            ],
        ),
        ("/d/**/a.jsonl", ["/d/a.jsonl", "/d/x/a.jsonl", "/d/x/y/a.jsonl"]),
        ("/d/odd[1].txt", ["/d/odd[1].txt"]),
        ("/d/a.jsonl", ["/d/a.jsonl"]),
        ("/d/x", ["/d/x/a.jsonl", "/d/x/y/a.jsonl"]),
        ("/d/a.jsonl/*", []),
        ("/d/none*", []),
        ("/none/*", []),
        ("/none", []),
    ],
)
def test_matching_files_of_a_pattern(fs, pattern, expected):
    assert list(listing.matching(fs, pattern)) == expected


@pytest.mark.parametrize(
    ("broken", "pattern"),
    [
        ("/d", "/d/*.jsonl"),
        ("/d", "/d/*/a.jsonl"),
        ("/d/x", "/d/*/a.jsonl"),
        ("/d", "/d"),
        ("/d/x", "/d"),
        ("/d/x/y", "/d/**"),
    ],
)
def test_a_folder_that_cannot_be_listed_is_an_error(fs, broken, pattern):
    fs.broken = (broken,)
    with pytest.raises(OSError, match="Internal Error"):
        listing.matching(fs, pattern)


def test_names_of_a_folder(fs):
    assert listing.names(fs, "/d") == ["a.jsonl", "b.jsonl", "c.txt", "odd[1].txt", "x"]
    assert listing.names(fs, "/none") == listing.names(fs, "/d/a.jsonl") == []
    assert listing.exists(fs, "/d/x") and not listing.exists(fs, "/d/z")
