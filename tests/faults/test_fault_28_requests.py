"""Fault 28: a run, an adapter or a model of someone else makes no command send a request to a host that
the user did not name, whatever is written in it; the session token goes nowhere."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
import tiny
import yaml
from recorder import Answer, Recorder, Request, recording
from s3 import BUCKET, CREDENTIALS, create_bucket, server

from dist_ft import api
from dist_ft.config.load import load_config
from dist_ft.core.errors import StorageError
from dist_ft.storage import filesystem
from dist_ft.storage.retry import retry_limit

pytest.importorskip("s3fs", reason="needs s3fs (the extra `s3`)")
ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hush-session-token-7f31"
HUB_TOKEN = "hf_hushhubtoken91bc"


@dataclass(frozen=True)
class Victim:
    """A user with credentials in the environment, whose commands read what others wrote.

    Attributes:
        base: folder with a model, data, and the finished run `runs/good`.
        hostile: the attacker's server.
        hub: what the user's environment names as the hub.
    """

    base: Path
    hostile: Recorder
    hub: Recorder

    def run(self, *arguments: str, **env: str) -> tuple[int, str]:
        """Return the code and output of a command."""
        done = subprocess.run(
            [sys.executable, "-m", "dist_ft.cli", *arguments],
            cwd=self.base,
            env={
                **os.environ,
                **CREDENTIALS,
                "AWS_SESSION_TOKEN": TOKEN,
                "HF_TOKEN": HUB_TOKEN,
                "HF_ENDPOINT": self.hub.url,
                "HF_HOME": str(self.base / "hf"),
                "HOME": str(self.base / "home"),
                "PYTHONPATH": str(ROOT),
                **env,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
            stdin=subprocess.DEVNULL,
        )
        assert "Traceback" not in done.stdout and TOKEN not in done.stdout, done.stdout[-3000:]
        return done.returncode, done.stdout

    def require_silence(self) -> None:
        """Require that no request arrived at the attacker, and no token at the hub."""
        assert self.hostile.requests == [], self.hostile.received()
        assert TOKEN not in self.hub.received()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tiny.base(tmp_path_factory.mktemp("hostile"), samples=40)
    held_out = tiny.make_data(base / "held-out", 8, seed=7)
    document = tiny.config(base, "good", schedule={"epochs": 1}, evaluation={"data": held_out})
    (base / "good.yaml").write_text(yaml.safe_dump(document))
    api.train(load_config(document), skip_check=True)
    (base / "rows.jsonl").write_text('{"prompt": "say tea"}\n')
    return base


@pytest.fixture
def victim(base: Path) -> Iterator[Victim]:
    with recording() as hostile, recording() as hub:
        yield Victim(base, hostile, hub)


def places(hostile: str) -> dict[str, dict]:
    """Return sections of a run.yaml that lead to the attacker, one way each."""
    address = hostile.removeprefix("http://")
    return {
        "endpoint": {
            "storage": {"options": {"s3": {"endpoint_url": hostile}}},
            "data": {"train": "s3://evil/*.jsonl"},
            "evaluation": {"data": "s3://evil/x.jsonl"},
        },
        "proxy": {
            "storage": {
                "options": {
                    "s3": {"config_kwargs": {"proxies": {"https": hostile, "http": hostile}}}
                }
            },
            "data": {"train": "s3://bucket/*.jsonl"},
            "evaluation": {"data": "s3://bucket/x.jsonl"},
        },
        "client": {
            "storage": {"options": {"s3": {"client_kwargs": {"endpoint_url": hostile}}}},
            "data": {"train": ["s3a://evil/*.jsonl"]},
            "evaluation": {"data": "s3a://evil/x.jsonl"},
        },
        "url": {
            "data": {"train": f"{hostile}/x.jsonl"},
            "evaluation": {"data": f"{hostile}/y.jsonl"},
        },
        "chain": {
            "data": {"train": f"simplecache::{hostile}/x.jsonl"},
            "evaluation": {"data": f"filecache::{hostile}/x.jsonl"},
        },
        "archive": {
            "data": {"train": f"zip://x.jsonl::{hostile}/x.zip"},
            "evaluation": {"data": f"zip://x.jsonl::{hostile}/x.zip"},
        },
        "webdav": {
            "data": {"train": f"webhdfs://{address}/x.jsonl"},
            "evaluation": {"data": f"ftp://{address}/x.jsonl"},
        },
        "hub": {"data": {"train": "evil/data"}, "evaluation": {"data": "evil/data"}},
        "model": {
            "model": {"path": f"{hostile}/model", "tokenizer": f"{hostile}/tokenizer"},
            "storage": {"options": {"http": {"client_kwargs": {"trust_env": True}}}},
        },
        "cluster": {
            "cluster": {"address": address, "network_variables": {"GLOO_SOCKET_IFNAME": "evil0"}}
        },
    }


def write_hostile_run(victim: Victim, *ways: str) -> str:
    """Copy the good run, and write the attacker's sections into its run.yaml."""
    folder = victim.base / "runs" / f"from-{'-'.join(ways)[:40]}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(victim.base / "runs/good", folder)
    stored = yaml.safe_load((folder / "run.yaml").read_text())
    for way in ways:
        for section, fields in places(victim.hostile.url)[way].items():
            stored[section] = {**stored.get(section, {}), **fields}
    (folder / "run.yaml").write_text(yaml.safe_dump(stored))
    return str(folder)


