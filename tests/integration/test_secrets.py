"""Planted secrets are found nowhere: not in logs, the run's folder, its checkpoints, Ray's logs or what was sent along."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import yaml
from job_cluster import cluster

pytest.importorskip("aiohttp_cors", reason="needs ray[default] (the extra `cluster`)")
pytestmark = [pytest.mark.ray, pytest.mark.slow]
PLANTED = {
    "environment": "pl4nted-environment-7f3a",
    "url": "pl4nted-url-91bc",
    "override": "pl4nted-override-c2d4",
    "dotenv": "pl4nted-dotenv-55e0",
    "repository": "pl4nted-repository-08aa",
    "older run": "pl4nted-older-run-3b3b",
}


def holding(folder: Path, words: dict[str, bytes]) -> Iterator[str]:
    """Yield (file, kind of secret) for all below `folder`, inside zip archives too."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        contents = [path.read_bytes()]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                contents += [archive.read(name) for name in archive.namelist()]
        yield from (
            f"{path}: {kind}"
            for content in contents
            for kind, word in words.items()
            if word in content
        )


def test_planted_secrets_do_not_leak(tmp_path: Path) -> None:
    tiny.base(tmp_path)
    document = tiny.config(tmp_path, "quiet", workers=2, schedule={"epochs": None, "steps": 4})
    project = tmp_path / "project"
    for name, kind in (
        (".env", "dotenv"),
        (".git/config", "repository"),
        ("runs/old/notes", "older run"),
    ):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(PLANTED[kind])
    (project / "quiet.yaml").write_text(yaml.safe_dump(document))
    (project / "sent.txt").write_text("this-file-is-sent")
    outputs = []
    with cluster(MY_STORE_SECRET_KEY=PLANTED["environment"]) as there:
        secret = {"MY_STORE_SECRET_KEY": PLANTED["environment"]}
        for override in (
            f"storage.options.s3.secret={PLANTED['override']}",
            f"model.path=s3://u:{PLANTED['url']}@b/m",
        ):
            code, output = there.run(
                "submit", "quiet.yaml", override, "--package", cwd=project, **secret
            )
            outputs.append(output)
            assert code == 2, output[-2000:]
        code, output = there.run("submit", "quiet.yaml", "--package", cwd=project, **secret)
        outputs.append(output)
        assert code == 0, output[-3000:]
        outputs += [
            there.run("submit", "quiet.yaml", "--package", "--print", cwd=project, **secret)[1],
            there.run("jobs", "logs", "quiet", cwd=project, **secret)[1],
        ]
        words = {
            **{kind: word.encode() for kind, word in PLANTED.items()},
            "token": there.token.encode(),
        }
        assert not [kind for kind, word in words.items() if word.decode() in "".join(outputs)]
        assert not list(holding(tmp_path / "runs", words))
        assert not list(holding(there.folder / "ray", words)), (
            "Ray's logs, and what was sent as it lies on the nodes"
        )
        sent = list((there.folder / "ray").rglob("sent.txt"))
        assert sent, "the search saw what was sent"
        assert not [
            path
            for one in sent
            for path in one.parent.rglob("*")
            if path.name in (".env", ".git", "runs")
        ]
        assert list(holding(tmp_path, words)), "and the search finds planted words"
