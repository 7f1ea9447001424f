"""Manifests are read from files, folders and kustomize folders."""

from __future__ import annotations

import pytest

from dist_ft.cluster.k8s import load_manifests
from dist_ft.core.errors import ConfigError

ONE = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n"


def names(*paths):
    return [
        document.name for document in load_manifests.read_documents([str(path) for path in paths])
    ]


def test_files_streams_lists_and_folders_are_read(tmp_path):
    (tmp_path / "b.yaml").write_text(f"---\n{ONE}---\n---\n{ONE.replace('a}', 'b}')}")
    (tmp_path / "a.yml").write_text("kind: List\nitems: [{kind: X, metadata: {name: c}}]\n")
    (tmp_path / "notes.txt").write_text("no manifest")
    assert names(tmp_path) == ["c", "a", "b"]
    assert names(tmp_path / "b.yaml") == ["a", "b"]


def test_folder_that_only_lists_files_needs_no_kustomize(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    (tmp_path / "kustomization.yaml").write_text("kind: Kustomization\nresources: [one.yaml]\n")
    (tmp_path / "one.yaml").write_text(ONE)
    (tmp_path / "other.yaml").write_text(ONE.replace("a}", "b}"))
    assert names(tmp_path) == ["a"], "files that are not listed are not applied"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "contains no manifest"),
        ({"a.yaml": "# nothing\n"}, "contains no manifest"),
        ({"a.yaml": "a: 1\nb: [\n"}, "a.yaml line 3: is not valid YAML"),
        (
            {"a.yaml": "kind: X\nkind: Y\n"},
            "a.yaml line 2: duplicate key 'kind' (first in line 1). Each key is allowed once. Remove one",
        ),
        ({"a.yaml": "- 1\n"}, "a document is a list. A manifest must be a mapping"),
        (
            {"kustomization.yaml": "kind: Kustomization\nresources: [../base]\n"},
            "neither kubectl nor kustomize is installed. Install",
        ),
        (
            {"kustomization.yaml": "kind: Component\n"},
            "a kustomize component contains no manifests by itself. Check an overlay",
        ),
    ],
)
def test_unreadable_manifests_are_one_clear_line(tmp_path, monkeypatch, files, expected):
    monkeypatch.setenv("PATH", "")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        names(tmp_path)
    assert expected in caught.value.problems[0] and len(caught.value.problems) == 1


def test_all_unreadable_files_are_reported_at_once(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [\n")
    with pytest.raises(ConfigError) as caught:
        names(tmp_path / "a.yaml", tmp_path / "no.yaml")
    assert len(caught.value.problems) == 2
    assert (
        caught.value.problems[1] == f"{tmp_path}/no.yaml: no such file or folder. Check the path."
    )


def test_kustomize_errors_are_reported(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "kubectl"
    tool.write_text("#!/bin/sh\necho first >&2; echo 'error: no base' >&2; exit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    (tmp_path / "kustomization.yaml").write_text("kind: Kustomization\nresources: [../base]\n")
    with pytest.raises(
        ConfigError, match=r"kubectl cannot build it \(error: no base\)\. Correct it"
    ):
        names(tmp_path)