def test_data_verify_sends_nothing_to_the_endpoint_of_a_run(victim: Victim) -> None:
    code, output = victim.run("data", "verify", write_hostile_run(victim, "endpoint"))
    victim.require_silence()
    assert code == 2 and "exactly once: yes" in output, output
    assert "data.train=s3://evil/*.jsonl: named by" in output and "--data" in output


@pytest.mark.slow
@pytest.mark.parametrize("way", list(places("")))
def test_data_of_a_run_are_not_followed(victim: Victim, way: str, tmp_path: Path) -> None:
    run = write_hostile_run(victim, way)
    commands = [("data", "verify", run)]
    if importlib.util.find_spec("torchao"):
        commands.append(("export", run, "--out", str(tmp_path / "out"), "--int8"))

    for command in commands:
        code, output = victim.run(*command)
        victim.require_silence()
        assert victim.hub.requests == [], victim.hub.received()
        leads_away = "data" in places("")[way]
        if command[0] == "data":
            assert code == (2 if leads_away else 0), output
        else:
            assert code == 0 and ("int8 weights are not scored" in output) == leads_away, output


def redirecting(target: str) -> Callable[[Request], Answer]:
    return lambda request: Answer(307, headers=(("Location", f"{target}{request.path}"),))


def test_object_store_that_redirects_hands_on_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**CREDENTIALS, "AWS_SESSION_TOKEN": TOKEN}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(fsspec.config, "conf", {})
    with recording() as other, recording(redirecting(other.url)) as first:
        filesystem.configure({"s3": {"endpoint_url": first.url}})
        with retry_limit(1), pytest.raises(StorageError):
            filesystem.Store("s3://bucket/folder").read("file")
    filesystem.forget()
    assert TOKEN in first.received(), "the user's own store gets it"
    assert other.requests == []


@pytest.mark.slow
def test_hub_that_redirects_hands_on_no_token(victim: Victim) -> None:
    with recording(redirecting(victim.hostile.url)) as hub:
        code, output = victim.run("generate", "org/name", "--prompt", "say", HF_ENDPOINT=hub.url)
    assert code != 0 and "the hub does not provide it" in output, output
    assert HUB_TOKEN in hub.received() and HUB_TOKEN not in victim.hostile.received()


