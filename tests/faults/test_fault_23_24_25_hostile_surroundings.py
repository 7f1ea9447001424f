"""Faults 23, 24 and 25: malicious checkpoints, secrets, and locks that dead processes left."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import history
import pytest
import ranks
import tiny

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint import manifest as manifests
from dist_ft.config.load import load_config
from dist_ft.core.errors import CheckpointError
from dist_ft.runtime import local
from dist_ft.storage.filesystem import Store


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("hostile"), 40)


def document(base: Path, name: str, steps: int = 6) -> dict[str, Any]:
    return tiny.config(
        base,
        name,
        schedule={"epochs": None, "steps": steps},
        checkpoint={"every_steps": 3, "keep_last": 1},
    )


@pytest.fixture(scope="module")
def trained(base: Path) -> Path:
    local.run(load_config(document(base, "trained")))
    return base / "runs/trained"


class Bomb:
    """Code that unpickling would run."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._marker),)


def change_and_seal(folder: Path, change: Any) -> None:
    """Alter a manifest as an attacker who knows its format can, with valid checksums."""
    path = folder / manifests.NAME
    found = manifests.parse_manifest(path.read_bytes(), "it")
    raw = json.loads(found.model_dump_json())
    change(raw)
    body = json.dumps(raw, indent=1).encode()
    path.write_bytes(
        body.removesuffix(manifests._END)
        + manifests._CHECKSUM_FIELD
        + manifests.compute_checksum(body).encode()
        + b'"'
        + manifests._END
    )


def replace_content(folder: Path, content: bytes) -> Any:
    """Return a change that replaces a checkpoint's first file by `content`, with a matching
    manifest."""

    def change(raw: dict[str, Any]) -> None:
        first = raw["files"][0]
        (folder / first["path"]).write_bytes(content)
        first.update(
            manifests.file_entry_in_blocks(first["path"], memoryview(content)).model_dump()
        )

    return change


def rename_file(path: str) -> Any:
    return lambda raw: raw["files"][0].update(path=path)


def files(base: Path) -> list[Path]:
    """Return all files but the notes of attempts and their times."""
    return sorted(
        path.relative_to(base)
        for path in base.rglob("*")
        if not {"attempts", "time"} & set(path.parts)
    )


def header(entry: dict[str, Any]) -> bytes:
    text = json.dumps({"wte.weight::param::0": entry}).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("name", "attack"),
    [
        ("pickle", lambda folder, marker: replace_content(folder, pickle.dumps(Bomb(marker)))),
        ("path", lambda folder, marker: rename_file("../../../escaped")),
        ("absolute", lambda folder, marker: rename_file("/etc/passwd")),
        (
            "huge-header",
            lambda folder, marker: replace_content(folder, (2**62).to_bytes(8, "little") + b"{}"),
        ),
        (
            "huge-tensor",
            lambda folder, marker: replace_content(
                folder, header({"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]})
            ),
        ),
        (
            "dtype",
            lambda folder, marker: replace_content(
                folder, header({"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 8]}) + bytes(8)
            ),
        ),
        ("huge-file", lambda folder, marker: lambda raw: raw["files"][0].update(num_bytes=2**60)),
    ],
)
def test_fault_23_malicious_checkpoint_is_refused(
    base: Path, trained: Path, tmp_path: Path, name: str, attack: Any
) -> None:
    run, marker = base / "runs" / f"harm-{name}", tmp_path / "executed"
    shutil.copytree(trained, run)
    folder = next((run / "checkpoints").iterdir())
    change = attack(folder, marker)
    change_and_seal(folder, change)
    before = files(base)
    with pytest.raises(CheckpointError) as caught:
        local.run(load_config({**document(base, f"harm-{name}", 9)}))
    text = str(caught.value)
    assert "\n" not in text and "checkpoints" in text, text
    assert (
        not marker.exists()
        and not (base / "escaped").exists()
        and not (base / "runs/escaped").exists()
    )
    assert files(base) == before, "only the attempt and its time were written"


def test_fault_24_no_secret_reaches_files_or_output(
    base: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secrets = {
        "HF_TOKEN": "hf_abcdefghijklmnop",
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI+K7MDENG/bPxRfiCY",
        "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEXAMPLETOKEN",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    local.run(load_config(document(base, "secret")))
    output = "".join(capfd.readouterr())
    written = b"".join(
        path.read_bytes() for path in (base / "runs/secret").rglob("*") if path.is_file()
    )
    assert len(written) > 1000
    for value in secrets.values():
        assert value not in output and value.encode() not in written


def test_fault_25_start_does_not_wait_for_the_lock_of_a_dead_build(
    base: Path, tmp_path: Path
) -> None:
    """PyTorch's extension builder waits forever for a killed builder's lock file; nothing is
    built here."""
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    version = f"py{sys.version_info.major}{sys.version_info.minor}_cpu"
    for name in ["deepspeed_shm_comm", *ALL_OPS]:
        for folder in (tmp_path / version / name, tmp_path / name):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "lock").touch()
    config = tiny.config(base, "locked", workers=2, schedule={"epochs": None, "steps": 2})
    codes = ranks.run_ranks(
        2, [config], tmp_path / "ranks", timeout_s=120, env={"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    )
    ranks.require_ok(codes, tmp_path / "ranks")
    assert len(history.losses(base / "runs/locked")) == 2


def test_unaltered_copy_loads(trained: Path) -> None:
    """The tests above refuse the attack, not the copy."""
    store = Store(str(trained))
    for name in discovery.list_committed(store):
        assert discovery.load_manifest(store, name).progress.step == 6
