"""A real S3 server over HTTP on loopback (moto), for tests."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ports

BUCKET = "bucket"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing-testing",
    "AWS_SECRET_ACCESS_KEY": "testing-testing",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextmanager
def server(host: str = "127.0.0.1") -> Iterator[int]:
    """Yield the port of a new S3 server that has `BUCKET`."""
    port = ports.find_free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex((host, port)) == 0:
                    break
            assert process.poll() is None, "the S3 server ended"
            time.sleep(0.1)
        create_bucket(port, host=host)
        yield port
    finally:
        process.kill()
        process.wait()


def create_bucket(port: int, name: str = BUCKET, host: str = "127.0.0.1") -> None:
    """Create a bucket."""
    import boto3

    boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name="us-east-1",
        aws_access_key_id="testing-testing",
        aws_secret_access_key="testing-testing",
    ).create_bucket(Bucket=name)


def reset_options(options: dict[str, Any]) -> None:
    """Configure fsspec anew for this process: cached filesystem instances store their options."""
    import fsspec
    import s3fs

    from dist_ft.storage import filesystem

    fsspec.config.conf.clear()
    s3fs.S3FileSystem.clear_instance_cache()
    filesystem.configure(options)
