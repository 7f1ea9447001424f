"""The shape of the code: imports point one way, each dependency has one door, modules stay small,
the tests mirror the package, and words that are not used stay out."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "dist_ft"
ROOMS = (
    "core",
    "storage",
    "config",
    "metrics",
    "pretrained",
    "data",
    "model",
    "tasks",
    "engine",
    "checkpoint",
    "planning",
    "training",
    "runtime",
    "inference",
    "runs",
    "workflows",
    "cluster",
    "selftest",
    "api",
    "cli",
)
"""Folders (and modules) of the package: each may import from itself and from those before it."""

SUBFOLDERS = {
    "config": (
        "renames",
        "task_facts",
        "sections",
        "schema",
        "error_messages",
        "credentials",
        "checks",
        ".",
    ),
    "pretrained": (".", "pretrained_model"),
    "data": (".", "sampling", "sources", "encoding", "blocks", "batching", "tools"),
    "model": ("model_task", "heads", "losses", "adapters", ".", "loading"),
    "runtime": ("machine", "bootstrap", "local", "elastic", "preflight", "ray_backend"),
    "cluster": ("jobs", "k8s"),
}
"""The same order inside a folder; "." stands for the modules that are not named."""

DOORS = {
    "ray": "runtime/ray_backend/driver.py",
    "deepspeed": "engine/deepspeed_engine.py",
    "fsspec": "storage/filesystem.py",
}
RAY_DOORS = {
    "inference/ray_data.py": "data",
    "runtime/ray_backend/worker_group.py": "train",
    "runtime/ray_backend/metrics.py": "util.metrics",
    "workflows/ray_tune.py": "tune",
    "cluster/jobs/submission.py": "job_submission",
}
"""Further modules that import one part of Ray each."""
LONGEST_MODULE, LONGEST_FUNCTION = 400, 60
MOST_FILES = 20
DOCUMENTED = 0.9  # of public functions, methods and classes

MODULES = sorted(PACKAGE.rglob("*.py"))
PATHS = [str(path.relative_to(PACKAGE)) for path in MODULES]


def parse(path: str) -> ast.Module:
    return ast.parse((PACKAGE / path).read_text())


def room(path: str) -> str:
    """Return the room of a module: 'config' of config/load.py, 'api' of api.py."""
    return path.split("/")[0].removesuffix(".py")


def position(path: str) -> tuple[int, int]:
    """Return where a module stands in the order of rooms, and in the order inside its room."""
    top, *rest = path.removesuffix(".py").split("/")
    order = SUBFOLDERS.get(top, (".",))
    inner = rest[0] if rest and rest[0] in order else "."
    if inner not in order:
        assert rest in ([], ["__init__"]), f"{path}: add {rest[0]!r} to SUBFOLDERS[{top!r}]"
        return ROOMS.index(top), -1
    return ROOMS.index(top), order.index(inner)


def module_path(name: str) -> str | None:
    """Return the file of a dotted name, or of the module that holds it; None for the package itself."""
    parts = name.split(".")[1:]
    for count in range(len(parts), 0, -1):
        for path in ("/".join(parts[:count]) + ".py", "/".join([*parts[:count], "__init__.py"])):
            if path in PATHS:
                return path
    return None


def imported(path: str) -> Iterator[str]:
    """Yield the dotted names a module imports, at its top or in its functions."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno}: write the import in full"
            assert node.module is not None
            if node.module.split(".")[0] == "dist_ft":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def own_imports(path: str) -> set[str]:
    """Return the files of this package that a module imports."""
    names = (name for name in imported(path) if name.startswith("dist_ft."))
    return {found for name in names if (found := module_path(name)) and found != path}


