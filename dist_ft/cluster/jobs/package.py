"""Packs a project for upload with a job, and refuses credentials in it.

Ray gets a zip archive that this module wrote, of exactly the files that `project_files` lists.
Guarantees: keys, environment files, repositories, runs and caches are never uploaded; a file with a
credential of this environment, a private key or a known kind of token is refused by name before
anything is uploaded, and so is a project that is too large for Ray; the bytes that were searched
are the bytes in the archive, whatever changes meanwhile. Memory does not depend on the size of a
file.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import stat
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from dist_ft.cluster.jobs.project_files import (
    Listing,
    ProjectFile,
    list_files,
    open_file,
    shown,
)
from dist_ft.cluster.jobs.secret_content import CHUNK_BYTES, SecretScanner, variable_spellings
from dist_ft.cluster.jobs.secret_names import is_secret_name

EXCLUDES = (
    ".git",
    ".hg",
    ".svn",
    ".venv",
    "venv",
    "__pycache__",
    "/runs",
    "wandb",
    "mlruns",
    ".cache",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
    ".ipynb_checkpoints",
    ".tox",
    ".nox",
    "node_modules",
    "*.egg-info",
    "core.[0-9]*",
)
"""Files without use for a job: patterns as in .gitignore; those that start with a slash are
relative to the project's folder. Names of credentials are in `secret_names`."""
MAX_BYTES = 400 * 2**20
"""Ray accepts 500 MiB."""
MAX_AGE_S = 24 * 3600.0
"""Archives of commands that were killed are removed after this time."""


