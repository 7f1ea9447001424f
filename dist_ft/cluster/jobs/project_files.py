"""Lists the files of a project that may be uploaded with a job, and opens them safely.

In a git work tree these are tracked files, and untracked ones that are neither ignored nor called
like a credential; elsewhere, all files that are not. Guarantees: no listed file lies outside the
project, whatever links say, and none is opened that has become another one since it was listed.
"""

from __future__ import annotations

import errno
import ntpath
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dist_ft.cluster.jobs.secret_names import is_secret_name
from dist_ft.core import scratch

GIT_TIMEOUT_S = 120
_GIT_VARIABLES = frozenset(
    {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_PREFIX", "GIT_NAMESPACE"}
)
IGNORE_FILES = (".gitignore", ".rayignore")
_REMEDY = "Exclude it (--exclude, .rayignore) or remove it. Nothing was uploaded."


class ProjectFile(NamedTuple):
    """A file that is uploaded.

    Attributes:
        name: its path in the project, with "/" as separator.
        source: path of the file that is read, relative to the project; another one if `name` is a
            link.
        is_tracked: whether git tracks it.
    """

    name: str
    source: str
    is_tracked: bool = False


@dataclass(frozen=True)
class Listing:
    """The files of a project.

    Attributes:
        files: those that are uploaded, sorted by name.
        problems: one line for each reason not to upload the project.
    """

    files: tuple[ProjectFile, ...]
    problems: tuple[str, ...]


class _Candidate(NamedTuple):
    """A path of the project before its name and its target were examined."""

    name: str
    is_tracked: bool


class ListingError(Exception):
    """The files of a folder cannot be listed; the text is one line that says why."""


def list_files(folder: Path, is_excluded: Callable[[str], bool]) -> Listing:
    """Return the files of the project in `folder`.

    Args:
        folder: the project's folder.
        is_excluded: whether a relative path is left out, or a folder and all below it.
    """
    root = Path(os.path.realpath(folder))
    try:
        candidates = list(_candidates(root, "", is_excluded))
    except ListingError as error:
        return Listing((), (str(error),))

    problems: list[str] = []
    files: dict[str, ProjectFile] = {}
    links: list[_Candidate] = []
    run_folders = _RunFolders(root)
    for candidate in candidates:
        name = candidate.name
        if is_excluded(name):
            continue
        if is_secret_name(name):
            # Git tracks it, so its author takes it for a part of the project.
            if candidate.is_tracked:
                problems.append(
                    f"--project: {shown(name)} has the name of a credential, git tracks it, and "
                    f"the project is uploaded to the cluster. {_REMEDY}"
                )
            continue

        mode = _mode(root / name)
        if stat.S_ISLNK(mode):
            links.append(candidate)
        elif stat.S_ISREG(mode) and (candidate.is_tracked or not run_folders.hold(name)):
            files[name] = ProjectFile(name, name, candidate.is_tracked)

    problems += _add_links(root, links, files)
    for name in files:
        # a drive letter of Windows, such as "a:" of "a:b.txt"
        has_drive = bool(ntpath.splitdrive(name)[0])
        if "\\" in name or has_drive or not _is_utf8(name):
            problems.append(
                f"--project: {shown(name)}: Ray cannot unpack a file of this name. Allowed: names "
                "in UTF-8 without a backslash or a drive letter. Rename it, or exclude it "
                "(--exclude). Nothing was uploaded."
            )
    return Listing(tuple(files[name] for name in sorted(files)), tuple(problems))


def open_file(root: Path, source: str) -> BinaryIO:
    """Open a listed file for reading, only if it still is a regular file of the project.

    Raises:
        OSError: it is absent, unreadable, or has become a link or a special file.
    """
    # One folder after the other: a link that was put in the place of one is not followed.
    *folders, name = source.split("/")
    follow_none = os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for folder in folders:
            inner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | follow_none, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        # without blocking: opening a FIFO would wait for a writer
        file = os.open(name, os.O_RDONLY | os.O_NONBLOCK | follow_none, dir_fd=descriptor)
    finally:
        os.close(descriptor)

    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "not a regular file any more")
    return open(file, "rb", buffering=0)


