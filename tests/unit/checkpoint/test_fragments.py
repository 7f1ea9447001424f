"""Any partition is read as any other partition; gaps and invalid headers are rejected."""

from __future__ import annotations

import json
from typing import NamedTuple
from uuid import uuid4

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from dist_ft.checkpoint import file_layout, fragments, manifest
from dist_ft.checkpoint.checked_reads import CheckedFiles
from dist_ft.checkpoint.file_layout import FileLayout
from dist_ft.checkpoint.fragments import FragmentReader, FragmentRequest, read_index
from dist_ft.checkpoint.manifest import FileEntry
from dist_ft.core.errors import CheckpointError
from dist_ft.engine.base import StateSlice
from dist_ft.storage.filesystem import Store


class Fragment(NamedTuple):
    """Values (n,) of elements [offset, offset + n) of state `key` of the flattened parameter `name`."""

    name: str
    key: str
    offset: int
    values: np.ndarray


def slice_of(fragment: Fragment) -> StateSlice:
    """Return a slice that holds a fragment."""
    values = torch.from_numpy(fragment.values)
    return StateSlice(
        fragment.name,
        fragment.key,
        fragment.offset,
        len(values),
        True,
        lambda: values,
        values.copy_,
    )


class CountingStore(Store):
    """A store that counts its reads."""

    reads = 0

    def read_into(self, path, start, memory):
        self.reads += 1
        return super().read_into(path, start, memory)


def write(
    store: Store, *writers: list[Fragment], entry=manifest.file_entry_in_blocks
) -> CheckedFiles:
    """Write each writer's fragments and return the files."""
    files: list[FileEntry] = []
    for rank, own in enumerate(writers):
        slices = [slice_of(fragment) for fragment in own]
        for part, layout in enumerate(file_layout.plan_files(slices)):
            content = content_of(layout, slices)
            assert (
                len(content) == layout.num_bytes and b"".join(layout.as_buffers(slices)) == content
            )
            store.write(f"{rank}-{part}", content)
            files.append(entry(f"{rank}-{part}", memoryview(content)))
    return CheckedFiles(store, files)


def content_of(layout: FileLayout, slices: list[StateSlice]) -> bytes:
    """Return the content of a planned file."""
    content = torch.empty(layout.num_bytes, dtype=torch.uint8)
    layout.copy_into(slices, content)
    return content.numpy().tobytes()


def memory() -> CountingStore:
    return CountingStore(f"memory://{uuid4().hex}")


def cuts(draw, numel: int) -> list[tuple[int, int]]:
    """Draw a partition of range(numel) into [start, stop) parts, some empty."""
    inner = sorted(draw(st.lists(st.integers(0, numel), max_size=4)))
    return list(zip([0, *inner], [*inner, numel], strict=True))


@st.composite
def worlds(draw):
    """Draw parameters, how N writers hold them, and how M readers do."""
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    names = [f"layer.{i}:w" for i in range(len(sizes))]  # ':' may be part of a name
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    truth = {
        (name, key): rng.random(size).astype(np.float32)
        for name, size in zip(names, sizes, strict=True)
        for key in ("param", "exp_avg")
    }
    num_writers, num_readers = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    writers: list[list[Fragment]] = [[] for _ in range(num_writers)]
    readers: list[list[tuple[str, str, int, int]]] = [[] for _ in range(num_readers)]
    for (name, key), values in truth.items():
        for start, stop in cuts(draw, len(values)):
            writers[draw(st.integers(0, num_writers - 1))].append(
                Fragment(name, key, start, values[start:stop])
            )
        for start, stop in cuts(draw, len(values)):
            readers[draw(st.integers(0, num_readers - 1))].append((name, key, start, stop - start))
    return truth, writers, readers