COMMANDS = [
    ("export", "RUN", "--out", "OUT"),
    ("runs", "list", "runs"),
    ("runs", "show", "RUN"),
    ("runs", "watch", "RUN", "--once"),
    ("runs", "report", "RUN", "--out", "OUT"),
    ("runs", "verify", "RUN"),
    ("runs", "prune", "RUN"),
    ("predict", "RUN", "rows.jsonl", "--out", "OUT.jsonl", "--max-new-tokens", "2"),
    ("generate", "RUN", "--prompt", "say", "--max-new-tokens", "2"),
    ("evaluate", "good.yaml", "--model", "RUN"),
    (
        "train",
        "good.yaml",
        "run.name=next",
        "model.path=RUN",
        "schedule.epochs=null",
        "schedule.steps=3",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_command_follows_a_run(victim: Victim, command: tuple[str, ...], tmp_path: Path) -> None:
    """These need nothing but the run's folder, so they succeed."""
    for ways in (("cluster", "model", "endpoint"), ("cluster", "model", "proxy", "url")):
        run, out = write_hostile_run(victim, *ways), str(tmp_path / ways[-1])
        shutil.rmtree(victim.base / "runs/next", ignore_errors=True)
        code, output = victim.run(
            *(word.replace("RUN", run).replace("OUT", out) for word in command)
        )
        victim.require_silence()
        assert victim.hub.requests == [], victim.hub.received()
        assert code == 0, output


@pytest.mark.slow
def test_adapter_does_not_name_a_base_model_elsewhere(victim: Victim) -> None:
    document = tiny.config(
        victim.base, "lora", schedule={"epochs": 1}, tuning={"method": "lora", "lora": {"rank": 2}}
    )
    config = load_config(document)
    shutil.rmtree(victim.base / "runs/lora", ignore_errors=True)
    api.train(config, skip_check=True)
    adapter = victim.base / "adapter"
    shutil.rmtree(adapter, ignore_errors=True)
    api.export(config, str(adapter), adapter=True)
    assert victim.run("generate", str(adapter), "--prompt", "say", "--max-new-tokens", "2")[0] == 0

    about = json.loads((adapter / "dist_ft.json").read_text())
    for base in (
        f"{victim.hostile.url}/model",
        f"simplecache::{victim.hostile.url}/model",
        "s3://evil/m",
    ):
        about["base"]["path"] = base
        (adapter / "dist_ft.json").write_text(json.dumps(about))
        code, output = victim.run(
            *("generate", str(adapter), "--prompt", "say"), AWS_ENDPOINT_URL=victim.hostile.url
        )
        victim.require_silence()
        assert code != 0 and "unexpected" not in output, output


@pytest.mark.slow
def test_own_runs_in_a_bucket_stay_easy(victim: Victim, tmp_path: Path) -> None:
    """The endpoint comes from the environment or the command line; data next to the run need nothing."""
    pytest.importorskip("moto.server", reason="needs moto[server] (the extra `dev`)")
    import boto3

    with server() as port:
        endpoint = f"http://127.0.0.1:{port}"
        create_bucket(port, "corpus")
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id="x",
            aws_secret_access_key="x",
            region_name="us-east-1",
        )
        for shard in sorted((victim.base / "data").glob("*.jsonl")):
            client.upload_file(str(shard), "corpus", f"data/{shard.name}")
            client.upload_file(str(shard), BUCKET, f"data/{shard.name}")

        environment = {"AWS_ENDPOINT_URL": endpoint}
        for name, data in (
            ("near", f"s3://{BUCKET}/data/*.jsonl"),
            ("far", "s3://corpus/data/*.jsonl"),
        ):
            document = tiny.config(
                victim.base,
                name,
                run={"storage": f"s3://{BUCKET}/runs"},
                data={"train": data},
                schedule={"epochs": 1},
                storage={"options": {"s3": {"endpoint_url": endpoint}}},
            )
            (victim.base / f"{name}.yaml").write_text(yaml.safe_dump(document))
            code, output = victim.run("train", f"{name}.yaml")
            assert code == 0, output

        verify = ("data", "verify")
        near, far = f"s3://{BUCKET}/runs/near", f"s3://{BUCKET}/runs/far"
        option = f"storage.options.s3.endpoint_url={endpoint}"
        for arguments in ((near,), (far, "--data", "s3://corpus")):
            code, output = victim.run(*verify, *arguments, **environment)
            assert code == 0 and "shards unchanged since the run started: all 3" in output, output
        for arguments in ((near, option), (far, option, "--data", "s3://corpus"), ("far.yaml",)):
            code, output = victim.run(*verify, *arguments)
            assert code == 0 and "shards unchanged since the run started: all 3" in output, output

        code, output = victim.run(*verify, far, **environment)
        assert code == 2 and "data.train=s3://corpus/data/*.jsonl: named by s3://bucket" in output
        code, output = victim.run("runs", "show", near, option)
        assert code == 0, output
        code, output = victim.run("runs", "show", near, "schedule.steps=3")
        assert (
            code == 2
            and "schedule: cannot be overridden, as the run is given by its folder" in output
        )
