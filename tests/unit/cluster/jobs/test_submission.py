"""Following a job's log across interruptions: no line is lost or repeated. The server is a fake."""

from __future__ import annotations

import random

import pytest

from dist_ft.cluster.jobs import submission
from dist_ft.cluster.jobs.job_server import UnknownJobError, UnreachableError
from dist_ft.core.errors import WorkerError

LOG = "".join(f"line {number} äö\n" for number in range(200))


class Client:
    """Streams the log from its start, in parts, and interrupts the stream `breaks` times."""

    def __init__(self, breaks, seed):
        self.breaks, self.random = breaks, random.Random(seed)

    async def tail_job_logs(self, name):
        at = 0
        while at < len(LOG):
            size = self.random.randint(1, 200)
            yield LOG[at : at + size]
            at += size
            if self.breaks > 0 and self.random.random() < 0.3:
                self.breaks -= 1
                raise ConnectionResetError("cut")


class Server:
    display_url = "http://h"

    def __init__(self, answers):
        self.answers = answers

    def job(self, name):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return {"status": answer}

    def log(self, name):
        return LOG


@pytest.fixture
def follow(monkeypatch):
    monkeypatch.setattr(submission, "POLL_S", 0.0)

    def run(client, server):
        written, printed = [], []
        monkeypatch.setattr(submission, "_client", lambda server: client)
        job = submission.Follower(server, "x", written.append, printed.append).follow()
        return job, "".join(written), printed

    return run


@pytest.mark.parametrize("seed", range(20))
def test_interrupted_log_is_written_once(follow, seed):
    job, written, printed = follow(Client(5, seed), Server(["RUNNING"] * 5 + ["SUCCEEDED"]))
    assert written == LOG and job["status"] == "SUCCEEDED"
    assert all("the job continues; connecting again" in line for line in printed)


def test_rest_of_the_log_is_requested_at_the_end(follow):
    class Silent:
        async def tail_job_logs(self, name):
            yield LOG[:17]

    assert follow(Silent(), Server(["STOPPED"]))[1] == LOG


def test_unreachable_cluster_is_given_up(follow, monkeypatch):
    monkeypatch.setattr(submission, "LOST_S", 0.0)
    with pytest.raises(
        WorkerError,
        match=r"has not answered for 0 s\. The job may still run there\. The same command attaches",
    ):
        follow(Client(99, 1), Server([UnreachableError("gone")]))


def test_restarted_head_does_not_know_the_job(follow):
    with pytest.raises(WorkerError, match=r"no such job.*the same command submits the run again"):
        follow(Client(99, 1), Server([UnknownJobError("x: no such job at http://h")]))


def test_stop_of_an_ended_job_does_nothing():
    printed: list[str] = []
    assert submission.stop(Server(["FAILED"]), "x", printed.append)["status"] == "FAILED"
    assert printed == ["job x has already ended (FAILED)"]
