"""The files of a project: what git lists, what links name, what is no regular file."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading

import pytest
from packing_names import HONEST, SECRET

from dist_ft.cluster.jobs import package, project_files
from dist_ft.cluster.jobs.project_files import open_file

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def write(folder, *names, text="text\n"):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def git(folder, *arguments):
    command = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@y", *arguments]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


@pytest.fixture
def repository(project):
    git(project, "init", "-q")
    return project


def packed(folder, *excludes):
    return sorted(package.files(folder, [*package.EXCLUDES, *excludes]))


def problems(folder, *excludes):
    return list(package.find_problems(folder, [*package.EXCLUDES, *excludes]))


@needs_git
def test_names_outside_a_repository(project):
    write(project, *SECRET, *HONEST)
    assert packed(project) == sorted(HONEST) and problems(project) == []


@needs_git
def test_untracked_names_in_a_repository(repository):
    write(repository, *SECRET, *HONEST)
    assert packed(repository) == sorted(HONEST) and problems(repository) == []


@needs_git
def test_tracked_names_in_a_repository_are_refused_one_by_one(repository):
    write(repository, *SECRET, *HONEST)
    git(repository, "add", "-f", ".")
    assert packed(repository) == sorted(HONEST)
    lines = problems(repository)
    assert len(lines) == len([name for name in SECRET if not name.startswith(".cache/")])
    assert all("has the name of a credential, git tracks it" in line for line in lines)
    assert any("--project: infra/terraform.tfstate.backup has" in line for line in lines)
    assert problems(repository, *SECRET) == [], "they can be excluded by name"


@needs_git
def test_ignored_files_are_not_uploaded(repository):
    write(repository, "a.py", "data/x.txt", "notes", "sub/b.py", "sub/notes")
    (repository / ".gitignore").write_text("/notes\n*.txt\n")
    (repository / "sub/.gitignore").write_text("notes\n")
    assert packed(repository) == [".gitignore", "a.py", "sub/.gitignore", "sub/b.py"]


@needs_git
def test_ignore_files_count_without_a_repository_too(project):
    write(project, "a.py", "notes", "sub/b.py", "large.txt")
    (project / ".gitignore").write_text("notes\n")
    (project / "sub/.rayignore").write_text("b.py\n")
    assert packed(project) == [".gitignore", "a.py", "large.txt", "sub/.rayignore"]


@needs_git
def test_rayignore_leaves_out_tracked_files(repository):
    write(repository, "a.py", "large.bin", "cert.pem")
    git(repository, "add", ".")
    (repository / ".rayignore").write_text("*.bin\n*.pem\n")
    assert packed(repository) == [".rayignore", "a.py"] and problems(repository) == []


@needs_git
def test_submodules_and_repositories_within(repository, tmp_path):
    library = tmp_path / "library"
    write(library, "lib.py", ".env")
    git(library, "init", "-q")
    git(library, "add", "lib.py")
    git(library, "commit", "-q", "-m", "x")
    git(repository, "-c", "protocol.file.allow=always", "submodule", "add", str(library), "lib")
    write(repository, "lib/secret-notes", "lib/.env", "other/o.py", "other/ignored", "a.py")
    git(repository / "other", "init", "-q")
    (repository / "other/.gitignore").write_text("ignored\n")
    (repository / "empty").mkdir()
    assert packed(repository) == [
        *(".gitmodules", "a.py", "lib/lib.py", "lib/secret-notes", "other/.gitignore", "other/o.py")
    ]


@needs_git
def test_a_folder_of_a_repository_is_a_project(repository):
    write(repository, "a.py", "sub/b.py", "sub/.env", "sub/x.log")
    (repository / ".gitignore").write_text("*.log\n")
    assert packed(repository / "sub") == ["b.py"]


@needs_git
def test_an_ignored_folder_is_no_part_of_the_repository(repository):
    write(repository, "build/a.py", "build/.env")
    (repository / ".gitignore").write_text("build\n")
    assert packed(repository / "build") == ["a.py"]


@needs_git
def test_variables_of_a_hook_do_not_name_another_repository(repository, tmp_path, monkeypatch):
    write(repository, "a.py")
    git(tmp_path, "init", "-q", "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other/.git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "other"))
    assert packed(repository) == ["a.py"]


@needs_git
def test_deleted_and_conflicting_files(repository):
    write(repository, "a.py", "gone.py")
    git(repository, "add", ".")
    (repository / "gone.py").unlink()
    assert packed(repository) == ["a.py"]


@needs_git
def test_a_program_that_the_repository_names_is_not_run(repository, tmp_path):
    write(repository, "a.py")
    script = tmp_path / "monitor"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    script.chmod(0o755)
    git(repository, "config", "core.fsmonitor", str(script))
    assert packed(repository) == ["a.py"] and not (tmp_path / "ran").exists()


def test_repository_without_git_is_refused(project, monkeypatch):
    write(project, "a.py", ".git/HEAD")
    monkeypatch.setenv("PATH", "")
    [line] = problems(project)
    assert "but git is not installed, so the files that it ignores are not known" in line
    assert packed(project) == []


def test_ignore_file_without_git_is_refused(project, monkeypatch):
    write(project, "a.py", ".gitignore")
    monkeypatch.setenv("PATH", "")
    [line] = problems(project)
    assert "holds a .gitignore, but git is not installed" in line


def test_runs_are_left_out_and_packages_of_that_name_are_not(project):
    write(project, "exp/mine/run.yaml", "exp/mine/attempts/1.json", "exp/mine/metrics.jsonl")
    write(project, "sub/runs/mine/run.yaml", "sub/runs/mine/x", "runs/a/run.yaml", "runs/notes")
    write(project, "pkg/runs/show.py", "pkg/runs/data/x.yaml", "tiny/run.yaml", "tiny/data/x.jsonl")
    assert packed(project) == [
        *("pkg/runs/data/x.yaml", "pkg/runs/show.py", "tiny/data/x.jsonl", "tiny/run.yaml")
    ]


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


LEAVING = {
    "file": ("notes.txt", "{outside}/passwords.log"),
    "folder": ("data", "{outside}"),
    "relative": ("sub/notes.txt", "../../outside/passwords.log"),
    "folder with the same start": ("other", "../project-2/x.log"),
    "parent": ("up", ".."),
    "parent, then down": ("sub/down", "../../outside/deep/../passwords.log"),
    "chain": ("chain", "hop"),
    "chain of folders": ("deep/link", "../hop-folder/passwords.log"),
    "system": ("hosts.txt", "/etc/hosts"),
    "device": ("zero.bin", "/dev/zero"),
    "root": ("all", "/"),
    "process": ("environ.txt", "/proc/self/environ"),
}


@pytest.fixture
def outside(project, tmp_path):
    folder = tmp_path / "outside"
    write(folder, "passwords.log", "deep/x")
    write(tmp_path / "project-2", "x.log")
    link(project / "hop", folder / "passwords.log")
    link(project / "hop-folder", folder)
    write(project, "a.py")
    return folder


@pytest.mark.parametrize("tracked", [False, pytest.param(True, marks=needs_git)])
@pytest.mark.parametrize("kind", LEAVING)
def test_link_out_of_the_project_is_refused_by_name(project, outside, kind, tracked):
    name, target = LEAVING[kind]
    link(project / name, target.format(outside=outside))
    if tracked:
        git(project, "init", "-q")
        git(project, "add", ".")
    assert packed(project) == ["a.py"]
    lines = problems(project)
    assert sorted(line.split(" is a link out")[0] for line in lines) == sorted(
        [f"--project: {other}" for other in {name, "hop", "hop-folder"}]
    )
    assert all("Copy the file there, exclude the link" in line for line in lines)
    assert problems(project, name, "hop", "hop-folder") == []


@pytest.mark.parametrize("tracked", [False, pytest.param(True, marks=needs_git)])
def test_links_within_the_project_are_uploaded_as_what_they_name(project, tracked):
    write(project, "data/x.jsonl", "data/deep/y.jsonl", "a.py")
    link(project / "b.py", "a.py")
    link(project / "sub/c.py", "../b.py")
    link(project / "absolute.py", project / "a.py")
    link(project / "rows", "data/deep")
    link(project / "down-again", "../project/data/x.jsonl")
    if tracked:
        git(project, "init", "-q")
        git(project, "add", ".")
    assert problems(project) == []
    assert packed(project) == [
        *("a.py", "absolute.py", "b.py", "data/deep/y.jsonl", "data/x.jsonl", "down-again"),
        *("rows/y.jsonl", "sub/c.py"),
    ]


def test_link_to_what_is_left_out_is_left_out(project):
    write(project, ".env", ".git/config", "runs/mine/run.yaml", "keys/a.pem", "a.py")
    link(project / "settings.txt", ".env")
    link(project / "config.txt", ".git/config")
    link(project / "latest", "runs/mine")
    link(project / "certificates", "keys")
    link(project / "nothing", "not-there")
    link(project / "circle", "circle")
    assert packed(project) == ["a.py"] and problems(project) == []


def test_link_to_a_folder_that_holds_it_is_refused(project):
    write(project, "sub/a.py")
    link(project / "sub/again", ".")
    link(project / "sub/top", "..")
    lines = problems(project)
    assert len(lines) == 2 and all("would be uploaded without end" in line for line in lines)


def test_project_folder_may_be_a_link_itself(project, tmp_path):
    write(project, "a.py", "sub/b.py")
    link(tmp_path / "alias", project)
    assert packed(tmp_path / "alias") == ["a.py", "sub/b.py"]
    assert problems(tmp_path / "alias") == []


@pytest.mark.parametrize("tracked", [False, pytest.param(True, marks=needs_git)])
def test_special_files_are_left_out_without_waiting(project, tracked):
    write(project, "a.py")
    if tracked:
        git(project, "init", "-q")
    os.mkfifo(project / "fifo.txt")
    link(project / "to-fifo", "fifo.txt")
    with socket.socket(socket.AF_UNIX) as unix:
        # relative: the path of a socket is at most 108 characters
        before = os.getcwd()
        os.chdir(project)
        unix.bind("socket")
        os.chdir(before)
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.extend(packed(project)), daemon=True)
        thread.start()
        thread.join(20)
        assert found == ["a.py"] and problems(project) == []


def test_file_that_became_another_one_is_not_opened(project, tmp_path):
    write(project, "sub/a.py")
    write(tmp_path, "secret.log")
    assert open_file(project, "sub/a.py").read() == b"text\n"

    (project / "sub/a.py").unlink()
    link(project / "sub/a.py", tmp_path / "secret.log")
    with pytest.raises(OSError):
        open_file(project, "sub/a.py")

    (project / "sub/a.py").unlink()
    os.mkfifo(project / "sub/a.py")
    with pytest.raises(OSError, match="not a regular file any more"):
        open_file(project, "sub/a.py")

    shutil.rmtree(project / "sub")
    write(tmp_path / "elsewhere", "a.py")
    link(project / "sub", tmp_path / "elsewhere")
    with pytest.raises(OSError):
        open_file(project, "sub/a.py")


def test_names_that_ray_cannot_unpack_are_refused(project):
    write(project, "a\\b.py", "c:d.txt", "sub/e:f.txt")
    with open(os.fsencode(project) + b"/\xff.py", "w") as file:
        file.write("x")
    lines = problems(project)
    assert len(lines) == 3 and all("Ray cannot unpack a file of this name" in x for x in lines)
    assert all(line.isprintable() for line in lines)


def test_names_with_control_characters_are_escaped(project):
    write(project, "\x1b[31mred.py", text="-----BEGIN PRIVATE " + "KEY-----\n" + "a1" * 40)
    [line] = problems(project)
    assert line.isprintable() and "contains a private key" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_folder_and_file_are_named(project):
    write(project, "a.py", "sub/b.py")
    (project / "a.py").chmod(0)
    [line] = problems(project)
    assert "a.py cannot be read (Permission denied)" in line
    (project / "sub").chmod(0)
    [line] = problems(project)
    (project / "sub").chmod(0o755)
    assert "the folder sub cannot be read (Permission denied)" in line


def test_hanging_git_is_one_line(project, monkeypatch, tmp_path):
    script = tmp_path / "bin/git"
    write(tmp_path, "bin/git", text="#!/bin/sh\nsleep 20\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(project_files, "GIT_TIMEOUT_S", 0.2)
    [line] = problems(project)
    assert "git has not listed the project's files within 0.2 s" in line
