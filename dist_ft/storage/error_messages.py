"""Meaning of storage errors: whether a retry could help, and what the user can do."""

from __future__ import annotations

import errno


class NoAnswerError(Exception):
    """A host did not answer within the timeout."""


class UnusableFileError(OSError):
    """A file that is never read: a pipe, socket, device or folder, or one above a size limit.

    The text is what is wrong, such as "is a named pipe, not a regular file".
    """


class ShortFileError(OSError):
    """A file of this machine that ends before the requested bytes.

    Unlike the answer of a server, which a broken connection cuts, it is as short at the next try.
    """


_FINAL = (
    NoAnswerError,
    ShortFileError,
    UnusableFileError,
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    NotADirectoryError,
    IsADirectoryError,
    ValueError,
    TypeError,
    ImportError,
    NotImplementedError,
)
_FINAL_CODES = (
    errno.ENOSPC,
    errno.EROFS,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EINVAL,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
_CLOCK_SKEW = ("RequestTimeTooSkewed", "RequestExpired")
_STORE_FULL = ("QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded")
_OTHER_REGION = (
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "301",  # the response to a HEAD request has no body, so its status replaces the code
)
_NO_CREDENTIALS = "locate credentials"


def is_transient(error: BaseException) -> bool:
    """Whether a retry could help: network and server errors, not a missing file or a full disk."""
    if isinstance(error, _FINAL) or not isinstance(error, Exception):
        return False

    # Other errors count as transient unless their text or code says more: a needless retry costs
    # seconds, a run that ends early costs hours.
    if _NO_CREDENTIALS in str(error):
        return False
    if s3_code(error) in (*_OTHER_REGION, *_CLOCK_SKEW, *_STORE_FULL):
        return False

    return not (isinstance(error, OSError) and error.errno in _FINAL_CODES)


def s3_code(error: BaseException) -> str | None:
    """Return the code in an S3 server's response; it is more specific than the error's text."""
    # s3fs raises botocore's error as the cause of a Python error such as PermissionError.
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict) and "Error" in response:
            return str(response["Error"].get("Code"))

    return None


def is_empty_range(error: BaseException) -> bool:
    """Whether a store refused a range because it starts after the end of the file."""
    if s3_code(error) in ("InvalidRange", "416"):
        return True
    return getattr(error, "code", getattr(error, "status", None)) in (416, "416")


def explain(error: Exception, attempts: int) -> str:
    """Return in one or two sentences what to do about `error` after this number of attempts."""
    # Codes come first: s3fs turns some of them into a PermissionError, whose advice would mislead.
    code = s3_code(error)
    if code in _OTHER_REGION:
        return (
            "The bucket is in another region. Set AWS_DEFAULT_REGION, or "
            "storage.options.s3.client_kwargs.region_name."
        )
    if code in _CLOCK_SKEW:
        return (
            "The clock of this machine differs too much from the server's for signed requests. "
            "Set it (NTP)."
        )
    if code in _STORE_FULL:
        return (
            "The store is full. Raise its quota or keep fewer checkpoints (checkpoint.keep_last)."
        )

    if isinstance(error, NoAnswerError):
        return "Check the endpoint (storage.options, proxies, firewalls), or try again later."
    if isinstance(error, UnusableFileError):
        return "Only regular files up to that size are read. Remove it, or give another path."
    if isinstance(error, ShortFileError):
        return "The file is shorter than when it was listed or written. Restore it from a copy."
    if isinstance(error, FileNotFoundError):
        return "This file or bucket does not exist. Check the URL."

    number = getattr(error, "errno", None)
    if isinstance(error, PermissionError) or number in (errno.EACCES, errno.EROFS):
        return "Access is denied. Check credentials (in the environment) and permissions."

    if isinstance(error, ImportError):
        return "Its fsspec package is not installed. Install the extra for it, such as dist-ft[s3]."
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "The disk is full. Free some space or keep fewer checkpoints (checkpoint.keep_last)."
    if _NO_CREDENTIALS in str(error):
        return "No credentials were found. Set them in the environment."
    if not is_transient(error):
        return "A retry would not help. Check the URL and storage.options."

    noun = "attempts"
    if attempts <= 1:
        noun = "attempt"
    return f"Gave up after {attempts} {noun}. Check that the endpoint answers."
