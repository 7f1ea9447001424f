"""Folders of caches and temporary files belong to one user, or are refused in one line."""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dist_ft.core import private_folders
from dist_ft.core.errors import FolderError
from dist_ft.core.private_folders import open_part, require_safe, user_folder

OTHER_USER = 4242
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def refused(folder: Path, name: str = "tokens") -> str:
    """Return the line that refuses a folder; it has no second one and says what to do."""
    with pytest.raises(FolderError) as raised:
        open_part(folder, name, "data.cache_dir")
    line = str(raised.value)
    assert line.startswith(f"data.cache_dir={folder}: ") and "\n" not in line
    assert "Set data.cache_dir to one, or set DIST_FT_SHARED_FOLDERS=" in line
    return line


def test_new_folders_are_private_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        part = open_part(tmp_path / "new" / "cache", "tokens", "data.cache_dir")
    finally:
        os.umask(before)
    assert (mode(part), mode(part.parent)) == (0o700, 0o700)


def test_part_of_an_earlier_version_becomes_private_and_the_folder_stays_as_it_is(tmp_path):
    """`data.cache_dir` may be a home folder; only what this program made in it is changed."""
    part = tmp_path / "tokens"
    part.mkdir()
    part.chmod(0o775)
    tmp_path.chmod(0o755)
    (part / "block").touch()
    assert open_part(tmp_path, "tokens", "data.cache_dir") == part
    assert (mode(part), mode(tmp_path)) == (0o700, 0o755)
    assert (part / "block").exists()


@pytest.mark.parametrize("which", [".", "tokens"])
def test_folder_that_every_user_may_write_to_is_refused(tmp_path, which):
    (tmp_path / "tokens").mkdir()
    (tmp_path / which).chmod(0o777)
    assert "every user of this machine may write to" in refused(tmp_path)
    assert mode(tmp_path / which) == 0o777


@as_root
@pytest.mark.parametrize("which", [".", "tokens"])
def test_folder_of_another_user_is_refused_even_for_root(tmp_path, which):
    (tmp_path / "tokens").mkdir(mode=0o700)
    os.chown(tmp_path / which, OTHER_USER, OTHER_USER)
    line = refused(tmp_path)
    assert f"belongs to user {OTHER_USER}" in line
    assert f"A folder of user {pwd.getpwuid(0).pw_name} that nobody else can write to" in line


@as_root
@pytest.mark.parametrize("which", ["", "tokens"])
def test_link_of_another_user_is_refused(tmp_path, which):
    cache, target = tmp_path / "cache", tmp_path / "target"
    target.mkdir(mode=0o700)
    link = cache / which if which else cache
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(target)
    os.chown(link, OTHER_USER, OTHER_USER, follow_symlinks=False)
    assert f"is a link that user {OTHER_USER} made" in refused(cache)
    assert not list(target.iterdir())


def test_own_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "disk")
    part = open_part(tmp_path / "cache", "tokens", "data.cache_dir")
    assert part.is_dir() and mode(tmp_path / "disk/tokens") == 0o700


def test_link_to_nowhere_and_file_are_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "cannot be" in refused(tmp_path / "link")
    (tmp_path / "file").touch()
    assert "is not a folder" in refused(tmp_path / "file")
    (tmp_path / "tokens").touch()
    assert "tokens" in refused(tmp_path)


@as_root
def test_parts_in_a_folder_like_tmp_are_allowed(tmp_path):
    """Root owns it and it has the sticky bit: nobody else can replace a part of it."""
    tmp_path.chmod(0o1777)
    part = open_part(tmp_path, "tokens", "data.cache_dir")
    assert (mode(part), mode(tmp_path)) == (0o700, 0o1777)


@as_root
def test_folder_of_an_administrator_is_used_as_it_is_if_it_is_named(tmp_path, monkeypatch):
    os.chown(tmp_path, OTHER_USER, OTHER_USER)
    tmp_path.chmod(0o2777)
    refused(tmp_path)

    monkeypatch.setenv(private_folders.SHARED_FOLDERS, f"/nowhere:{tmp_path}")
    before = os.umask(0o002)
    try:
        part = open_part(tmp_path, "tokens", "data.cache_dir")
        below = open_part(tmp_path / "below", "tokens", "data.cache_dir")
    finally:
        os.umask(before)
    assert (mode(part), mode(below)) == (0o2775, 0o2775)
    assert mode(tmp_path) == 0o2777

    # A folder next to it whose name starts alike is not named.
    sibling = tmp_path.with_name(tmp_path.name + "-2")
    sibling.mkdir()
    os.chown(sibling, OTHER_USER, OTHER_USER)
    refused(sibling)


def test_a_check_creates_nothing(tmp_path):
    require_safe(tmp_path / "cache", "data.cache_dir")
    private_folders.require_own_part(tmp_path / "cache", "tokens", "data.cache_dir")
    assert not list(tmp_path.iterdir())


@as_root
def test_folder_of_root_that_others_cannot_write_to_is_safe_but_has_no_parts_of_a_user():
    """As another user, in a process of its own."""
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom dist_ft.core import private_folders\n"
        "os.setgid(4242)\nos.setuid(4242)\n"
        "private_folders.require_safe(Path(sys.argv[1]), 'data.cache_dir')\n"
        "try:\n    private_folders.open_part(Path(sys.argv[1]), 'tokens', 'data.cache_dir')\n"
        "except private_folders.FolderError as error:\n    print(error)\n"
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        done = subprocess.run(
            [sys.executable, "-c", program, folder], capture_output=True, text=True, check=True
        )
    assert "tokens cannot be created (Permission denied)" in done.stdout


@pytest.fixture
def own_temp(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"dist_ft-{os.geteuid()}"


def test_user_folder_is_private(own_temp):
    assert user_folder() == own_temp and mode(own_temp) == 0o700
    own_temp.chmod(0o755)
    assert user_folder() == own_temp and mode(own_temp) == 0o700


def test_code_that_torch_compiles_is_private(own_temp, monkeypatch):
    monkeypatch.delenv(private_folders.COMPILED_CODE_VARIABLE, raising=False)
    private_folders.keep_compiled_code_private()
    assert os.environ[private_folders.COMPILED_CODE_VARIABLE] == str(own_temp / "torchinductor")

    monkeypatch.setenv(private_folders.COMPILED_CODE_VARIABLE, "/mine")
    private_folders.keep_compiled_code_private()
    assert os.environ[private_folders.COMPILED_CODE_VARIABLE] == "/mine"


def test_user_folder_that_others_may_write_to_is_not_used(own_temp):
    own_temp.mkdir()
    own_temp.chmod(0o770)
    assert user_folder() is None


def test_link_in_place_of_the_user_folder_is_not_used(own_temp, tmp_path):
    (tmp_path / "mine").mkdir(mode=0o700)
    own_temp.symlink_to(tmp_path / "mine")
    assert user_folder() is None


@as_root
def test_user_folder_that_another_user_created_first_is_not_used(own_temp):
    own_temp.mkdir(mode=0o700)
    os.chown(own_temp, OTHER_USER, OTHER_USER)
    assert user_folder() is None
