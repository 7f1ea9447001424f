"""The peers of B5, run by the interpreter of their own environment: write their data, read it once.

    .peers/bin/python b5_peers.py write|read NAME S3_ENDPOINT FOLDER SAMPLES

The data of each peer is in the bucket, in its own format. `read` prints the bytes of tokens and the
seconds from the request of the first sample to the last sample. Imports nothing of dist_ft.
"""

from __future__ import annotations

import importlib
import io
import os
import shutil
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BUCKET, TOKENS, SHARD_SAMPLES = "bucket", 700, 4000
IMPORTS = {
    "mosaic": ("streaming", "boto3"),
    "litdata": ("litdata", "boto3"),
    "webdataset": ("webdataset",),
    "datasets": ("datasets", "s3fs", "pyarrow.parquet"),
}
"""Modules that each peer imports before its clock starts."""


def samples(count: int) -> Iterator[np.ndarray]:
    """Yield `count` samples of TOKENS token ids, int32."""
    for start in range(0, count, SHARD_SAMPLES):
        token_ids = np.random.default_rng(start).integers(
            4, 256, (min(SHARD_SAMPLES, count - start), TOKENS)
        )
        yield from token_ids.astype(np.int32)


def client(endpoint: str) -> Any:
    """Return an S3 client."""
    import boto3

    return boto3.client("s3", endpoint_url=endpoint)


def upload(endpoint: str, folder: Path, prefix: str) -> None:
    """Copy the files of a folder into the bucket."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client(endpoint).upload_file(
                str(path), BUCKET, f"{prefix}/{path.relative_to(folder).as_posix()}"
            )


def write_parquet(endpoint: str, folder: Path, count: int) -> None:
    """Write Parquet shards of one list column, for dist_ft and `datasets`."""
    import pyarrow as pa
    import pyarrow.parquet

    rows = list(samples(count))
    for shard in range(0, count, SHARD_SAMPLES):
        part = rows[shard : shard + SHARD_SAMPLES]
        offsets = np.arange(len(part) + 1, dtype=np.int64) * TOKENS
        column = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(part)))
        pyarrow.parquet.write_table(
            pa.table({"input_ids": column}),
            folder / f"{shard:08d}.parquet",
            compression="none",
            use_dictionary=False,
            row_group_size=1000,
        )


def without_torchvision() -> None:
    """Add empty torchvision modules, so that MosaicML Streaming can be imported without it.

    Only its image datasets use torchvision.
    """
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    names = {
        "torchvision": (),
        "torchvision.datasets": ("VisionDataset", "CIFAR10"),
        "torchvision.transforms": (),
        "torchvision.transforms.functional": ("to_tensor",),
    }
    for name, attributes in names.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        for attribute in attributes:
            setattr(module, attribute, type(attribute, (), {}))
        sys.modules[name] = module


def write_mosaic(endpoint: str, folder: Path, count: int) -> None:
    """Write MDS shards of MosaicML Streaming."""
    without_torchvision()
    from streaming import MDSWriter

    with MDSWriter(
        out=str(folder), columns={"tokens": f"ndarray:int32:{TOKENS}"}, size_limit=2**24
    ) as writer:
        for row in samples(count):
            writer.write({"tokens": row})


def _generate_samples(index: tuple[int, int]) -> Iterator[np.ndarray]:
    start, count = index
    token_ids = np.random.default_rng(start).integers(4, 256, (count, TOKENS))
    yield from token_ids.astype(np.int32)


def write_litdata(endpoint: str, folder: Path, count: int) -> None:
    """Write LitData's chunks."""
    from litdata import optimize

    parts = [(start, min(SHARD_SAMPLES, count - start)) for start in range(0, count, SHARD_SAMPLES)]
    optimize(
        fn=_generate_samples, inputs=parts, output_dir=str(folder), chunk_bytes=2**24, num_workers=1
    )


def write_webdataset(endpoint: str, folder: Path, count: int) -> None:
    """Write tar shards of .npy files."""
    rows = list(samples(count))
    for shard in range(0, count, SHARD_SAMPLES):
        with tarfile.open(folder / f"{shard:08d}.tar", "w") as tar:
            for number, row in enumerate(rows[shard : shard + SHARD_SAMPLES], shard):
                body = io.BytesIO()
                np.save(body, row)
                info = tarfile.TarInfo(f"{number:08d}.npy")
                info.size = body.tell()
                body.seek(0)
                tar.addfile(info, body)


def read_datasets(endpoint: str, folder: Path, count: int) -> Iterator[int]:
    """Read with Hugging Face datasets (streaming)."""
    from datasets import load_dataset

    files = f"s3://{BUCKET}/parquet/*.parquet"
    data = load_dataset(
        "parquet",
        data_files=files,
        split="train",
        streaming=True,
        storage_options={"endpoint_url": endpoint},
    ).with_format("numpy")
    for row in data:
        yield row["input_ids"].nbytes


def read_mosaic(endpoint: str, folder: Path, count: int) -> Iterator[int]:
    """Read with MosaicML Streaming."""
    from streaming import StreamingDataset

    os.environ["S3_ENDPOINT_URL"] = endpoint
    data = StreamingDataset(
        remote=f"s3://{BUCKET}/mosaic", local=str(folder / "local"), shuffle=False, batch_size=8
    )
    for row in data:
        yield row["tokens"].nbytes


def read_litdata(endpoint: str, folder: Path, count: int) -> Iterator[int]:
    """Read with LitData; its object store client needs `allow_http` for plain HTTP."""
    from litdata import StreamingDataset
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True

    data = StreamingDataset(
        f"s3://{BUCKET}/litdata",
        cache_dir=str(folder / "local"),
        shuffle=False,
        storage_options={"endpoint_url": endpoint},
    )
    for row in data:
        yield row.nbytes


def read_webdataset(endpoint: str, folder: Path, count: int) -> Iterator[int]:
    """Read with WebDataset over HTTP."""
    import webdataset

    urls = [
        f"pipe:curl -s -f {endpoint}/{BUCKET}/webdataset/{shard:08d}.tar"
        for shard in range(0, count, SHARD_SAMPLES)
    ]
    for row in webdataset.WebDataset(urls, shardshuffle=False).decode():
        yield row["npy"].nbytes


def main() -> None:
    """Write the data of a peer, or read it."""
    action, name, endpoint, parent, count = sys.argv[1:]
    folder = Path(parent) / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if action == "write":
        globals()[f"write_{name}"](endpoint, folder, int(count))
        upload(endpoint, folder, name)
        shutil.rmtree(folder)
        return
    if name == "mosaic":
        without_torchvision()
    for module in IMPORTS[name]:
        importlib.import_module(module)
    stream = globals()[f"read_{name}"](endpoint, folder, int(count))
    start_s = time.perf_counter()
    total = sum(stream)
    print(f"\nread {total} {time.perf_counter() - start_s}", flush=True)
    os._exit(0)  # some peers leave threads that would block the exit


if __name__ == "__main__":
    main()
