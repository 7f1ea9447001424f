"""The archive of a project holds exactly the listed files, as they were searched for credentials."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
from packing_names import HONEST, SECRET

from dist_ft.cluster.jobs import package

EXCLUDED = [
    *(".git/config", ".env", ".env.local", "prod.env", "sub/.env", ".venv/x.py", "runs/a/run.yaml"),
    *("sub/__pycache__/x.pyc", "tls.pem", "sub/id_rsa", ".aws/credentials", "wandb/run", ".netrc"),
    *("my-credentials-2.json", "kubeconfig.yaml"),
]
PACKED = ["a.py", "configs/x.yaml", "pkg/credentials.py", "pkg/runs/x.py", "environment.txt"]


def write(folder, *names, text="text\n"):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    write(folder, *EXCLUDED, *PACKED)
    return folder


def pack(project, tmp_path, *excludes):
    return package.pack(project, [*package.EXCLUDES, *excludes], tmp_path / "packages")


def content(packed):
    with zipfile.ZipFile(packed.package.archive) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name).decode() for name in archive.namelist()}


def test_uploaded_files(project):
    assert sorted(package.files(project)) == sorted(PACKED)
    for pattern in ("*.py", "**/*.py"):
        names = set(package.files(project, [*package.EXCLUDES, pattern]))
        assert names == {name for name in PACKED if not name.endswith(".py")}


def test_gitignore_is_respected_in_a_repository(project):
    subprocess.run(["rm", "-r", str(project / ".git")], check=True)
    if subprocess.run(["git", "init", "-q", str(project)], capture_output=True).returncode:
        pytest.skip("needs git")
    (project / ".gitignore").write_text("configs/\n")
    assert sorted(package.files(project)) == sorted({*PACKED, ".gitignore"} - {"configs/x.yaml"})


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git, for a .gitignore")
def test_archive_holds_exactly_the_listed_files(project, tmp_path):
    write(project, *SECRET, *HONEST)
    (project / "link.py").symlink_to("a.py")
    (project / "run.sh").write_text("echo\n")
    (project / "run.sh").chmod(0o755)

    packed = pack(project, tmp_path)
    found = content(packed)
    expected = sorted({*PACKED, *HONEST, "link.py", "run.sh"})
    assert sorted(found) == expected == sorted(packed.package.names)
    assert found["link.py"] == "text\n"

    with zipfile.ZipFile(packed.package.archive) as archive:
        modes = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
    assert modes["run.sh"] & 0o777 == 0o755 and modes["a.py"] & 0o777 == 0o644
    assert all(mode & 0o170000 == 0o100000 for mode in modes.values()), "no link, no device"


def test_archive_is_of_this_user_only_and_is_removed(project, tmp_path):
    packed = pack(project, tmp_path).package
    assert packed.archive.stat().st_mode & 0o077 == 0
    assert packed.archive.parent.stat().st_mode & 0o077 == 0
    packed.remove()
    packed.remove()
    assert list(packed.archive.parent.iterdir()) == []


def test_old_archives_are_removed(project, tmp_path):
    old, new = pack(project, tmp_path).package.archive, pack(project, tmp_path).package.archive
    before = time.time() - package.MAX_AGE_S - 10
    os.utime(old, (before, before))
    pack(project, tmp_path)
    assert not old.exists() and new.exists()


def test_equal_projects_give_equal_archives(project, tmp_path):
    first = pack(project, tmp_path).package.archive.read_bytes()
    os.utime(project / "a.py", (1, 1))
    assert pack(project, tmp_path).package.archive.read_bytes() == first


def test_file_with_a_credential_is_named_without_the_credential(project, monkeypatch, tmp_path):
    monkeypatch.setenv("MY_STORE_SECRET", "hush-hush-hush")
    (project / "notes.txt").write_text("the key is hush-hush-hush\n")
    (project / ".env").write_text("MY_STORE_SECRET=hush-hush-hush\n")
    (project / "key.txt").write_text("-----BEGIN RSA PRIVATE " + "KEY-----\nx\n")
    lines = list(package.find_problems(project))
    assert [line.split(", and")[0] for line in lines] == [
        "--project: key.txt contains a private key",
        "--project: notes.txt contains the value of MY_STORE_SECRET",
    ]
    assert "hush" not in " ".join(lines)

    packed = pack(project, tmp_path)
    assert packed.package is None and list(packed.problems) == lines
    assert list((tmp_path / "packages").iterdir()) == [], "no archive is left behind"
    assert pack(project, tmp_path, "notes.txt", "key.txt").problems == ()


def test_what_was_searched_is_what_is_packed(project, tmp_path, monkeypatch):
    """A file that is replaced between its search and its upload does not get into the archive."""
    outside = tmp_path / "outside.log"
    outside.write_text("of the system\n")
    copy_file = package._copy_file

    def replaced(file, name, scanner, archive):
        # after it was opened, and before the next file is
        for path in (project / "a.py", project / "configs/x.yaml"):
            path.unlink(missing_ok=True)
            path.symlink_to(outside)
        return copy_file(file, name, scanner, archive)

    monkeypatch.setattr(package, "_copy_file", replaced)
    packed = pack(project, tmp_path)
    assert packed.package is None
    [line] = packed.problems
    assert "configs/x.yaml cannot be read" in line


def test_error_for_a_large_project_names_large_files(project, monkeypatch, tmp_path):
    monkeypatch.setattr(package, "MAX_BYTES", 1000)
    (project / "big.bin").write_bytes(b"x" * 2000)
    [line] = package.find_problems(project)
    assert "largest: big.bin" in line
    assert pack(project, tmp_path).problems == (line,)


def test_file_that_grows_without_end_is_not_read_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "MAX_BYTES", 10_000)
    monkeypatch.setattr(package, "CHUNK_BYTES", 1000)

    class Growing:
        num_read = 0

        def read(self, count):
            self.num_read += count
            assert self.num_read < 100_000
            return b"x" * count

        def fileno(self):
            return 0

    scanner = package.SecretScanner("x", {})
    assert package._copy_file(Growing(), "x", scanner, None) <= 11_000


def test_folder_without_space_is_one_line(project, tmp_path):
    (tmp_path / "packages").write_text("a file")
    [line] = pack(project, tmp_path).problems
    assert "the project's archive cannot be written there" in line


def test_excluded_config_paths():
    assert package.is_excluded("runs/x") and package.is_excluded("sub/.env")
    assert not package.is_excluded("data/*.jsonl") and not package.is_excluded("./data/x")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_this_project_can_be_packed(tmp_path):
    root = Path(__file__).resolve().parents[4]
    if not (root / ".git").exists():
        pytest.skip("needs the repository")
    assert list(package.find_problems(root)) == []
    names = set(package.files(root))
    assert {"pyproject.toml", "dist_ft/cluster/jobs/package.py", "dist_ft/runs/report.py"} <= names
