"""Downloads happen once per node: requests to an S3 server, damaged copies, a local hub."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import s3

from dist_ft.core.errors import ModelError
from dist_ft.model.loading.download import MARKER, fetch_model
from dist_ft.storage import filesystem
from dist_ft.storage.filesystem import Store

FILES = {
    "config.json": b'{"model_type": "gpt2"}',
    "model-00001.safetensors": b"w" * 100_000,
    "model-00002.safetensors": b"v" * 50_000,
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"never",
}
PROGRAM = (
    "import json, sys\nfrom dist_ft.storage import filesystem\nfrom dist_ft.model.loading.download "
    "import "
    "fetch_model\nfilesystem.configure(json.loads(sys.argv[1]))\nprint(fetch_model(sys.argv[2], "
    "cache_dir=sys.argv[3]))"
)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Yield (options, file the server writes its requests to) with a model in a bucket."""
    import boto3
    import ports

    path, port = tmp_path_factory.mktemp("s3") / "log", ports.find_free_port()
    before = {name: os.environ.get(name) for name in s3.CREDENTIALS}
    os.environ.update(s3.CREDENTIALS)
    with open(path, "w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=file,
            stderr=file,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
        for tries in range(300):
            try:
                client.create_bucket(Bucket=s3.BUCKET)
                break
            except Exception:
                assert tries < 299 and server.poll() is None
                import time

                time.sleep(0.1)
        for name, content in FILES.items():
            client.put_object(Bucket=s3.BUCKET, Key=f"m/{name}", Body=content)
        yield {"s3": {"endpoint_url": url}}, path
    finally:
        server.kill()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def requests(path: Path, start: int) -> list[str]:
    return re.findall(r'"((?:GET|HEAD) /bucket\S*)', path.read_text()[start:])


def test_four_processes_of_a_node_download_once_and_a_restart_not_at_all(log, tmp_path):
    options, path = log
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        json.dumps(options),
        f"s3://{s3.BUCKET}/m",
        str(tmp_path),
    ]
    for num_expected in (3 + 1, 0):  # config, two of weights, tokenizer
        start = path.stat().st_size
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
        folders = {process.communicate(timeout=200)[0] for process in running}
        assert len(folders) == 1 and all(process.returncode == 0 for process in running)
        sent = requests(path, start)
        print(sent)
        assert len([one for one in sent if one.startswith("GET /bucket/m/")]) == num_expected
        assert num_expected or not sent, "a restart sends no request to the store"
    folder = Path(folders.pop().strip())
    assert {each.name: each.read_bytes() for each in folder.iterdir() if each.name != MARKER} == {
        name: content for name, content in FILES.items() if not name.endswith(".bin")
    }


def test_only_the_damaged_file_is_downloaded_again(log, tmp_path):
    options, path = log
    s3.reset_options(options)
    folder = Path(fetch_model(f"s3://{s3.BUCKET}/m", cache_dir=str(tmp_path)))
    for content in (b"w" * 99_999 + b"x", b"short"):
        (folder / "model-00001.safetensors").write_bytes(content)
        start = path.stat().st_size
        fetch_model(f"s3://{s3.BUCKET}/m", cache_dir=str(tmp_path))
        assert (folder / "model-00001.safetensors").read_bytes() == FILES["model-00001.safetensors"]
        assert [one for one in requests(path, start) if one.startswith("GET /bucket/m/")] == [
            "GET /bucket/m/model-00001.safetensors"
        ]
    os.utime(folder / "config.json")  # touched, not changed
    start = path.stat().st_size
    fetch_model(f"s3://{s3.BUCKET}/m", cache_dir=str(tmp_path))
    assert requests(path, start) == []


def test_weights_are_downloaded_only_when_requested(log, tmp_path):
    options, path = log
    s3.reset_options(options)
    folder = Path(fetch_model(f"s3://{s3.BUCKET}/m", cache_dir=str(tmp_path), weights=False))
    assert sorted(os.listdir(folder)) == [MARKER, "config.json", "tokenizer.json"]
    start = path.stat().st_size
    assert fetch_model(f"s3://{s3.BUCKET}/m", cache_dir=str(tmp_path)) == str(folder)
    assert [one for one in requests(path, start) if one.startswith("GET /bucket/m/")] == [
        f"GET /bucket/m/model-0000{number}.safetensors" for number in (1, 2)
    ]


