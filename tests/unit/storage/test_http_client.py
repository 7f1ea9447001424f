"""A redirect to another host does not carry the user's headers there."""

from __future__ import annotations

import fsspec
import pytest
from recorder import Answer, recording

from dist_ft.storage import filesystem, http_client
from dist_ft.storage.filesystem import Store

pytest.importorskip("aiohttp", reason="needs aiohttp, for http:// URLs")
HEADERS = {
    "Authorization": "Bearer hush",
    "Cookie": "session=hush",
    "X-Api-Key": "hush",
    "Private-Token": "hush",
}


@pytest.fixture(autouse=True)
def configured(monkeypatch):
    monkeypatch.setattr(fsspec.config, "conf", {})
    filesystem.configure({"http": {"client_kwargs": {"headers": HEADERS}}})
    yield
    monkeypatch.undo()
    filesystem.forget()


def answer_content(request):
    return Answer(200, b"content")


def redirecting(target):
    def respond(request):
        return Answer(302, headers=(("Location", f"{target}{request.path}"),))

    return respond


def test_redirect_to_another_host_carries_no_header():
    with recording(answer_content) as other, recording(redirecting(other.url)) as first:
        assert Store(first.url).read("x") == b"content"
    assert "hush" in first.received(), "the user's own server gets them"
    assert other.requests and "hush" not in other.received()
    assert all(
        header not in one.headers for one in other.requests for header in map(str.lower, HEADERS)
    )


def test_chain_of_redirects_back_carries_no_header():
    """Headers that were dropped do not come back: the other host chose where it leads."""
    with (
        recording(answer_content) as last,
        recording(redirecting(last.url)) as other,
        recording(redirecting(other.url)) as first,
    ):
        assert Store(first.url).read("x") == b"content"
    assert last.requests and "hush" not in last.received() + other.received()


def test_redirect_on_the_same_host_keeps_headers():
    def respond(request):
        if request.path == "/x":
            return Answer(307, headers=(("Location", "/y"),))
        return Answer(200, b"content")

    with recording(respond) as server:
        assert Store(server.url).read("x") == b"content"
    assert [one.headers["x-api-key"] for one in server.requests] == ["hush"] * len(server.requests)


def test_range_is_kept_on_a_redirect():
    def ranged(request):
        assert request.headers.get("range") == "bytes=2-3", request
        return Answer(206, b"nt", (("Content-Range", "bytes 2-3/7"),))

    with recording(ranged) as other, recording(redirecting(other.url)) as first:
        assert Store(first.url).read("x", 2, 4) == b"nt"


def test_options_of_the_user_win():
    assert http_client.client_options("http", {"get_client": print}) == {}
    assert http_client.client_options("gs", {}) == {}
    pytest.importorskip("aiobotocore", reason="needs s3fs (the extra `s3`)")
    default = http_client.client_options("s3", {})["config_kwargs"]
    assert default["retries"] == {"total_max_attempts": 1}
    own = http_client.client_options("s3", {"config_kwargs": {"connect_timeout": 3}})
    config = own["config_kwargs"]
    assert config.pop("http_session_cls").__name__ == "SessionWithoutRedirects"
    assert config == {"connect_timeout": 3}
    chosen = {"config_kwargs": {"http_session_cls": print}}
    assert http_client.client_options("s3a", chosen) == chosen