@settings(max_examples=60, deadline=None)
@given(
    worlds(),
    st.sampled_from([40, 256 * 2**20]),
    st.sampled_from([0, 2**20]),
    st.sampled_from([7, 64, 2**20]),
    st.sampled_from([manifest.file_entry, manifest.file_entry_in_blocks]),
)
def test_any_partition_is_read_as_any_other_partition(
    world, part_bytes, gap_bytes, block_bytes, entry
):
    truth, writers, readers = world
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fragments, "MAX_FILE_BYTES", part_bytes)
        patch.setattr(fragments, "MAX_GAP_BYTES", gap_bytes)
        patch.setattr(fragments, "MAX_REQUEST_BYTES", 3 * block_bytes)
        patch.setattr(manifest, "BLOCK_BYTES", block_bytes)
        store = memory()
        files = write(store, *writers, entry=entry)
        got = {where: np.full_like(values, np.nan) for where, values in truth.items()}
        for own in readers:
            requests = [FragmentRequest(i, *parts) for i, parts in enumerate(own)]
            answers = [
                (index, values.copy())
                for index, values in FragmentReader(files).read_many(requests)
            ]
            assert sorted(index for index, _ in answers) == list(range(len(own)))
            for index, values in answers:
                name, key, start, numel = own[index]
                assert len(values) == numel
                got[name, key][start : start + numel] = values
    for where, values in truth.items():
        assert np.array_equal(got[where], values)


def test_overlapping_fragments_are_read_once():
    values = np.arange(10, dtype=np.float32)
    store = memory()
    files = write(
        store,
        [Fragment("w", "param", 0, values[:7])],
        [Fragment("w", "param", 3, values[3:])],
        [Fragment("w", "param", 0, values)],
    )
    assert FragmentReader(files).read("w", "param", 2, 7).tolist() == values[2:9].tolist()


@pytest.mark.parametrize(
    ("held", "ask", "first"),
    [
        ([(0, 4), (6, 10)], (0, 10), 4),
        ([(0, 4)], (2, 5), 4),
        ([(5, 10)], (0, 10), 0),
        ([], (0, 1), 0),
    ],
)
def test_missing_elements_raise_an_error_that_names_the_parameter(held, ask, first):
    values, store = np.arange(10, dtype=np.float32), memory()
    files = write(
        store, [Fragment("h.weight", "exp_avg", start, values[start:stop]) for start, stop in held]
    )
    with pytest.raises(CheckpointError) as caught:
        FragmentReader(files).read("h.weight", "exp_avg", ask[0], ask[1] - ask[0])
    assert str(caught.value) == (
        f"{store.url}: elements from {first} of exp_avg of h.weight are not in this checkpoint. It "
        "belongs to another model or optimizer. Check model.path and optimizer.name."
    )


def test_neighboring_ranges_are_read_in_one_request():
    store, values = memory(), np.arange(1000, dtype=np.float32)
    files = write(store, [Fragment(f"w{i}", "param", 0, values) for i in range(50)])
    reader = FragmentReader(files)
    reader.keys()
    assert store.reads == 1
    requests = [FragmentRequest(i, f"w{i}", "param", 100, 10) for i in range(50)]
    assert all(np.array_equal(got, values[100:110]) for _, got in reader.read_many(requests))
    assert store.reads == 2


def test_distant_ranges_are_read_separately(monkeypatch):
    monkeypatch.setattr(fragments, "MAX_GAP_BYTES", 100)
    monkeypatch.setattr(manifest, "BLOCK_BYTES", 200)
    store, values = memory(), np.arange(1000, dtype=np.float32)
    reader = FragmentReader(write(store, [Fragment("w", "param", 0, values)]))
    reader.keys()
    requests = [
        FragmentRequest(0, "w", "param", 0, 5),
        FragmentRequest(1, "w", "param", 900, 5),
        FragmentRequest(2, "w", "param", 10, 5),
    ]
    assert sorted((index, values[0]) for index, values in reader.read_many(requests)) == [
        (0, 0),
        (1, 900),
        (2, 10),
    ]
    assert store.reads == 1 + 2


def test_files_and_requests_stay_small(monkeypatch):
    """One large parameter is split, so that neither writer nor reader needs its memory twice."""
    monkeypatch.setattr(fragments, "MAX_FILE_BYTES", 400)
    store, values = memory(), np.arange(1050, dtype=np.float32)
    files = write(store, [Fragment("w", "param", 7, values)])
    assert len(files.paths) == 11 and max(files.num_bytes(path) for path in files.paths) < 400 + 200
    assert np.array_equal(FragmentReader(files).read("w", "param", 7, 1050), values)


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        "float64",
        "float16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "bool",
    ],
)
def test_every_dtype_survives_a_round_trip(dtype):
    values, store = np.array([0, 1, 1, 0, 1]).astype(dtype), memory()
    got = FragmentReader(write(store, [Fragment("b", "buffer", 0, values)])).read(
        "b", "buffer", 0, 5
    )
    assert got.dtype == values.dtype and np.array_equal(got, values)


