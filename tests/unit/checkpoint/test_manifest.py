"""A manifest is complete, of its own checkpoint and of a known version, or it is rejected."""

from __future__ import annotations

import json
import math
import pickle
from itertools import pairwise

import numpy as np
import pytest

from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.manifest import (
    FORMAT_VERSION,
    FileEntry,
    LedgerEntry,
    Manifest,
    NewerFormatError,
    Progress,
    TensorInfo,
)
from dist_ft.core.errors import CheckpointError


def make(**changes) -> Manifest:
    file = manifests.file_entry("rank-00000-0000.safetensors", b"content")
    return Manifest(
        **{
            "format_version": FORMAT_VERSION,
            "run": "r",
            "attempt": 2,
            "world_size": 3,
            "engine": "TorchEngine",
            "progress": Progress(step=7, optimizer_step=7, num_tokens=10, num_target_tokens=5),
            "tensors": {"w": TensorInfo(shape=(2, 3))},
            "aliases": {"head": "w"},
            "files": (file,),
            "ledger": (LedgerEntry(start=0, stop=7, file=file),),
            "evaluation": {"before": 1.5},
            **changes,
        }
    )


def altered(manifest: Manifest, change) -> bytes:
    """Return the manifest file with changed JSON and a correct checksum, as an attacker would."""
    values = json.loads(manifest.model_dump_json())
    change(values)
    body = json.dumps(values, indent=1).encode()
    return body[:-2] + b',\n "checksum": "' + manifests.compute_checksum(body).encode() + b'"\n}'


def test_round_trip():
    manifest = make()
    content = manifests.serialize_manifest(manifest)
    assert manifests.parse_manifest(content, "m") == manifest
    assert json.loads(content)["checksum"].startswith("xxh3_128:")


def test_each_block_has_a_checksum():
    content = memoryview(np.arange(1_050_000, dtype=np.uint32).tobytes())
    entry = manifests.file_entry_in_blocks("f", content)
    assert entry.block_bytes == 2**21 and len(entry.blocks) == 3 * 16
    for start, stop in ((0, 2**21), (2**21, 2**22), (2**21, len(content)), (0, len(content))):
        assert manifests.matches_checksum(entry, start, content[start:stop])
        assert not manifests.matches_checksum(entry, start, content[1:][start:stop])
    assert not manifests.matches_checksum(entry, 2**21, content[: 2**21]), (
        "as good, but of another place"
    )
    whole = manifests.file_entry("f", content)
    assert entry.checksum == whole.checksum
    cuts = [0, 0, 5, 2**20, 2**21, 2**21 + 1, 4_000_000, len(content)]
    assert manifests.file_entry_in_blocks("f", *(content[a:b] for a, b in pairwise(cuts))) == entry
    assert manifests.file_entry_in_blocks("f", memoryview(b"")).blocks == ""
    assert manifests.matches_checksum(whole, 0, content) and not manifests.matches_checksum(
        whole, 0, content[1:]
    )


@pytest.mark.parametrize(
    "changes", [{"blocks": "0" * 16}, {"blocks": "0" * 48, "block_bytes": 4}, {"block_bytes": 4}]
)
def test_fault_23_block_checksums_that_do_not_fit_the_length_are_rejected(changes):
    content = altered(make(), lambda values: values["files"][0].update(changes))
    with pytest.raises(
        CheckpointError,
        match=r"not a valid manifest \(files.0: .*block checksums do not fit its length",
    ):
        manifests.parse_manifest(content, "m")


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_survives_a_round_trip(loss):
    got = manifests.parse_manifest(
        manifests.serialize_manifest(make(evaluation={"before": loss})), "m"
    ).evaluation["before"]
    assert got == loss or (math.isnan(got) and math.isnan(loss))


