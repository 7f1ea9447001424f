"""Answers of a job server: versions, capacity, addresses, the token. A small HTTP server answers."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dist_ft.cluster.jobs import job_server
from dist_ft.cluster.jobs.job_server import (
    Node,
    Server,
    check_capacity,
    find_version_problem,
    resolve_url,
)
from dist_ft.config.load import load_config
from dist_ft.core.errors import ConfigError, WorkerError

TOKEN = "5ecret-of-the-cluster"


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch, tmp_path):
    for name in (
        "RAY_ADDRESS",
        "RAY_API_SERVER_ADDRESS",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_AUTH_MODE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def answering():
    """Return a function that serves {path: answer} to those with the token, and returns the server's URL."""
    servers = []

    def serve(answers, status=200):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                sent = self.headers.get("Authorization")
                code = (
                    401
                    if sent is None
                    else 403
                    if sent != f"Bearer {TOKEN}"
                    else status
                    if self.path in answers
                    else 404
                )
                self.send_response(code)
                self.end_headers()
                self.wfile.write(
                    json.dumps(answers.get(self.path)).encode() if code == 200 else b"no"
                )

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_old_ray_missing_token_and_wrong_token_are_one_line(answering, monkeypatch):
    url = answering({"/api/version": {"ray_version": "2.9.3"}})
    with pytest.raises(
        WorkerError, match=r"it requires a token, and none was found\. Set RAY_AUTH_TOKEN_PATH"
    ):
        Server(url).versions()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong-wrong")
    with pytest.raises(WorkerError, match="the token was rejected") as caught:
        Server(url).versions()
    assert "wrong-wrong" not in str(caught.value)
    monkeypatch.setenv("RAY_AUTH_TOKEN", f"{TOKEN}\n")
    assert Server(url).versions() == ("2.9.3", None)


def test_server_that_is_no_job_server_is_reported(answering, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with pytest.raises(
        job_server.UnreachableError,
        match=r"no job server of Ray answers there \(connection refused\)",
    ):
        Server("http://127.0.0.1:9").versions()
    with pytest.raises(
        WorkerError, match="answers 404 to /api/version, as no job server of Ray does"
    ):
        Server(answering({})).versions()
    with pytest.raises(job_server.UnreachableError, match="answers 503"):
        Server(answering({"/api/version": 1}, status=503)).versions()
    with pytest.raises(job_server.UnknownJobError, match="mine: no such job at"):
        Server(answering({})).job("mine")


def test_token_is_read_where_ray_reads_it(monkeypatch, tmp_path):
    assert job_server.find_token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("of-home\n")
    assert job_server.find_token() == "of-home"
    (tmp_path / "file").write_text("of-file")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file"))
    assert job_server.find_token() == "of-file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert job_server.find_token() == "given"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"RAY_AUTH_TOKEN_PATH=.*cannot be read"):
        job_server.find_token()


@pytest.mark.parametrize(
    "address", ["ray://h:10001", "10.0.0.1:6379", "http://", "http://h:x", "auto"]
)
def test_addresses_of_other_kinds_are_refused(address):
    with pytest.raises(ConfigError, match="not the URL of a job server"):
        resolve_url(address)


def test_address_of_the_job_server(monkeypatch):
    assert resolve_url(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert resolve_url(None) == "http://127.0.0.1:8265", "that is Ray's own"
    monkeypatch.setenv("RAY_ADDRESS", "http://a:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://b:2/")
    assert (resolve_url(None), resolve_url("https://c")) == ("http://b:2", "https://c")


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        (("2.60.0", "3.11.7"), None),
        (("2.60.3", "3.11.1"), None),
        (("2.60.0", None), None),
        (("2.9.3", None), "Ray 2.9.3 runs there, which is too old. Ray 2.60 or newer is needed"),
        (("2.61.0", "3.11.7"), "Ray 2.61.0 runs there, and Ray 2.60.0 here"),
        (("2.60.0", "3.10.2"), "Python 3.10.2 runs there, and Python 3.11 here"),
        (("3.0.0rc1", "3.11.7"), "Ray 3.0.0rc1 runs there"),
        (("what", None), "too old"),
    ],
)
def test_version_problems(cluster, expected):
    problem = find_version_problem(cluster, "2.60.0", "3.11")
    if expected is None:
        assert problem is None
    else:
        assert problem is not None and expected in problem


def config(*overrides):
    return load_config(
        {
            "run": {"name": "x"},
            "model": {"path": "a/b"},
            "data": {"train": "a/b"},
            "schedule": {"steps": 1},
            "batch": {"global_batch": 8, "sequence_length": 64},
        },
        ["cluster.workers=2", *overrides],
    )


def node(cpus, gpus=0.0, used=0.0):
    total = {"CPU": float(cpus), **({"GPU": gpus} if gpus else {})}
    return Node("10.0.0.1", total, job_server.free_resources(total, {"CPU": [used, cpus]}))


def test_capacity_ever_and_now():
    gpus = config("cluster.gpus_per_worker=1")
    assert check_capacity([node(8, 1.0), node(8, 1.0)], gpus) == (None, None)
    problem, notice = check_capacity([node(8, 1.0), node(8)], gpus)
    assert (
        notice is None
        and "2 workers with 1 CPU, 1 GPU each are needed, and the cluster (2 nodes, 16 CPU, 1 GPU) has room for 1"
        in problem
    )
    problem, notice = check_capacity([node(8, 2.0, used=7.5)], gpus)
    assert (
        problem is None
        and "there is room for 0 now" in notice
        and "cluster.start_timeout_s=" in notice
    )


def test_worker_must_fit_on_one_node():
    problem, _ = check_capacity(
        [node(3), node(3)], config("cluster.cpus_per_worker=4", "cluster.workers=1")
    )
    assert "has room for 0" in problem, "six CPUs, but no four together"


def test_local_nodes_are_recognized():
    assert job_server.are_all_local([Node("127.0.0.1", {}, {})])
    assert not job_server.are_all_local([Node("127.0.0.1", {}, {}), Node("203.0.113.7", {}, {})])
    assert not job_server.are_all_local([])