def functions(path: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (
        node
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


@pytest.mark.parametrize("path", [path for path in PATHS if path != "__init__.py"])
def test_imports_point_up_the_list_of_rooms(path):
    assert room(path) in ROOMS, f"{path}: {room(path)} is not in ROOMS; add it where it belongs"
    here = position(path)
    for other in own_imports(path):
        assert position(other) <= here, f"{path} imports {other}, which comes after it"
        if here[0] == ROOMS.index("planning"):
            allowed = ("core", "storage", "config", "planning")
            assert room(other) in allowed, (
                f"{path} imports {other}: planning is arithmetic on configs"
            )


def test_no_import_cycles():
    """Modules can be put in an order in which each imports only those before it, at the top or in functions."""
    pending = {path: own_imports(path) for path in PATHS}
    while pending:
        free = [path for path, needed in pending.items() if not needed & pending.keys()]
        assert free, f"import cycle among {sorted(pending)}"
        for path in free:
            del pending[path]


def test_names_of_the_package_are_imported_from_their_modules():
    """`from dist_ft import load_config` hides where a name comes from; it is for users."""
    for path in PATHS:
        hidden = [
            name for name in imported(path) if name.startswith("dist_ft.") and not module_path(name)
        ]
        assert not hidden, f"{path} imports {hidden} from the package; name the module"


@pytest.mark.parametrize("folder", sorted({str(path.parent) for path in MODULES}))
def test_folders_stay_small(folder):
    files = [path for path in Path(folder).glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= MOST_FILES, f"{folder} holds {len(files)} modules"


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
        body = function.body[1:] if ast.get_docstring(function) else function.body
        lines = (function.end_lineno or 0) - body[0].lineno + 1 if body else 0
        assert lines <= LONGEST_FUNCTION, f"{path}: the body of {function.name} has {lines} lines"


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


LIGHT = ("core/", "storage/", "config/", "planning/", "cluster/k8s/", "api", "cli/", "__init__")
"""They answer at once."""
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
    if not path.startswith(LIGHT):
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


LOADING_METHODS = {"from_pretrained", "from_config", "from_file", "from_buffer"}
"""Methods of transformers, peft and tokenizers that read what others wrote."""
LOADING_FUNCTIONS = {
    "safe_open",
    "load_file",
    "snapshot_download",
    "hf_hub_download",
    "cached_file",
    "apply_chat_template",
    "render_jinja_template",
    "_compile_jinja_template",
    "ImmutableSandboxedEnvironment",
    "SandboxedEnvironment",
}
LOADING_DOORS = {
    "pretrained/pretrained_model.py": {"from_pretrained", "from_config"},
    "pretrained/weight_files.py": {"safe_open"},
    "pretrained/chat_templates.py": {
        "apply_chat_template",
        "render_jinja_template",
        "_compile_jinja_template",
    },
    "pretrained/template_environment.py": {"ImmutableSandboxedEnvironment"},
    "model/loading/download.py": {"snapshot_download"},
    "model/loading/meta_model.py": {"hf_hub_download"},
}
"""Modules that may read what others wrote, and how."""


OWN_CLASSES = {
    node.name for path in PATHS for node in ast.walk(parse(path)) if isinstance(node, ast.ClassDef)
}


def loading_calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of each use of a function that reads a model, tokenizer or template."""
    for node in ast.walk(tree):
        name = ""
        if isinstance(node, ast.Attribute):
            # `Regularizers.from_config` and the like are constructors of our own classes.
            is_own = ast.unparse(node.value).split(".")[-1] in OWN_CLASSES | {"cls"}
            if (node.attr in LOADING_METHODS and not is_own) or node.attr in LOADING_FUNCTIONS:
                name = node.attr
        elif isinstance(node, ast.Name) and node.id in LOADING_FUNCTIONS:
            name = node.id
        elif isinstance(node, ast.Constant) and node.value in LOADING_METHODS | LOADING_FUNCTIONS:
            name = str(node.value)  # by getattr, perhaps
        if name:
            yield node.lineno, name


@pytest.mark.parametrize(
    "file",
    [
        *(str(path.relative_to(PACKAGE.parent)) for path in MODULES),
        *(
            str(path.relative_to(PACKAGE.parent))
            for folder in ("docs", "configs", "k8s")
            for path in sorted((PACKAGE.parent / folder).rglob("*.py"))
        ),
    ],
)
def test_one_door_for_models(file):
    """Models, tokenizers, configs, adapters and templates of others are read in one place."""
    allowed = LOADING_DOORS.get(file.removeprefix("dist_ft/"), set())
    tree = ast.parse((PACKAGE.parent / file).read_text())
    for line, name in loading_calls(tree):
        assert name in allowed, f"{file}:{line}: {name}; use dist_ft/pretrained/"


def test_the_door_says_whether_code_may_run():
    """Each call of the door passes trust_remote_code, or reads what has no code."""
    path = "pretrained/pretrained_model.py"
    without_code = ("GenerationConfig.from_pretrained", "PeftModel.from_pretrained")
    for node in ast.walk(parse(path)):
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if not is_call or node.func.attr not in ("from_pretrained", "from_config"):
            continue
        keywords = {keyword.arg for keyword in node.keywords}
        called = ast.unparse(node.func)
        assert "trust_remote_code" in keywords or called in without_code, called


def test_only_the_users_own_config_allows_code():
    """Nothing but a section model, or False, is passed on as the permission to run code."""
    for path in PATHS:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                value = ast.unparse(node.value)
                names = (
                    "section.trust_remote_code",
                    "source.trust_remote_code",
                    "trust_remote_code",
                )
                assert value in names, f"{path}:{node.value.lineno}: {value}"


MOST_PARAMETERS = 7
MANY_PARAMETERS = {
    "api.py": {"export", "predict"},
    "cli/export.py": {"export"},
    "cli/jobs.py": {"submit"},
    "cli/k8s.py": {"render"},
    "cli/models.py": {"predict"},
}
"""Functions with more parameters, and why: public keyword arguments and options of commands."""


@pytest.mark.parametrize("path", PATHS)
def test_functions_have_few_parameters(path):
    for function in functions(path):
        arguments = function.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        names = [argument.arg for argument in every if argument.arg not in ("self", "cls")]
        is_listed = function.name in MANY_PARAMETERS.get(path, ())
        assert len(names) <= MOST_PARAMETERS or is_listed, (
            f"{path}: {function.name} has {len(names)} parameters; group those that belong together"
        )


UNIT_TESTS = Path(__file__).resolve().parent
ACROSS_MODULES = {
    "checkpoint/test_background.py",
    "checkpoint/test_failing_storage.py",
    "checkpoint/test_frozen.py",
    "checkpoint/test_protocol.py",
    "checkpoint/test_together.py",
    "config/test_recipes.py",
    "model/test_dropout.py",
    "model/test_regularized.py",
    "runtime/bootstrap/test_early_stopping.py",
    "runtime/bootstrap/test_longer.py",
    "runtime/bootstrap/test_roll_back.py",
    "storage/test_urls.py",
    "test_doors.py",
    "test_layers.py",
}
"""Tests of several modules of their folder."""


def test_unit_tests_mirror_the_package():
    for file in sorted(UNIT_TESTS.rglob("test_*.py")):
        path = str(file.relative_to(UNIT_TESTS))
        module = f"{path.rpartition('test_')[0]}{file.name.removeprefix('test_')}"
        assert module in PATHS or path in ACROSS_MODULES, (
            f"tests/unit/{path}: there is no dist_ft/{module}; move it next to its module's tests"
        )


ROOT = PACKAGE.parent
UNUSED_WORDS = re.compile(
    r"\b(told|wanted|asked|tokenis\w+|normalis\w+|verbalis\w+|minimis\w+|maximis\w+|goes on|gone on|"
    r"passed over|can not|made ahead|so many|as many again|beside)\b",
    re.IGNORECASE,
)
"""Words that no text of this project uses; see CONTRIBUTING.md for what to write instead."""
WRITTEN = ("dist_ft/**/*.py", "launch/**/*.py", "launch/**/*.sh", "docs/**/*.md", "tests/**/*.py")
READ_BY_OLD_VERSIONS = {
    "dist_ft/config/renames.py",
    "tests/unit/config/test_renames.py",
    "tests/unit/data/encoding/test_make_encoder.py",
    "dist_ft/training/evaluation.py",
    "tests/unit/training/test_evaluation.py",
}
"""Files that must name keys of version 0.1.0."""


@pytest.mark.parametrize("pattern", [*WRITTEN, "README.md", "configs/**/*.yaml", "k8s/**/*.yaml"])
def test_words_that_are_not_used(pattern):
    found = []
    for file in sorted(ROOT.glob(pattern)):
        path = str(file.relative_to(ROOT))
        # hidden folders hold environments and caches, which are not the project's
        is_hidden = any(part.startswith(".") for part in file.relative_to(ROOT).parts)
        if is_hidden or path in READ_BY_OLD_VERSIONS or file == Path(__file__).resolve():
            continue
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if match := UNUSED_WORDS.search(line.replace("_", " ")):
                found.append(f"{path}:{number}: {match[0]}")
    assert not found, "\n".join(found[:40])
