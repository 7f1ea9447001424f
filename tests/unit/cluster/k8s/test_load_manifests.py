"""Manifests as they lie on disk."""

from __future__ import annotations

import pytest

from dist_ft.cluster.k8s import load_manifests
from dist_ft.core.errors import ConfigError

ONE = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n"


def names(*paths):
    return [document.name for document in load_manifests.read([str(path) for path in paths])]


def test_files_streams_lists_and_folders(tmp_path):
    (tmp_path / "b.yaml").write_text(f"---\n{ONE}---\n---\n{ONE.replace('a}', 'b}')}")
    (tmp_path / "a.yml").write_text("kind: List\nitems: [{kind: X, metadata: {name: c}}]\n")
    (tmp_path / "notes.txt").write_text("no manifest")
    assert names(tmp_path) == ["c", "a", "b"]
    assert names(tmp_path / "b.yaml") == ["a", "b"]


def test_a_folder_that_only_lists_files_needs_no_kustomize(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    (tmp_path / "kustomization.yaml").write_text("kind: Kustomization\nresources: [one.yaml]\n")
    (tmp_path / "one.yaml").write_text(ONE)
    (tmp_path / "other.yaml").write_text(ONE.replace("a}", "b}"))
    assert names(tmp_path) == ["a"], "what is not listed is not applied"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "no manifest in it"),
        ({"a.yaml": "# nothing\n"}, "no manifest in it"),
        ({"a.yaml": "a: 1\nb: [\n"}, "a.yaml line 3: not YAML"),
        (
            {"a.yaml": "kind: X\nkind: Y\n"},
            "a.yaml line 2: not YAML (the key 'kind' stands there twice); correct it",
        ),
        ({"a.yaml": "- 1\n"}, "a document that is no object but list"),
        (
            {"kustomization.yaml": "kind: Kustomization\nresources: [../base]\n"},
            "neither kubectl nor kustomize is here; install",
        ),
        (
            {"kustomization.yaml": "kind: Component\n"},
            "a kustomize component is nothing by itself; give an overlay",
        ),
    ],
)
def test_what_can_not_be_read_is_one_clear_line(tmp_path, monkeypatch, files, said):
    monkeypatch.setenv("PATH", "")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        names(tmp_path)
    assert said in caught.value.problems[0] and len(caught.value.problems) == 1


def test_all_that_can_not_be_read_is_told_at_once(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [\n")
    with pytest.raises(ConfigError) as caught:
        names(tmp_path / "a.yaml", tmp_path / "no.yaml")
    assert len(caught.value.problems) == 2
    assert caught.value.problems[1] == f"{tmp_path}/no.yaml: no such file or folder; check the path"


def test_what_kustomize_says_of_a_broken_folder_is_told(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "kubectl"
    tool.write_text("#!/bin/sh\necho first >&2; echo 'error: no base' >&2; exit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    (tmp_path / "kustomization.yaml").write_text("kind: Kustomization\nresources: [../base]\n")
    with pytest.raises(
        ConfigError, match=r"kubectl can not put it together \(error: no base\); correct it"
    ):
        names(tmp_path)
