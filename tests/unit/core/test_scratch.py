"""Temporary folders of killed processes are removed, those of living ones never."""

from __future__ import annotations

import ast
import os
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import dist_ft
from dist_ft.core import scratch

HOLDER = (
    "import sys, time\nfrom pathlib import Path\nfrom dist_ft.core import scratch\n"
    "how, path = sys.argv[1:]\n"
    "made = scratch.create('stacks') if how == 'own' else scratch.create_next_to(Path(path), 'export')\n"
    "(made.path / 'file').write_text('x')\nprint(made.path, flush=True)\ntime.sleep(600)\n"
)


@pytest.fixture(autouse=True)
def own_temp(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path / f"dist_ft-{os.geteuid()}"


def hold(how: str = "own", path: str = "") -> tuple[subprocess.Popen[str], Path]:
    """Start a process with a temporary folder; return both."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, how, path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def test_folder_is_private_and_gone_at_the_end(own_temp):
    with scratch.folder("drill") as folder:
        (folder / "file").touch()
        assert folder.parent == own_temp and folder.name.startswith("drill-")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not list(own_temp.iterdir())


def test_folder_of_a_killed_process_is_removed_by_the_next_and_that_of_a_living_one_stays(own_temp):
    (killed, left), (alive, used) = hold(), hold()
    kill(killed)
    assert (left / "file").exists()
    with scratch.folder("drill") as folder:
        assert {left, used, folder} & set(own_temp.iterdir()) == {used, folder}
        assert (used / "file").exists()
    kill(alive)
    scratch.create("drill").remove()
    assert not list(own_temp.iterdir())


def test_folder_next_to_a_file_is_removed_after_a_kill(tmp_path):
    """An export that was killed half-way leaves gigabytes."""
    target = tmp_path / "models" / "out"
    target.parent.mkdir()
    (target.parent / ".tmp-export-notes.txt").touch()
    process, left = hold("next", str(target))
    assert left.parent == target.parent and left.name.startswith(".tmp-export-")
    with scratch.folder_next_to(target, "export"):
        assert left.exists()
    kill(process)
    with scratch.folder_next_to(target, "export"):
        assert not left.exists()
    assert [path.name for path in target.parent.iterdir()] == [".tmp-export-notes.txt"]


def test_folder_from_another_boot_or_machine_is_removed_only_when_it_is_old(tmp_path):
    """On a network disk the lock of another machine may not be visible here."""
    folder = tmp_path / ".tmp-export-00000000-abcdef01"
    folder.mkdir()
    lock = tmp_path / f"{folder.name}.lock"
    lock.touch()
    scratch.create_next_to(tmp_path / "out", "export").remove()
    assert folder.exists()
    os.utime(lock, (lock.stat().st_mtime - 2 * scratch.OTHER_BOOT_S,) * 2)
    scratch.create_next_to(tmp_path / "out", "export").remove()
    assert not list(tmp_path.iterdir())


def test_logs_of_the_latest_ends_are_kept(own_temp):
    left = []
    for number in range(5):
        made = scratch.create("ray")
        lock = own_temp / f"{made.path.name}.lock"
        os.utime(lock, (1000 + number, 1000 + number))
        made.release()
        left.append(made.path)
    scratch.create("drill").remove()
    assert [path for path in left if path.exists()] == left[-scratch.KEPT["ray"] :]


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
def test_files_of_another_user_and_links_are_left_alone(own_temp, tmp_path):
    own_temp.mkdir(mode=0o700)
    precious = tmp_path / "precious"
    precious.touch()
    (own_temp / "stacks-1.lock").symlink_to(precious)
    (own_temp / "stacks-2.lock").touch()
    os.chown(own_temp / "stacks-2.lock", 4242, 4242)
    (own_temp / "stacks-3").symlink_to(tmp_path)
    (own_temp / "stacks-3.lock").touch()
    scratch.create("drill").remove()
    assert precious.exists() and (own_temp / "stacks-2.lock").exists()
    assert (own_temp / "stacks-1.lock").is_symlink() and tmp_path.exists()


def test_without_a_private_folder_a_random_one_is_used(own_temp, caplog):
    """Somebody else has created the known name: nothing is put there, and work continues."""
    own_temp.mkdir()
    own_temp.chmod(0o777)
    with scratch.folder("drill") as folder:
        assert folder.parent == own_temp.parent and folder.name.startswith("dist_ft-drill-")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not folder.exists() and not list(own_temp.iterdir())
    assert "set TMPDIR to a folder of yours" in caplog.text


def test_many_processes_create_and_collect_at_once(own_temp):
    """Each removes what others abandon, and nothing that somebody uses."""
    program = (
        "from dist_ft.core import scratch\nfor number in range(60):\n"
        "    made = scratch.create('stacks')\n    (made.path / 'file').write_text('x')\n"
        "    assert (made.path / 'file').read_text() == 'x'\n"
        "    made.release() if number % 3 == 0 else made.remove()\n"
    )
    with ThreadPoolExecutor(4) as threads:
        done = list(
            threads.map(
                lambda _: subprocess.run(
                    [sys.executable, "-c", program], capture_output=True, text=True
                ),
                range(4),
            )
        )
    assert [one.returncode for one in done] == [0] * 4, done[0].stderr
    scratch.create("drill").remove()
    assert not list(own_temp.iterdir())


def test_new_file_is_renamed_or_removed(tmp_path):
    path = tmp_path / "a.safetensors"
    with scratch.new_file(path) as new:
        new.file.write(b"x")
        new.file.flush()
        os.replace(new.path, path)
    assert path.read_bytes() == b"x"

    with pytest.raises(ZeroDivisionError), scratch.new_file(path) as new:
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == [path]


def test_other_modules_create_temporary_files_only_here():
    """`tempfile` elsewhere would leave files behind that nobody removes after a kill."""
    package = Path(dist_ft.__file__).parent
    allowed = {
        "core/scratch.py",
        "core/private_folders.py",
        "cli/failures.py",  # the traceback for a bug report, which stays
        "runtime/elastic/process_keeper.py",  # names the folder in a warning
        "training/notify/channels.py",  # a file without a name: the kernel removes it
    }
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import) and any(one.name == "tempfile" for one in node.names):
                found.add(str(path.relative_to(package)))
    assert found == allowed
