"""The manifests in k8s/: `dist-ft k8s render` writes them, they pass every check, and kustomize agrees."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys

import pytest
import yaml

from dist_ft.cluster.k8s import render
from dist_ft.cluster.k8s.check import check
from dist_ft.cluster.k8s.options import Options
from dist_ft.config.load import load_config

OPTIONS = Options(image="dist-ft:0.2.0", ray_version="2.60.0")
RENDER_COMMAND = "dist-ft k8s render configs/llama-8b.yaml --kustomize k8s"


@pytest.fixture(scope="module")
def config(root):
    return load_config(str(root / "configs/llama-8b.yaml"))


@pytest.fixture
def extra():
    for name in ("kubernetes_validate", "celpy", "jsonschema"):
        pytest.importorskip(name, reason="needs the extra k8s: pip install 'dist-ft[k8s]'")


def by_name(documents):
    return sorted(documents, key=lambda document: (document["kind"], document["metadata"]["name"]))


def test_folder_is_what_render_writes(root, config):
    expected = render.render_tree(config, OPTIONS)
    found = {
        str(path.relative_to(root / "k8s")): path.read_text()
        for path in (root / "k8s").rglob("*.yaml")
    }
    assert found == expected, f"render it again: {RENDER_COMMAND}"


@pytest.mark.parametrize("overlay", ["", *render.OVERLAYS])
@pytest.mark.usefixtures("extra")
def test_overlays_pass_strictly_and_against_the_crd(shared, tmp_path, config, overlay):
    """Overlays as `render --overlay` writes them; a test below compares them with kustomize."""
    render.write_files(
        render.render_folder(render.render_objects(config, OPTIONS, overlay)), str(tmp_path)
    )
    report = check([str(tmp_path)], str(shared("kuberay")))
    assert (report.checked, report.problems, report.notes) == (10, [], [])


@pytest.mark.parametrize("name", ["llama-8b", "llama-70b"])
@pytest.mark.usefixtures("extra")
def test_render_and_check_from_the_command_line(root, shared, tmp_path, name):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "dist_ft.cli", "k8s", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    rendered = run(
        "render",
        str(root / f"configs/{name}.yaml"),
        "--out",
        str(tmp_path / "m"),
        "--overlay",
        "production",
    )
    assert rendered.returncode == 0, rendered.stderr
    assert (
        f"GPUs = up to {load_config(str(root / f'configs/{name}.yaml')).max_workers}\n"
        in rendered.stdout
    )
    done = run("check", str(tmp_path / "m"), "--crd", str(shared("kuberay")))
    assert (done.returncode, done.stdout, done.stderr) == (0, "10 objects: ok\n", "")
    broken = tmp_path / "m" / "rayjob.yaml"
    broken.write_text(broken.read_text().replace("mode: token", "mode: disabled"))
    failed = run("check", str(tmp_path / "m"), "--crd", str(shared("kuberay")))
    assert failed.returncode == 2
    assert failed.stderr.startswith(
        f"dist-ft: k8s check: 1 problem\n  - {broken}: RayJob/{name} spec.rayClusterSpec."
        "authOptions.mode: no token authentication"
    )


def test_manifests_go_to_stdout_and_sums_to_stderr(root):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "dist_ft.cli",
            "k8s",
            "render",
            str(root / "configs/llama-70b.yaml"),
            "cluster.workers=64",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    kinds = [document["kind"] for document in yaml.safe_load_all(done.stdout)]
    assert (len(kinds), kinds[0], kinds[-1]) == (10, "Namespace", "RayJob")
    assert done.stderr.startswith("pods        8 × 8 GPUs = up to 64\n")


@pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="needs kubectl, whose kustomize it compares with"
)
@pytest.mark.parametrize(
    ("overlay", "component"),
    [
        *((overlay, "") for overlay in render.OVERLAYS),
        *(("", component) for component in render.COMPONENTS),
    ],
)
def test_kustomize_builds_the_same_as_render(root, config, tmp_path, overlay, component):
    shutil.copytree(root / "k8s", tmp_path / "k8s")
    folder = tmp_path / "k8s/overlays" / (overlay or "own")
    if component:
        folder.mkdir()
        (folder / "kustomization.yaml").write_text(
            yaml.safe_dump(
                {"resources": ["../../base"], "components": [f"../../components/{component}"]}
            )
        )
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    expected = itertools.chain(
        *render.render_objects(config, OPTIONS, overlay, [component] if component else ()).values()
    )
    assert by_name(yaml.safe_load_all(done.stdout)) == by_name(expected)


@pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="needs kubectl, which puts the overlay together"
)
@pytest.mark.usefixtures("extra")
def test_check_accepts_a_kustomize_overlay(root):
    assert check([str(root / "k8s/overlays/production-spot")]).problems == []
