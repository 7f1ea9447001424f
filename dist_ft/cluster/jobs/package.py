"""What of a project's folder goes along with a job, and whether a credential would.

Ray packs the folder (`working_dir`), leaving out what .gitignore names and `EXCLUDES`. Guarantees: environment files,
keys, repositories, runs and caches are never packed; a file that holds a credential of this environment, or a private
key, is refused by name before anything is sent, as is a folder that Ray would not take for its size.
"""

from __future__ import annotations

import fnmatch
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from dist_ft.core.logs import SECRET_NAME

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
"""Patterns as in .gitignore; those with a slash in front count from the project's folder."""
MOST_BYTES = 400 * 2**20
"""Ray takes 500 MiB."""
SCANNED_BYTES = 4 * 2**20
_PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")


def files(folder: Path, excludes: Sequence[str] = EXCLUDES) -> Iterator[str]:
    """Yield the paths, relative to `folder`, of what is packed."""
    try:
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
    yield from (
        name for name in names if not is_excluded(name, excludes) and (folder / name).is_file()
    )


def _walk(folder: Path, below: str, excludes: Sequence[str]) -> Iterator[str]:
    """Yield files, never entering excluded folders, which may be large."""
    for entry in sorted(os.scandir(folder / below), key=lambda entry: entry.name):
        path = os.path.join(below, entry.name)
        if entry.is_dir(follow_symlinks=False):
            if not is_excluded(path, excludes):
                yield from _walk(folder, path, excludes)
        else:
            yield path


def is_excluded(path: str, excludes: Sequence[str] = EXCLUDES) -> bool:
    """Tell whether a relative path, or a folder above it, is left out. Pure."""
    parts = Path(path).parts
    return any(
        fnmatch.fnmatch("/".join(parts[: depth + 1]), pattern.strip("/"))
        if "/" in pattern.rstrip("/")
        else fnmatch.fnmatch(parts[depth], pattern.rstrip("/"))
        for pattern in excludes
        for depth in range(len(parts))
    )


def problems(folder: Path, excludes: Sequence[str] = EXCLUDES) -> Iterator[str]:
    """Yield a line for each reason not to send `folder`."""
    secrets = {
        value.encode(): name
        for name, value in os.environ.items()
        if len(value) >= 8 and SECRET_NAME.search(name) and not name.endswith(("_PATH", "_FILE"))
    }
    remedy = "leave it out (--exclude, .gitignore) or take it out; nothing was sent"
    sizes: dict[str, int] = {}
    for name in files(folder, excludes):
        sizes[name] = (folder / name).stat().st_size
        with open(folder / name, "rb") as file:
            content = file.read(SCANNED_BYTES)
        found = next((variable for value, variable in secrets.items() if value in content), None)
        if found is not None:
            yield f"--project: {name} holds the value of {found}, and the project is sent to the cluster; {remedy}"
        elif _PRIVATE_KEY.search(content) and not name.endswith(".py"):
            yield f"--project: {name} holds a private key, and the project is sent to the cluster; {remedy}"
    if (total := sum(sizes.values())) > MOST_BYTES:
        largest = ", ".join(sorted(sizes, key=lambda name: -sizes[name])[:3])
        yield (
            f"--project={folder}: {total / 2**20:.0f} MiB would be sent, {MOST_BYTES / 2**20:.0f} at most are "
            f"allowed; leave out what is large (--exclude; largest: {largest}), or --no-package and use the image's"
        )
