"""The shape of the code: imports point one way, each third party has one door, and nothing outgrows a screen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "dist_ft"
FOUNDATIONS = (
    "errors",
    "logs",
    "failpoints",
    "local_files",
    "listing",
    "storage_errors",
    "patience",
    "storage",
    "world",
)
LAYERS = (
    "config",
    "data",
    "model",
    "engine",
    "checkpoint",
    "train",
    "plan",
    "k8s",
    "runtime",
    "api",
    "cli_data",
    "cli_drill",
    "cli_jobs",
    "cli_k8s",
    "cli_models",
    "cli_plan",
    "cli_runs",
    "cli_series",
    "cli",
)
DOORS = {
    "ray": "runtime/ray_train.py",
    "deepspeed": "engine/deepspeed_engine.py",
    "fsspec": "storage.py",
}
RAY_DOORS = {
    "runtime/ray_data.py": "data",
    "runtime/ray_group.py": "train",
    "runtime/ray_metrics.py": "util.metrics",
    "runtime/ray_tune.py": "tune",
    "runtime/jobs.py": "job_submission",
}  # beside runtime/ray_train.py, which trains
LONGEST_MODULE, LONGEST_FUNCTION = 300, 60
DOCUMENTED = 0.9  # of public functions, methods and classes

MODULES = sorted(PACKAGE.rglob("*.py"))
PATHS = [str(path.relative_to(PACKAGE)) for path in MODULES]


def parse(path: str) -> ast.Module:
    return ast.parse((PACKAGE / path).read_text())


def layer(path: str) -> str:
    """Return the layer of a module: 'config' of config/load.py, 'errors' of errors.py."""
    return path.split("/")[0].removesuffix(".py")


def rank(name: str) -> int:
    return FOUNDATIONS.index(name) - len(FOUNDATIONS) if name in FOUNDATIONS else LAYERS.index(name)


def imported(path: str) -> Iterator[str]:
    """Yield the dotted names a module imports, at its top or in its functions."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno}: write the import in full"
            assert node.module is not None
            yield from (
                [f"dist_ft.{alias.name}" for alias in node.names]
                if node.module == "dist_ft"
                else [node.module]
            )


def functions(path: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (
        node
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


@pytest.mark.parametrize("path", [path for path in PATHS if path != "__init__.py"])
def test_imports_point_up_the_list_of_layers(path):
    here = layer(path)
    assert here in FOUNDATIONS + LAYERS, (
        f"{path}: {here} is in no layer; add it to the list where it belongs"
    )
    for name in imported(path):
        if not name.startswith("dist_ft."):
            continue
        there = name.split(".")[1]
        if there not in FOUNDATIONS + LAYERS:
            continue  # a name the package itself lends, such as load_config: `api` and `config` in truth
        assert rank(there) <= rank(here), f"{path} imports {name}: {here} is below {there}"
        if here == "plan":
            assert there in ("plan", "config", *FOUNDATIONS), (
                f"{path} imports {name}: plan is arithmetic on configs"
            )


def test_the_package_itself_lends_names_only_to_the_top():
    """`from dist_ft import load_config` hides the layer it comes from: only cli and api may."""
    for path in PATHS:
        lent = {
            name
            for name in imported(path)
            if name
            in {
                "dist_ft.load_config",
                "dist_ft.train",
                "dist_ft.check",
                "dist_ft.export",
                "dist_ft.RunConfig",
            }
        }
        if path not in (
            "__init__.py",
            "cli.py",
            "cli_data.py",
            "cli_drill.py",
            "cli_jobs.py",
            "cli_plan.py",
            "cli_runs.py",
        ):
            assert lent <= {"dist_ft.train"}, (
                f"{path} imports {lent} from the package; name the module"
            )


@pytest.mark.parametrize(("library", "door"), DOORS.items())
def test_one_door_for_each_third_party(library, door):
    users = {path for path in PATHS for name in imported(path) if name.split(".")[0] == library}
    assert users - RAY_DOORS.keys() == {door}


@pytest.mark.parametrize(("door", "part"), RAY_DOORS.items())
def test_further_doors_to_ray_are_for_one_part_of_it(door, part):
    used = {name for name in imported(door) if name.split(".")[0] == "ray"}
    assert all(name == "ray" or f"{name}.".startswith(f"ray.{part}.") for name in used), (
        "ray itself, and its part"
    )
    assert all(
        not f"{name}.".startswith(f"ray.{part}.")
        for path in PATHS
        if path != door
        for name in imported(path)
    )


@pytest.mark.parametrize("path", PATHS)
def test_modules_and_functions_stay_small(path):
    length = len((PACKAGE / path).read_text().splitlines())
    assert length <= LONGEST_MODULE, f"{path} has {length} lines"
    for function in functions(path):
        lines = (function.end_lineno or 0) - function.lineno + 1
        assert lines <= LONGEST_FUNCTION, f"{path}: {function.name} has {lines} lines"


@pytest.mark.parametrize("path", PATHS)
def test_modules_say_what_they_are_for(path):
    assert ast.get_docstring(parse(path)), f"{path} has no docstring"


def public(path: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Yield public functions and classes of a module, and public methods of those classes."""
    for node in parse(path).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith(
            "_"
        ):
            yield node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node
            yield from (
                inner
                for inner in node.body
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
                and not inner.name.startswith("_")
            )


def test_public_names_are_documented():
    names = [(path, node) for path in PATHS for node in public(path)]
    bare = [f"{path}: {node.name}" for path, node in names if not ast.get_docstring(node)]
    tops = {
        path: [
            node.name
            for node in parse(path).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and not ast.get_docstring(node)
        ]
        for path in PATHS
    }
    assert not any(tops.values()), tops
    assert len(bare) <= (1 - DOCUMENTED) * len(names), (
        bare
    )  # methods that fill in a documented one may go without


HEAVY = {
    "torch",
    "transformers",
    "ray",
    "deepspeed",
    "datasets",
    "pyarrow",
    "fsspec",
    "tensorboard",
    "rich",
}


@pytest.mark.parametrize("path", PATHS)
def test_nothing_heavy_is_imported_at_the_top_of_light_layers(path):
    """config, plan, api and cli, and the foundations, answer at once."""
    if layer(path) not in (*FOUNDATIONS, "config", "plan", "k8s", "api", "cli", "__init__"):
        return
    for node in parse(path).body:
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        assert not {name.split(".")[0] for name in names} & HEAVY, f"{path}: line {node.lineno}"


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_unpickled(path):
    """No code from data: no pickle, no torch.load, no eval."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in (
                "eval",
                "exec",
                "torch.load",
                "pickle.load",
                "pickle.loads",
                "yaml.load",
                "cloudpickle.load",
                "cloudpickle.loads",
            ), f"{path}: line {node.lineno}: {called}"