def test_every_truncation_and_flipped_bit_is_detected():
    content = manifests.serialize_manifest(make())
    damaged = [content[:length] for length in range(len(content))]
    damaged += [
        content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in range(len(content))
    ]
    for damaged_content in damaged:
        with pytest.raises(CheckpointError) as caught:
            manifests.parse_manifest(damaged_content, "s3://b/manifest.json")
        assert str(caught.value) == (
            "s3://b/manifest.json: truncated or altered since it was written (its checksum "
            "differs); it will not be loaded"
        )


@pytest.mark.parametrize(
    "path", ["../x", "a/../../x", "/etc/passwd", "a//b", "./a", "", "C:x", "a\\..\\b", "s3://b/x"]
)
def test_fault_23_paths_out_of_the_folder_are_rejected(path):
    content = altered(make(), lambda values: values["files"][0].update(path=path))
    with pytest.raises(CheckpointError) as caught:
        manifests.parse_manifest(content, "m")
    assert str(caught.value) == (
        f"m: not a valid manifest (files.0.path: Value error, the path {path!r} leads out of the "
        "checkpoint); it will not be loaded"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: v["files"][0].update(checksum="md5:0"),
            "files.0.checksum: String should match pattern",
        ),
        (
            lambda v: v["files"][0].update(num_bytes=2**60),
            "files.0.num_bytes: Input should be less than",
        ),
        (
            lambda v: v["files"][0].update(num_bytes=-1),
            "files.0.num_bytes: Input should be greater than or equal to 0",
        ),
        (lambda v: v["ledger"][0]["file"].update(path="../x"), "ledger.0.file.path: Value error"),
        (
            lambda v: v["progress"].update(step=-1),
            "progress.step: Input should be greater than or equal to 0",
        ),
        (lambda v: v.update(attempt=-1), "attempt: Input should be greater than or equal to 0"),
        (lambda v: v.pop("files"), "files: Field required"),
    ],
)
def test_fault_23_an_invalid_manifest_is_rejected(change, message):
    with pytest.raises(
        CheckpointError, match=rf"m: not a valid manifest \({message}.*\); it will not be loaded"
    ):
        manifests.parse_manifest(altered(make(), change), "m")


def test_a_newer_version_raises_its_own_error():
    with pytest.raises(NewerFormatError) as caught:
        manifests.parse_manifest(manifests.serialize_manifest(make(format_version=99)), "m")
    assert str(pickle.loads(pickle.dumps(caught.value))) == (
        f"m: format_version=99 is newer than this dist_ft supports ({FORMAT_VERSION}). Update "
        "dist_ft."
    )


def test_checksum_and_entry():
    assert manifests.compute_checksum(b"x") != manifests.compute_checksum(b"y")
    assert manifests.file_entry("a/b", b"xyz") == FileEntry(
        path="a/b", num_bytes=3, checksum=manifests.compute_checksum(b"xyz")
    )


@pytest.mark.parametrize("place", [(0, 0), (7, 2), (10**9 - 1, 9999), (10**12, 12345)])
def test_folder_names(place):
    assert manifests.parse_folder(manifests.folder_name(*place)) == place


@pytest.mark.parametrize(
    "name",
    [
        "step-7-a2",
        "step-000000007-x0002",
        "step-000000007-a0002.tmp",
        "latest",
        "",
        "step-00000000²-a0002",
        "step-0000000007-a0002",
        "x-step-000000007-a0002",
    ],
)
def test_other_folder_names_are_not_checkpoints(name):
    assert manifests.parse_folder(name) is None


@pytest.mark.parametrize("shape", [[-2, 3], [2, -3], [-1, -6], [2**60, 2**60], ["2"], [2.5], None])
def test_shapes_that_no_tensor_has_are_rejected(shape):
    content = altered(make(), lambda values: values["tensors"]["w"].update(shape=shape))
    if shape == ["2"]:  # pydantic reads it as the number
        assert manifests.parse_manifest(content, "m").tensors["w"].shape == (2,)
        return
    with pytest.raises(CheckpointError, match=r"^m: not a valid manifest \(tensors.w.shape"):
        manifests.parse_manifest(content, "m")
