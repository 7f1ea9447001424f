"""The files that are uploaded with a job: no keys, repositories, runs, or files with credentials."""

from __future__ import annotations

import subprocess

import pytest

from dist_ft.cluster.jobs import package

EXCLUDED = [
    ".git/config",
    ".env",
    ".env.local",
    "prod.env",
    "sub/.env",
    ".venv/x.py",
    "runs/a/run.yaml",
    "sub/__pycache__/x.pyc",
    "tls.pem",
    "sub/id_rsa",
    ".aws/credentials",
    "my-credentials-2.json",
    "wandb/run",
    "kubeconfig.yaml",
    ".netrc",
]
PACKED = ["a.py", "configs/x.yaml", "pkg/credentials.py", "pkg/runs/x.py", "environment.txt"]


@pytest.fixture
def project(tmp_path):
    for name in [*EXCLUDED, *PACKED]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text\n")
    return tmp_path


def test_uploaded_files(project):
    assert sorted(package.files(project)) == sorted(PACKED)
    assert "a.py" not in set(package.files(project, [*package.EXCLUDES, "*.py"]))


def test_gitignore_is_respected_in_a_repository(project):
    subprocess.run(["rm", "-r", str(project / ".git")], check=True)
    if subprocess.run(["git", "init", "-q", str(project)], capture_output=True).returncode:
        pytest.skip("needs git")
    (project / ".gitignore").write_text("configs/\n")
    assert sorted(package.files(project)) == sorted({*PACKED, ".gitignore"} - {"configs/x.yaml"})


def test_file_with_a_credential_is_named_without_the_credential(project, monkeypatch):
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
    assert list(package.find_problems(project, [*package.EXCLUDES, "notes.txt", "key.txt"])) == []


def test_error_for_a_large_project_names_large_files(project, monkeypatch):
    monkeypatch.setattr(package, "MAX_BYTES", 1000)
    (project / "big.bin").write_bytes(b"x" * 2000)
    [line] = package.find_problems(project)
    assert "largest: big.bin" in line
