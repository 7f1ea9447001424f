"""Selects the files of a project that are uploaded with a job, and refuses credentials among them.

Ray packs the folder (`working_dir`) without files that .gitignore or `EXCLUDES` match. Guarantees:
environment files, keys, repositories, runs and caches are never uploaded; a file with a credential
of this environment or a private key is refused by name before anything is uploaded, and so is a
folder that is too large for Ray.
"""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from dist_ft.core.redaction import secrets_of_environment

EXCLUDES = (
    ".git",
    ".venv",
    "venv",
    "__pycache__",
    ".env",
    ".env.*",
    "*.env",
    ".envrc",
    ".netrc",
    ".aws",
    ".ssh",
    ".kube",
    ".docker",
    "kubeconfig*",
    "*.pem",
    "*.key",
    "*.p12",
    "id_rsa*",
    "id_ed25519*",
    "credentials",
    "*credentials*.json",
    ".pypirc",
    ".huggingface",
    "service-account*.json",
    "/runs",
    "wandb",
    "mlruns",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
    ".ipynb_checkpoints",
    "*.egg-info",
    "core.[0-9]*",
)
"""Patterns as in .gitignore; those that start with a slash are relative to the project's folder."""
MAX_BYTES = 400 * 2**20
"""Ray accepts 500 MiB."""
SCANNED_BYTES = 4 * 2**20
"""How much of each file is searched for credentials."""
_PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")


def files(folder: Path, excludes: Sequence[str] = EXCLUDES) -> Iterator[str]:
    """Yield the paths of the uploaded files, relative to `folder`."""
    try:
        # Ray respects .gitignore when it packs a folder, so git lists what it will upload:
        # tracked files, and untracked ones that are not ignored. -z: names may contain anything.
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=folder,
            capture_output=True,
            timeout=60,
            check=True,
        ).stdout
        names = [os.fsdecode(name) for name in listed.split(b"\0") if name]
    except (OSError, subprocess.SubprocessError):  # no git, no repository
        names = list(_walk(folder, "", excludes))

    for name in names:
        # git also lists tracked files that were deleted, submodules (folders) and dangling links
        if not is_excluded(name, excludes) and (folder / name).is_file():
            yield name


def _walk(folder: Path, subfolder: str, excludes: Sequence[str]) -> Iterator[str]:
    """Yield all files below a folder, without excluded folders, which may be large."""
    for entry in sorted(os.scandir(folder / subfolder), key=lambda entry: entry.name):
        path = os.path.join(subfolder, entry.name)
        # not through links to folders, which may lead in circles
        if entry.is_dir(follow_symlinks=False):
            if not is_excluded(path, excludes):
                yield from _walk(folder, path, excludes)
        else:
            yield path


def is_excluded(path: str, excludes: Sequence[str] = EXCLUDES) -> bool:
    """Return whether a relative path, or a folder above it, is excluded."""
    parts = Path(path).parts
    for pattern in excludes:
        # as in .gitignore: a slash at the end does not anchor a pattern
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
    """Yield a line for each reason not to upload `folder`."""
    secrets = {value.encode(): name for value, name in secrets_of_environment().items()}
    remedy = "Exclude it (--exclude, .gitignore) or remove it. Nothing was uploaded."

    sizes: dict[str, int] = {}
    for name in files(folder, excludes):
        sizes[name] = (folder / name).stat().st_size

        with open(folder / name, "rb") as file:
            content = file.read(SCANNED_BYTES)

        variables = [variable for value, variable in secrets.items() if value in content]
        secret = None
        if variables:
            secret = f"the value of {variables[0]}"
        # Python code and its tests may contain the marker as a pattern, as this module does.
        elif _PRIVATE_KEY.search(content) and not name.endswith(".py"):
            secret = "a private key"

        if secret:
            yield (
                f"--project: {name} contains {secret}, and the project is uploaded to the cluster. "
                f"{remedy}"
            )

    total = sum(sizes.values())
    if total > MAX_BYTES:
        # uncompressed, as the archive does not exist yet: an upper bound of what Ray measures
        largest = ", ".join(sorted(sizes, key=lambda name: -sizes[name])[:3])
        yield (
            f"--project={folder}: {total / 2**20:.0f} MiB would be uploaded, at most "
            f"{MAX_BYTES / 2**20:.0f} are allowed. Exclude large files (--exclude; largest: "
            f"{largest}), or use the project in the image (--no-package)."
        )
