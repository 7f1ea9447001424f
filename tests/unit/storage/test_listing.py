"""Listings: what patterns mean, and that a folder which can not be listed is never taken for an empty one."""

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


class Unwell(MemoryFileSystem):
    """A filesystem of its own whose listings of some folders fail."""

    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False
    unwell: tuple[str, ...] = ()

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        if path.rstrip("/") in self.unwell:
            raise OSError("Internal Error")
        return super().ls(path, detail, **kwargs)


@pytest.fixture
def fs() -> Unwell:
    found = Unwell()
    found.store.clear()
    for name in FILES:
        found.pipe_file(name, b"x")
    return found


@pytest.mark.parametrize(
    ("pattern", "wanted"),
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
def test_what_matches(fs, pattern, wanted):
    assert list(listing.matching(fs, pattern)) == wanted


@pytest.mark.parametrize(
    ("unwell", "pattern"),
    [
        ("/d", "/d/*.jsonl"),
        ("/d", "/d/*/a.jsonl"),
        ("/d/x", "/d/*/a.jsonl"),
        ("/d", "/d"),
        ("/d/x", "/d"),
        ("/d/x/y", "/d/**"),
    ],
)
def test_a_folder_that_can_not_be_listed_is_not_taken_for_empty(fs, unwell, pattern):
    fs.unwell = (unwell,)
    with pytest.raises(OSError, match="Internal Error"):
        listing.matching(fs, pattern)


def test_names_are_those_of_a_folder(fs):
    assert listing.names(fs, "/d") == ["a.jsonl", "b.jsonl", "c.txt", "odd[1].txt", "x"]
    assert listing.names(fs, "/none") == listing.names(fs, "/d/a.jsonl") == []
    assert listing.exists(fs, "/d/x") and not listing.exists(fs, "/d/z")
