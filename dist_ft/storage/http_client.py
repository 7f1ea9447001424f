"""Options of the HTTP clients behind object stores and http:// URLs.

Guarantees: a server that redirects to another host does not hand on this user's credentials to it
(aiohttp drops only the standard headers, such as Authorization); clients do not retry themselves,
because their retries would multiply with ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

_S3_CONFIG = {
    "retries": {"total_max_attempts": 1},
    "connect_timeout": 10,
    "read_timeout": 60,
}

_HARMLESS_HEADERS = frozenset(
    {"accept", "accept-encoding", "accept-language", "range", "if-range", "user-agent"}
)
"""Sent to any host; all others may hold a credential, such as X-Api-Key."""


def client_options(protocol: str, configured: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options of a filesystem's client that the user's own do not set.

    Args:
        protocol: of the filesystem.
        configured: the user's options; they win, but the arguments returned here replace them.
    """
    if protocol in ("http", "https") and "get_client" not in configured:
        return {"get_client": create_client}
    if protocol not in ("s3", "s3a"):
        return {}

    # a copy to its depth: botocore writes into what it is given
    config = deepcopy(dict(configured.get("config_kwargs", _S3_CONFIG)))
    try:
        from dist_ft.storage.s3_session import SessionWithoutRedirects
    except ImportError:  # opening the bucket says which package is missing
        return {"config_kwargs": config}
    config.setdefault("http_session_cls", SessionWithoutRedirects)
    return {"config_kwargs": config}


async def create_client(**options: Any) -> Any:
    """Return a session of aiohttp with these options, as fsspec creates one itself."""
    import aiohttp

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(_drop_headers)
    traces = [trace, *options.pop("trace_configs", ())]
    return aiohttp.ClientSession(trace_configs=traces, **options)


async def _drop_headers(session: Any, context: Any, redirect: Any) -> None:
    """Remove headers before a request is sent on to another host."""
    from yarl import URL

    # aiohttp calls this before it follows, and sends what is left in `headers`.
    location = redirect.response.headers.get("Location") or redirect.response.headers.get("URI")
    source = redirect.response.url
    try:
        is_same_host = source.join(URL(location)).origin() == source.origin()
    except (TypeError, ValueError):  # no location, or no URL: aiohttp raises an error
        is_same_host = False

    if not is_same_host:
        for name in list(redirect.headers):
            if name.lower() not in _HARMLESS_HEADERS:
                redirect.headers.popall(name, None)