def index_of(store: Store, content: bytes) -> fragments.FragmentIndex:
    """Return the index of a file with this content and correct checksums."""
    store.write("f", content)
    return read_index(
        CheckedFiles(store, [manifest.file_entry_in_blocks("f", memoryview(content))]), ["f"]
    )


def hostile(header: bytes, length: int | None = None, body: bytes = b"\0" * 8) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


def entry(label: str = "param:0:w", **changes) -> bytes:
    return json.dumps(
        {label: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}
    ).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header of 0 bytes in a file of 0"),
        (b"1234", "header of 0 bytes in a file of 4"),
        (hostile(entry(), 2**63), f"header of {2**63} bytes in a file of"),
        (hostile(entry(), 10**6), "header of 1000000 bytes in a file of"),
        (hostile(entry(), 0), "header of 0 bytes"),
        (hostile(entry(data_offsets=[0, 16], shape=[4])), "param:0:w is outside the file"),
        (hostile(entry(data_offsets=[-8, 0])), "param:0:w is outside the file"),
        (hostile(entry(data_offsets=[8, 0])), "param:0:w is outside the file"),
        (hostile(entry(shape=[10**12])), "param:0:w is outside the file"),
        (hostile(entry(dtype="F64")), "param:0:w is outside the file"),
        (hostile(entry(dtype="PICKLE")), "KeyError: 'PICKLE'"),
        (hostile(entry(dtype=["F32"])), "unhashable"),
        (hostile(entry(shape=[1, 2])), "too many values"),
        (hostile(entry(shape=[2.0])), "offsets and sizes must be whole numbers from 0"),
        (hostile(entry(data_offsets=[0.0, 8.0])), "offsets and sizes must be whole numbers from 0"),
        (hostile(entry("param:-5:w")), "offsets and sizes must be whole numbers from 0"),
        (hostile(entry("param:x:w")), "offsets and sizes must be whole numbers from 0"),
        (hostile(entry("param")), "not enough values"),
        (hostile(b'{"param:0:w": 5}'), "not subscriptable"),
        (hostile(b"[1, 2]"), "dictionary"),
        (hostile(b'{"a'), "Unterminated string"),
        (hostile(b'{"\xff": 1}'), "can't decode byte 0xff"),
        (hostile(b"[" * 100_000), "nested more than 100 deep"),
        (b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.", "header of"),
    ],
)
def test_fault_23_an_invalid_header_is_rejected(content, message):
    store = memory()
    with pytest.raises(CheckpointError) as caught:
        index_of(store, content)
    text = str(caught.value)
    assert text.startswith(f"{store.url}/f: not a valid fragment file (") and message in text
    assert text.endswith("); it will not be loaded")


def test_metadata_is_ignored():
    store, content = memory(), save({"param:3:w": np.zeros(2, np.float32)}, {"made": "by hand"})
    found = index_of(store, content)
    assert {where: (piece.offset, piece.numel) for where, (piece,) in found.items()} == {
        ("w", "param"): (3, 2)
    }


def test_fault_23_a_dtype_that_cannot_be_stored_is_rejected():
    values = torch.zeros(3, dtype=torch.complex64)
    with pytest.raises(
        CheckpointError,
        match=r"^buffer of freqs: values of type torch.complex64 cannot be saved\. Allowed: "
        r"torch.float32, .*torch.bfloat16\. Convert them to one of these types\.$",
    ):
        file_layout.plan_files(
            [StateSlice("freqs", "buffer", 0, 3, True, lambda: values, values.copy_)]
        )


def test_files_are_plain_safetensors_with_aligned_values(tmp_path):
    """The library reads a file of mixed widths; bfloat16 is stored as float32."""
    from safetensors.torch import load

    held = {
        "a": torch.arange(3, dtype=torch.int8),
        "b": torch.rand(5).bfloat16(),
        "c": torch.rand(2, dtype=torch.float64),
        "d": torch.tensor([True, False, True]),
        "e": torch.zeros(0),
    }
    slices = [
        StateSlice(name, "buffer", 7, len(values), True, values.clone, values.copy_)
        for name, values in held.items()
    ]
    (layout,) = file_layout.plan_files(slices)
    got = load(content_of(layout, slices))
    assert b"".join(layout.as_buffers(slices)) == content_of(layout, slices)
    assert got.keys() == {f"buffer:7:{name}" for name in held}
    assert all(
        torch.equal(got[f"buffer:7:{name}"], values.float() if name == "b" else values)
        for name, values in held.items()
    )
