"""The HTTP client of data and models at http:// and https:// URLs.

Guarantee: a server that redirects to another host does not hand on this user's headers to it. The
library drops only the standard ones (Authorization, Cookie).
"""

from __future__ import annotations

from typing import Any

_HARMLESS_HEADERS = frozenset(
    {"accept", "accept-encoding", "accept-language", "range", "if-range", "user-agent"}
)
"""Sent to any host; all others may hold a credential, such as X-Api-Key."""


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