def _candidates(
    root: Path, subfolder: str, is_excluded: Callable[[str], bool]
) -> Iterator[_Candidate]:
    """Yield the paths below a folder: by git if it is a work tree, else all."""
    if _is_work_tree(root / subfolder):
        names = _list_by_git(root, subfolder)
    else:
        names = _walk_and_ignore(root, subfolder, is_excluded)

    for candidate in names:
        path = root / candidate.name
        if not path.is_dir() or path.is_symlink():
            yield candidate
        # A repository in the repository (a submodule, say), which has its own ignored files.
        elif os.path.lexists(path / ".git") and not _is_left_out(candidate.name, is_excluded):
            yield from _candidates(root, candidate.name, is_excluded)


def _is_left_out(folder: str, is_excluded: Callable[[str], bool]) -> bool:
    """Return whether all files below a folder are left out, so that it need not be listed."""
    return is_excluded(folder) or is_secret_name(f"{folder}/any.py")


def _is_work_tree(folder: Path) -> bool:
    """Return whether git says which files of `folder` belong to a project.

    Raises:
        ListingError: a repository is there, but git is missing or does not accept it.
    """
    try:
        inside = _git(folder, "rev-parse", "--is-inside-work-tree")
    except FileNotFoundError:
        for parent in (folder, *folder.parents):
            if (parent / ".git").exists():
                raise ListingError(
                    f"--project={folder}: is in the git repository {parent}, but git is not "
                    "installed, so the files that it ignores are not known. Install git, or copy "
                    "the project to a folder without .git."
                ) from None
        return False

    if inside.returncode == 0:
        # An ignored folder of a repository is no part of it: git would list nothing.
        is_ignored = _git(folder, "check-ignore", "-q", ".").returncode == 0
        return inside.stdout.strip() == b"true" and not is_ignored

    reason = inside.stderr.decode("utf-8", "replace").strip().split("\n")[0]
    if "not a git repository" in reason:
        return False
    raise ListingError(
        f"--project={folder}: git does not list the project's files ({reason[:200]}). Correct "
        "that, or copy the project to a folder without .git."
    )


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run git in a folder; raises FileNotFoundError without git, ListingError if it hangs."""
    # A hook or an alias of git may have set variables that name another repository.
    environment = {name: os.environ[name] for name in os.environ.keys() - _GIT_VARIABLES}
    environment["LC_ALL"] = "C"

    # A repository may name a program in core.fsmonitor, which would run here.
    command = ("git", "-c", "core.fsmonitor=false", "-C", str(folder), *arguments)
    try:
        return subprocess.run(
            command, capture_output=True, env=environment, timeout=GIT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ListingError(
            f"--project={folder}: git has not listed the project's files within {GIT_TIMEOUT_S} s. "
            "Remove large folders of untracked files, or add them to .gitignore."
        ) from None


def _list_by_git(root: Path, subfolder: str) -> Iterator[_Candidate]:
    """Yield tracked files, and untracked ones that are not ignored."""
    folder = root / subfolder
    # -z: names may contain anything
    tracked = _output_names(folder, "ls-files", "-z", "--cached")
    others = _output_names(folder, "ls-files", "-z", "--others", "--exclude-standard")

    # Ray's users leave tracked files out by this one.
    ignored: set[str] = set()
    if any(name.rpartition("/")[2] == ".rayignore" for name in [*tracked, *others]):
        ignored = _ignored_by(folder, ".rayignore")

    # as dictionaries: a conflict lists a file several times
    for names, is_tracked in ((dict.fromkeys(tracked), True), (dict.fromkeys(others), False)):
        for name in names:
            if name not in ignored:
                yield _Candidate(_join(subfolder, name.rstrip("/")), is_tracked)


def _walk_and_ignore(
    root: Path, subfolder: str, is_excluded: Callable[[str], bool]
) -> Iterator[_Candidate]:
    """Yield all files below a folder that is no work tree, but those that ignore files name."""
    names = list(_walk(root, subfolder, is_excluded))
    found = {name.rpartition("/")[2] for name in names}

    ignored: set[str] = set()
    for ignore_file in IGNORE_FILES:
        if ignore_file in found:
            ignored |= _ignored_by(root / subfolder, ignore_file)

    for name in names:
        if os.path.relpath(name, subfolder or ".") not in ignored:
            yield _Candidate(name, is_tracked=False)


def _walk(root: Path, subfolder: str, is_excluded: Callable[[str], bool]) -> Iterator[str]:
    try:
        entries = sorted(os.scandir(root / subfolder), key=lambda entry: entry.name)
    except OSError as error:
        raise ListingError(
            f"--project: the folder {shown(subfolder)} cannot be read ({error.strerror}). {_REMEDY}"
        ) from error

    for entry in entries:
        path = _join(subfolder, entry.name)
        # not through links to folders, which may lead in circles
        if not entry.is_dir(follow_symlinks=False):
            yield path
        # without excluded folders, which may be large
        elif not _is_left_out(path, is_excluded):
            if os.path.lexists(os.path.join(entry.path, ".git")):
                yield path  # a repository: its own git lists it
            else:
                yield from _walk(root, path, is_excluded)


def _ignored_by(folder: Path, ignore_file: str) -> set[str]:
    """Return the files below a folder that ignore files of this name exclude, by git's rules."""
    # Git itself reads them, in a repository that knows no file.
    with scratch.folder("repository") as empty:
        try:
            _git(folder, "init", "-q", "--bare", str(empty))
            names = _output_names(
                folder,
                *(f"--git-dir={empty}", f"--work-tree={folder}", "ls-files", "-z", "--others"),
                *("--ignored", f"--exclude-per-directory={ignore_file}"),
            )
        except FileNotFoundError:
            raise ListingError(
                f"--project: holds a {ignore_file}, but git is not installed, so the files that it "
                f"ignores are not known. Install git, or exclude them (--exclude) and remove the "
                f"{ignore_file}."
            ) from None
    return set(names)


