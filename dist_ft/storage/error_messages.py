"""What an error of storage means: whether trying again could help, and what to do about it."""

from __future__ import annotations

import errno


class NoAnswerError(Exception):
    """A place that said nothing for as long as the asker would wait."""


_FINAL = (
    NoAnswerError,
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
    errno.EACCES,
    errno.EINVAL,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
_CLOCK = ("RequestTimeTooSkewed", "RequestExpired")
_NO_ROOM = ("QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded")
_ELSEWHERE = (
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "301",
)


def is_transient(error: BaseException) -> bool:
    """Tell whether trying again could help: network and server trouble, not a missing file or a full disk."""
    if (
        isinstance(error, _FINAL)
        or not isinstance(error, Exception)
        or "locate credentials" in str(error)
    ):
        return False
    if s3_code(error) in (*_ELSEWHERE, *_CLOCK, *_NO_ROOM):
        return False
    return not (isinstance(error, OSError) and error.errno in _FINAL_CODES)


def s3_code(error: BaseException) -> str | None:
    """Return the code with which an S3 server answered; it says more than the error's text."""
    for one in (error, error.__cause__):
        answer = getattr(one, "response", None)
        if isinstance(answer, dict) and "Error" in answer:
            return str(answer["Error"].get("Code"))
    return None


def explain(error: Exception, tries: int) -> str:
    """Say in a few words what to do about `error`, after so many tries."""
    if s3_code(error) in _ELSEWHERE:
        return (
            "the bucket lies in another region; set AWS_DEFAULT_REGION, or "
            "storage.options.s3.client_kwargs.region_name"
        )
    if s3_code(error) in _CLOCK:
        return "the clock of this machine is too far from the server's for signed requests; set it (NTP)"
    if s3_code(error) in _NO_ROOM:
        return "the store has no room left; raise its quota or keep fewer checkpoints (checkpoint.keep_last)"
    if isinstance(error, NoAnswerError):
        return "check the endpoint (storage.options, proxies, firewalls), or try again later"
    code = getattr(error, "errno", None)
    if isinstance(error, FileNotFoundError):
        return "there is no such file or bucket; check the URL"
    if isinstance(error, PermissionError) or code in (errno.EACCES, errno.EROFS):
        return "access is refused; check credentials (in the environment) and permissions"
    if isinstance(error, ImportError):
        return "its fsspec package is not installed; install the extra for it, such as dist-ft[s3]"
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space or keep fewer checkpoints (checkpoint.keep_last)"
    if "locate credentials" in str(error):
        return "no credentials were found; set them in the environment"
    if not is_transient(error):
        return "trying again would not help; check the URL and storage.options"
    return (
        f"gave up after {tries} {'tries' if tries > 1 else 'try'}; check that the endpoint answers"
    )
