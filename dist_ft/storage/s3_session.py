"""The HTTP session of S3 clients: a redirect is an answer, not a place to send the request to.

The library follows redirects, and then sends the session token and the content of the request to
any host that the store names. botocore itself handles an S3 store's redirects to another region:
it signs a new request. Imports the S3 client, so it is imported when a bucket is opened.
"""

from __future__ import annotations

from typing import Any

from aiobotocore.httpsession import AIOHTTPSession


class SessionWithoutRedirects(AIOHTTPSession):
    """aiobotocore's session, which returns redirects to botocore."""

    async def _get_session(self, proxy_url: Any) -> Any:
        return _Client(await super()._get_session(proxy_url))


class _Client:
    """A session of aiohttp, as far as aiobotocore uses it."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def request(self, *args: Any, **options: Any) -> Any:
        return self._session.request(*args, allow_redirects=False, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)