def _output_names(folder: Path, *arguments: str) -> list[str]:
    """Return the names that a git command prints, separated by NUL."""
    done = _git(folder, *arguments)
    if done.returncode:
        reason = done.stderr.decode("utf-8", "replace").strip().split("\n")[0]
        raise ListingError(
            f"--project={folder}: git does not list the project's files ({reason[:200]}). Correct "
            "that, or copy the project to a folder without .git."
        )
    return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]


def _add_links(root: Path, links: list[_Candidate], files: dict[str, ProjectFile]) -> Iterator[str]:
    """Add to `files` what links name within the project; yield a line for each that leaves it."""
    uploaded = dict(files)
    for name, is_tracked in links:
        try:
            target = Path(os.path.realpath(root / name, strict=True))
        except OSError:  # it names nothing, or leads in a circle
            continue

        if not target.is_relative_to(root):
            yield (
                f"--project: {shown(name)} is a link out of the project. Links within it are "
                "allowed, and uploaded as what they name. Copy the file there, exclude the link "
                "(--exclude), or remove it. Nothing was uploaded."
            )
            continue

        source = target.relative_to(root).as_posix()
        if source in uploaded:
            files[name] = ProjectFile(name, uploaded[source].source, is_tracked)
        elif target.is_dir() and f"{name}/".startswith(f"{source}/".removeprefix("./")):
            yield (
                f"--project: {shown(name)} is a link to a folder that it lies in, and would be "
                f"uploaded without end. {_REMEDY}"
            )
        elif target.is_dir():
            # all below that folder, but not the links there: they may lead back here
            for other in uploaded:
                if other.startswith(f"{source}/"):
                    below = other.removeprefix(source)
                    files[name + below] = ProjectFile(name + below, other, is_tracked)


class _RunFolders:
    """Recognizes folders of runs, each of which is looked at once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._is_run: dict[str, bool] = {}

    def hold(self, name: str) -> bool:
        """Return whether a file belongs to a run of ours, or lies in a folder of runs."""
        folders = name.split("/")[:-1]
        for depth in range(1, len(folders) + 1):
            folder = "/".join(folders[:depth])
            if folder not in self._is_run:
                self._is_run[folder] = self._look_at(self._root / folder)
            if self._is_run[folder]:
                return True
        return False

    @staticmethod
    def _look_at(folder: Path) -> bool:
        if (folder / "run.yaml").is_file() and (folder / "attempts").is_dir():
            return True

        # A folder of runs holds one folder for each run. A package of that name holds modules.
        return folder.name.lower() == "runs" and not any(
            path.is_file() for path in folder.iterdir()
        )


def _mode(path: Path) -> int:
    try:
        return os.lstat(path).st_mode
    except OSError:  # git also lists tracked files that were deleted
        return 0


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(name: str) -> str:
    """Return a name for a message: control characters and undecodable bytes are escaped."""
    if name.isprintable() and _is_utf8(name):
        return name
    return name.encode("unicode_escape").decode() if _is_utf8(name) else ascii(name)[1:-1]