def test_download_that_differs_from_the_store_raises(log, tmp_path, monkeypatch):
    options, _ = log
    s3.reset_options(options)
    real = Store._get

    def damaged(self, path, local):
        real(self, path, local)
        if path.endswith("00002.safetensors"):
            Path(local).write_bytes(b"u" * 50_000)

    monkeypatch.setattr(Store, "_get", damaged)
    with pytest.raises(
        ModelError,
        match=r"model-00002.safetensors: the downloaded file is not the one the store describes "
        r"\(50000 bytes",
    ):
        fetch_model(f"s3://{s3.BUCKET}/m", cache_dir=str(tmp_path))
    monkeypatch.undo()
    assert (
        Path(
            fetch_model(f"s3://{s3.BUCKET}/m", cache_dir=str(tmp_path)), "model-00002.safetensors"
        ).read_bytes()
        == b"v" * 50_000
    )


def teardown_module():
    filesystem.forget()


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of a hub that `snapshot_download` needs."""

    commit, received = "c" * 40, list[str]()

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.received.append(f"{self.command} {self.path}")
        name = self.path.split("?")[0].split("/")[-1]
        if "/tree/" in self.path:
            body = json.dumps(
                [
                    {"type": "file", "path": one, "size": len(content), "oid": "0" * 40}
                    for one, content in FILES.items()
                ]
            ).encode()
        elif self.path.startswith("/api/models/"):
            body = json.dumps(
                {
                    "id": "org/m",
                    "sha": self.commit,
                    "siblings": [{"rfilename": one} for one in FILES],
                }
            ).encode()
        elif name in FILES:
            body = FILES[name]
        else:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def test_hub_is_requested_once_per_node_and_damage_is_repaired(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", PROGRAM, "{}", "org/m", str(tmp_path / "cache")]

    def storm(count):
        Hub.received.clear()
        running = [
            subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
            )
            for _ in range(count)
        ]
        folders = {process.communicate(timeout=200)[0].strip() for process in running}
        assert len(folders) == 1 and all(process.returncode == 0 for process in running)
        return Path(folders.pop()), [
            one for one in Hub.received if one.startswith("GET /org/m/resolve/")
        ]

    try:
        folder, downloads = storm(3)
        assert len(downloads) == len(FILES) - 1 and not any(".bin" in one for one in downloads)
        assert storm(3)[1] == [] and Hub.received == [], "a restart sends no request to the hub"
        blob = (folder / "model-00002.safetensors").resolve()
        blob.write_bytes(b"v" * 49_999 + b"x")
        folder, downloads = storm(1)
        assert (folder / "model-00002.safetensors").read_bytes() == FILES[
            "model-00002.safetensors"
        ] and downloads
    finally:
        server.shutdown()


AS_USER = (
    "import filelock, json, os, pwd, sys, xxhash\nfrom dist_ft.storage import filesystem\n"
    "from dist_ft.model.loading.download import fetch_model\nfrom dist_ft.core.errors import DistFtError\n"
    "options, url, cache, user, group, mask = sys.argv[1:]\n"
    "filesystem.configure(json.loads(options))\nfilesystem.Store(url).list()  # imports what it needs\n"
    "os.setgroups([])\nos.setgid(int(group))\nos.setuid(int(user))\nos.umask(int(mask, 8))\n"
    "os.environ['HOME'] = '/nonexistent'\n"
    "try:\n    print(fetch_model(url, None, cache))\n"
    "except DistFtError as error:\n    print(f'refused: {error}')\n"
)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users")
def test_cache_of_a_group_works_for_two_users_and_only_if_it_is_named(log):
    """An administrator's folder: setgid, for a group; the second user finds the first one's model."""
    options, path = log
    group = 4300

    def fetch(cache: str, user: int, **variables: str) -> str:
        return subprocess.run(
            [
                *(sys.executable, "-c", AS_USER, json.dumps(options), f"s3://{s3.BUCKET}/m"),
                *(cache, str(user), str(group), "002"),
            ],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        cache = f"{folder}/cache"
        os.mkdir(cache)
        os.chown(cache, 0, group)
        os.chmod(cache, 0o2775)

        # Root owns it and its group may write: safe. But the part of the first user is his own.
        first = fetch(cache, 4301)
        assert first.startswith(f"{cache}/models/"), first
        assert "models belongs to user 4301" in fetch(cache, 4302)

        shared = f"{folder}/shared"
        os.mkdir(shared)
        os.chown(shared, 4999, group)
        os.chmod(shared, 0o2775)
        assert "belongs to user 4999" in fetch(shared, 4301)
        first = fetch(shared, 4301, DIST_FT_SHARED_FOLDERS=shared)
        start = path.stat().st_size
        assert fetch(shared, 4302, DIST_FT_SHARED_FOLDERS=shared) == first
        assert not [one for one in requests(path, start) if one.startswith("GET /bucket/m/")]

        # Read-only for everybody: what is there is used, without a lock.
        for name, _, files in os.walk(shared):
            os.chmod(name, 0o555)
            for file in files:
                os.chmod(f"{name}/{file}", 0o444)
        assert fetch(shared, 4303, DIST_FT_SHARED_FOLDERS=shared) == first
