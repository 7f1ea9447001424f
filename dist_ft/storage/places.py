"""Decides which of the URLs in files that someone else may have written are followed.

A run, a model or an adapter is a folder that a user names; what is stored in it names further
places: data, a base model. Reading those would let the writer of the folder send this user's signed
requests to any host. The rule: such a URL is followed only if it is in the same place as the
folder itself (this machine, or the same bucket or host), or in a place that the user named. Storage
options (endpoints, headers, proxies) are never read from such a folder at all. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from dist_ft.core.logs import redact
from dist_ft.storage.filesystem import is_local

LOCAL = "this machine"
_SAME_PROTOCOL = {"s3a": "s3", "gcs": "gs", "adl": "abfs", "az": "abfs", "abfss": "abfs"}


def place_of(url: str) -> str | None:
    """Return the bucket, host or machine of a path or URL.

    None for a URL of several places, such as `simplecache::s3://bucket/x`.
    """
    # fsspec also takes "protocol::path" for a chain, and "data:..." for the data themselves.
    if "::" in url or url.startswith("data:") or "\0" in url:
        return None
    if is_local(url):
        return LOCAL

    protocol, _, rest = url.partition("://")
    protocol = protocol.lower()
    protocol = _SAME_PROTOCOL.get(protocol, protocol)
    if protocol in ("http", "https"):
        # a host's name is case-insensitive, that of a bucket need not be
        parts = urlsplit(url)
        return f"{protocol}://{parts.netloc.lower()}"
    return f"{protocol}://{rest.split('/', 1)[0]}"


def may_follow(url: str, folder: str, named: Iterable[str] = ()) -> bool:
    """Return whether a URL that is stored in `folder` may be read.

    Args:
        url: the stored path or URL.
        folder: where it is stored.
        named: paths, URLs and hub names that the user named: in a config, or as an option.
    """
    named = tuple(named)
    if url in named:
        return True

    place = place_of(url)
    if place is None:
        return False
    return place in {place_of(folder), *map(place_of, named)}


def not_followed(field: str, url: str, folder: str) -> str:
    """Return the start of the error for a URL that is not followed; what to do comes after it."""
    place = redact(place_of(folder) or folder)
    return (
        f"{field}={redact(url)}: named by {redact(folder)}, which lies elsewhere ({place}). A "
        "folder that is read sends no request to another place: only data and models next to it, "
        "or named by you, are read."
    )
