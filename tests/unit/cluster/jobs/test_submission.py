"""A job's log, followed: whatever breaks, no line is lost or doubled; the job server is a stand-in that breaks as told."""

from __future__ import annotations

import random

import pytest

from dist_ft.cluster.jobs import submission
from dist_ft.cluster.jobs.job_server import UnknownJobError, UnreachableError
from dist_ft.core.errors import WorkerError

LOG = "".join(f"line {number} äö\n" for number in range(200))


class Client:
    """Streams the log from its beginning, in pieces, and breaks off after `breaks` of them."""

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
    shown = "http://h"

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
    monkeypatch.setattr(submission, "PAUSE_S", 0.0)

    def run(client, server):
        written, said = [], []
        monkeypatch.setattr(submission, "_client", lambda server: client)
        job = submission.Follower(server, "x", written.append, said.append).follow()
        return job, "".join(written), said

    return run


@pytest.mark.parametrize("seed", range(20))
def test_a_log_that_breaks_off_again_and_again_is_written_once(follow, seed):
    job, written, said = follow(Client(5, seed), Server(["RUNNING"] * 5 + ["SUCCEEDED"]))
    assert written == LOG and job["status"] == "SUCCEEDED"
    assert all("the job goes on; asking again" in line for line in said)


def test_what_the_stream_did_not_bring_is_asked_for_at_the_end(follow):
    class Silent:
        async def tail_job_logs(self, name):
            yield LOG[:17]

    assert follow(Silent(), Server(["STOPPED"]))[1] == LOG


def test_a_cluster_that_stays_away_is_given_up(follow, monkeypatch):
    monkeypatch.setattr(submission, "LOST_S", 0.0)
    with pytest.raises(
        WorkerError,
        match="has not answered for 0 s; the job may go on there; the same command attaches",
    ):
        follow(Client(99, 1), Server([UnreachableError("gone")]))


def test_a_head_that_was_started_anew_knows_nothing_of_it(follow):
    with pytest.raises(WorkerError, match=r"no such job.*the same command submits the run again"):
        follow(Client(99, 1), Server([UnknownJobError("x: no such job at http://h")]))


def test_stop_of_a_job_that_has_ended_asks_nothing():
    said: list[str] = []
    assert submission.stop(Server(["FAILED"]), "x", said.append)["status"] == "FAILED"
    assert said == ["job x has ended already (FAILED)"]
