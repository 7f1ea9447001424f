"""Folders on this machine that only one user can access: caches, checkpoints, temporary files.

Who can write to such a folder decides what a run reads, and who can read it sees data and weights.
New folders get mode 0700. A folder is refused if another user owns it, if every user may write to
it, or if it is a link that another user made. Names below the system's temporary folder are known
to all users of a machine, so somebody else may have created them first.

`DIST_FT_SHARED_FOLDERS` names folders, separated by ":", that an administrator set up for several
users: they and folders below them are used as they are, and new ones follow the umask. It is also
the way for disks that have no owners or permissions. Uses only the standard library.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from dist_ft.core.errors import FolderError

SHARED_FOLDERS = "DIST_FT_SHARED_FOLDERS"
COMPILED_CODE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
COMPILED_CODE = "torchinductor"
_ROOT = 0
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def open_part(folder: Path, name: str, field: str) -> Path:
    """Return the private folder `name` in a configured one; both are created if they are missing.

    Args:
        folder: the configured folder. Only its parts are made private: it may hold other files.
        name: of the part.
        field: the config field of `folder`.

    Raises:
        FolderError: one of them is not safe to use, or cannot be created.
    """
    require_safe(folder, field)
    part = folder / name
    mode = 0o777 if is_shared(folder) else 0o700
    for path in (folder, part):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Whoever else creates it at this moment is found by the check that follows.
            path.mkdir(mode=mode, exist_ok=True)
        except OSError as error:
            raise _folder_error(folder, field, _cannot(path, "created", error)) from error

    require_own_part(folder, name, field)
    if not is_shared(folder):
        _hide_from_others(part)
    return part


def require_safe(folder: Path, field: str) -> None:
    """Check a configured folder, which need not exist.

    Raises:
        FolderError: it is no folder, or others own it or may write to it.
    """
    if is_shared(folder):
        return
    try:
        problem = _problem_of_configured(folder)
    except OSError as error:
        problem = _cannot(folder, "used", error)
    if problem:
        raise _folder_error(folder, field, problem)


def require_own_part(folder: Path, name: str, field: str) -> None:
    """Check the part `name` of a configured folder, which need not exist.

    Raises:
        FolderError: it is no folder, or not this user's own.
    """
    if is_shared(folder):
        return
    try:
        problem = _problem_of_part(folder / name)
    except OSError as error:
        problem = _cannot(folder / name, "used", error)
    if problem:
        raise _folder_error(folder, field, problem)


def user_folder(parent: str | None = None) -> Path | None:
    """Return this user's folder in the system's temporary folder, created if it is missing.

    None if others can access it: another user may have created it first. `parent`: the temporary
    folder; None: the one of TMPDIR.
    """
    path = Path(parent or tempfile.gettempdir(), f"dist_ft-{os.geteuid()}")
    with contextlib.suppress(OSError):
        path.mkdir(mode=0o700)

    # `lstat`: somebody else's link to a folder of this user must not be followed.
    try:
        status = path.lstat()
    except OSError:
        return None

    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not is_own or status.st_mode & _WRITABLE_BY_OTHERS:
        return None
    _hide_from_others(path)
    return path


def keep_compiled_code_private() -> None:
    """Have torch keep what it compiles in the user's folder.

    By default it uses a name in the system's temporary folder that all users know, and runs the
    code that it finds there, whoever wrote it.
    """
    folder = user_folder() or Path(os.path.expanduser("~/.cache"))
    os.environ.setdefault(COMPILED_CODE_VARIABLE, str(folder / COMPILED_CODE))


def is_shared(path: Path) -> bool:
    """Return whether `DIST_FT_SHARED_FOLDERS` names this folder or one above it."""
    absolute = Path(os.path.abspath(path.expanduser()))
    for name in os.environ.get(SHARED_FOLDERS, "").split(":"):
        if name and absolute.is_relative_to(os.path.abspath(os.path.expanduser(name))):
            return True
    return False


def _problem_of_configured(path: Path) -> str:
    """Return why a configured folder is not safe to use, "" if it is or does not exist."""
    if not os.path.lexists(path):
        return ""
    problem = _link_problem(path)
    if problem:
        return problem

    status = path.stat()
    if not stat.S_ISDIR(status.st_mode):
        return f"{path} is not a folder"
    if status.st_uid not in (os.geteuid(), _ROOT):
        return f"{path} belongs to {_user_name(status.st_uid)}"

    # In a folder like /tmp, with the sticky bit, nobody but root can replace a user's part.
    is_like_tmp = status.st_uid == _ROOT and status.st_mode & stat.S_ISVTX
    if status.st_mode & stat.S_IWOTH and not is_like_tmp:
        return f"every user of this machine may write to {path}"
    return ""


def _problem_of_part(path: Path) -> str:
    """Return why a folder is not this user's own, "" if it is or does not exist."""
    if not os.path.lexists(path):
        return ""
    problem = _link_problem(path)
    if problem:
        return problem

    status = path.stat()
    if not stat.S_ISDIR(status.st_mode):
        return f"{path} is not a folder"
    if status.st_uid != os.geteuid():
        return f"{path} belongs to {_user_name(status.st_uid)}"
    if status.st_mode & stat.S_IWOTH:
        # Not repaired: what others have put into it would be trusted from then on.
        return f"every user of this machine may write to {path}"
    return ""


def _link_problem(path: Path) -> str:
    """Return the problem of a link that another user made; links of this user and root are fine."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode) and status.st_uid not in (os.geteuid(), _ROOT):
        return f"{path} is a link that {_user_name(status.st_uid)} made"
    return ""


def _cannot(path: Path, verb: str, error: OSError) -> str:
    return f"{path} cannot be {verb} ({error.strerror or type(error).__name__})"


def _folder_error(folder: Path, field: str, problem: str) -> FolderError:
    return FolderError(
        f"{field}={folder}: {problem}. A folder of {_user_name(os.geteuid())} that nobody else can "
        f"write to is required, because a run trusts what it finds there. Set {field} to one, or "
        f"set {SHARED_FOLDERS}={folder} if an administrator set it up for several users."
    )


def _hide_from_others(path: Path) -> None:
    """Remove the permissions of group and others, which earlier versions left by the umask."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & _OTHERS:
        path.chmod(mode & ~_OTHERS)


def _user_name(user_id: int) -> str:
    import pwd

    try:
        return f"user {pwd.getpwuid(user_id).pw_name}"
    except KeyError:
        return f"user {user_id}"