@dataclass(frozen=True)
class Package:
    """A packed project.

    Attributes:
        archive: the zip archive, in a folder of this user only.
        names: the files in it.
    """

    archive: Path
    names: tuple[str, ...]

    def remove(self) -> None:
        """Remove the archive."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self.archive.unlink()


@dataclass(frozen=True)
class PackedProject:
    """The result of packing: a package, or one line for each reason not to upload the project."""

    package: Package | None = None
    problems: tuple[str, ...] = ()

    def remove(self) -> None:
        """Remove the archive, if there is one."""
        if self.package is not None:
            self.package.remove()


def files(folder: Path, excludes: Sequence[str] = EXCLUDES) -> Iterator[str]:
    """Yield the paths of the uploaded files, relative to `folder`."""
    for file in _list(folder, excludes).files:
        yield file.name


def _list(folder: Path, excludes: Sequence[str]) -> Listing:
    return list_files(folder, lambda path: _matches(path, excludes))


def is_excluded(path: str, excludes: Sequence[str] = EXCLUDES) -> bool:
    """Return whether a relative path, or a folder above it, is never uploaded."""
    return _matches(path, excludes) or is_secret_name(os.path.normpath(path))


def _matches(path: str, patterns: Sequence[str]) -> bool:
    """Return whether a relative path, or a folder above it, matches a pattern."""
    parts = Path(path).parts
    for pattern in patterns:
        # as in .gitignore: at any depth, and a slash at the end does not anchor a pattern
        pattern = pattern.removeprefix("**/")
        is_anchored = "/" in pattern.rstrip("/")

        for depth, name in enumerate(parts):
            if is_anchored:
                # each folder above the file too: a pattern that matches it excludes its files
                matches = fnmatch.fnmatch("/".join(parts[: depth + 1]), pattern.strip("/"))
            else:
                matches = fnmatch.fnmatch(name, pattern.rstrip("/"))
            if matches:
                return True
    return False


def find_problems(folder: Path, excludes: Sequence[str] = EXCLUDES) -> Iterator[str]:
    """Yield a line for each reason not to upload `folder`; writes nothing."""
    listing = _list(folder, excludes)
    yield from listing.problems
    yield from _copy(folder, listing.files, None)


def pack(folder: Path, excludes: Sequence[str], cache: Path) -> PackedProject:
    """Write the archive of a project.

    Args:
        folder: the project's folder.
        excludes: patterns of files that are left out.
        cache: local folder for the archive; older ones that were left there are removed.
    """
    listing = _list(folder, excludes)
    path = cache / f"{uuid4().hex}.zip"
    package = Package(path, tuple(file.name for file in listing.files))
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        _remove_old(cache)

        # Only this user may read it: the project may be private.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with (
            os.fdopen(descriptor, "wb") as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        ):
            problems = (*listing.problems, *_copy(folder, listing.files, archive))
    except OSError as error:
        problems = (
            f"{cache}: the project's archive cannot be written there ({error.strerror or error}). "
            "A folder of your own with enough free space is needed. Correct that.",
        )
    if problems:
        package.remove()
        return PackedProject(None, problems)
    return PackedProject(package, ())


def _copy(
    folder: Path, listed: Sequence[ProjectFile], archive: zipfile.ZipFile | None
) -> Iterator[str]:
    """Search all files, and copy them into the archive if there is one; yield problems."""
    root = Path(os.path.realpath(folder))
    variables = variable_spellings()
    sizes: dict[str, int] = {}
    total = 0

    for listed_file in listed:
        name = listed_file.name
        scanner = SecretScanner(name, variables)
        try:
            with open_file(root, listed_file.source) as file:
                # Of a project that is too large nothing more is written.
                fits = total + os.fstat(file.fileno()).st_size <= MAX_BYTES
                sizes[name] = _copy_file(file, name, scanner, archive if fits else None)
                total += sizes[name]
        except OSError as error:
            yield (
                f"--project: {shown(name)} cannot be read ({error.strerror or error}). Exclude it "
                "(--exclude, .gitignore) or make it readable. Nothing was uploaded."
            )

        if scanner.found:
            yield (
                f"--project: {shown(name)} contains {scanner.found}, and the project is uploaded "
                "to the cluster. Exclude it (--exclude, .gitignore) or remove it. Nothing was "
                "uploaded."
            )

    if total > MAX_BYTES:
        # uncompressed: an upper bound of what Ray measures
        largest = ", ".join(map(shown, sorted(sizes, key=lambda name: -sizes[name])[:3]))
        yield (
            f"--project={folder}: {total / 2**20:.0f} MiB would be uploaded, at most "
            f"{MAX_BYTES / 2**20:.0f} are allowed. Exclude large files (--exclude; largest: "
            f"{largest}), or use the project in the image (--no-package)."
        )


def _copy_file(
    file: BinaryIO, name: str, scanner: SecretScanner, archive: zipfile.ZipFile | None
) -> int:
    """Search a file, and copy it into the archive if there is one; return its bytes."""
    # A file that grows as it is read has no end.
    limit = MAX_BYTES + CHUNK_BYTES
    num_bytes = 0
    target = None
    if archive is not None:
        target = archive.open(_entry(name, os.fstat(file.fileno()).st_mode), "w")

    try:
        while num_bytes < limit and (chunk := file.read(CHUNK_BYTES)):
            num_bytes += len(chunk)
            scanner.feed(chunk)
            if target is not None:
                target.write(chunk)
    finally:
        if target is not None:
            target.close()
    return num_bytes


def _entry(name: str, mode: int) -> zipfile.ZipInfo:
    """Return the archive's entry of a file, without its time: it depends on the content only."""
    # errors="replace" never applies to a package that is uploaded: such names are a problem.
    entry = zipfile.ZipInfo(name.encode("utf-8", "replace").decode())
    permissions = 0o644
    if mode & stat.S_IXUSR:
        permissions = 0o755
    entry.external_attr = (stat.S_IFREG | permissions) << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    return entry


def _remove_old(cache: Path) -> None:
    """Remove archives that a command left behind because it was killed."""
    for path in cache.glob("*.zip"):
        try:
            is_old = time.time() - path.lstat().st_mtime > MAX_AGE_S
            if is_old:
                path.unlink()
        except FileNotFoundError:  # another command removed it
            continue
