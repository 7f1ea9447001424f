"""Outside data comes in, and text goes out, by one door each: what is left of direct calls has a reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "dist_ft"
PATHS = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))

JSON_CALLS = {
    "core/json_documents.py": "the door",
    "config/credentials.py": "looks for credentials in a text; what is no JSON has none",
    "core/redaction.py": "looks for credentials in a text; what is no JSON has none",
    "pretrained/folder_files.py": "the door for model folders, whose JSON may have a key twice",
    "cluster/k8s/check.py": "the text was made by json.dumps just before",
    "cluster/k8s/patch.py": "a copy: the text was made by json.dumps just before",
    "data/batching/augmentation.py": "the tokenizer library made the text in this process",
    "data/blocks/token_cache.py": "the tokenizer library made the text in this process",
    "data/blocks/tokenize_blocks.py": "from the parent process",
    "data/blocks/tokenizer_pool.py": "from a child process",
    "data/tools/rewrite.py": "the text was made by json.dumps just before",
    "inference/prediction_shards.py": "from the driver of the same command",
    "inference/ray_data.py": "from a worker of the same command",
}
PRINT_CALLS = {
    "cli/output.py": "the door",
    "cli/failures.py": "escapes what it prints",
    "runtime/elastic/coordinator.py": "escapes what it prints",
}
OPEN_CALLS = {
    "storage/local_files.py": "the door",
    "cli/failures.py": "/dev/null",
    "cluster/jobs/package.py": "writes",
    "cluster/jobs/project_files.py": "what is not a regular file is not packed",
    "core/scratch.py": "files that this process created",
    "data/blocks/token_cache.py": "the cache of this user",
    "inference/prediction_file.py": "the output of this command",
    "model/loading/download.py": "the cache of this user",
    "model/loading/meta_model.py": "writes",
    "pretrained/folder_files.py": "the door for model folders; checks that files are regular",
    "pretrained/weight_files.py": "its path comes from the door for model folders",
    "runs/render_report.py": "a template of the package",
    "runtime/bootstrap/build_model.py": "a folder that this process wrote",
    "runtime/bootstrap/stored_shards.py": "a file that this process wrote or copied",
    "runtime/bootstrap/watchdog.py": "a file that this process wrote",
    "runtime/elastic/supervisor.py": "a file of the kernel",
    "selftest/materials.py": "a folder that this process wrote",
    "training/console.py": "/dev/null",
    "training/metrics_log.py": "a file that this process wrote",
}


def calls(path: str) -> Iterator[str]:
    """Yield each function that a module calls: 'json.loads', 'open', '.read_text'."""
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name):
            yield function.id
        elif isinstance(function, ast.Attribute):
            owner = function.value.id if isinstance(function.value, ast.Name) else ""
            yield f"{owner}.{function.attr}"
            yield f".{function.attr}"


def users(*names: str) -> set[str]:
    return {path for path in PATHS if set(names) & set(calls(path))}


@pytest.mark.parametrize(
    ("names", "allowed"),
    [
        (("json.load", "json.loads", "json.JSONDecoder", "encoder.loads"), JSON_CALLS),
        # core/yaml_documents.py is the door, with a loader of its own.
        (("yaml.load", "yaml.load_all", "yaml.safe_load", "yaml.safe_load_all"), {}),
        (("print", "typer.echo", "typer.secho", "click.echo", "pprint"), PRINT_CALLS),
    ],
)
def test_one_door(names: tuple[str, ...], allowed: dict[str, str]) -> None:
    assert users(*names) == set(allowed), "use the door, or give a reason here"


def test_files_that_others_name_are_opened_by_storage() -> None:
    found = users("open", "os.open", ".read_bytes")
    # `read_text` is also a function of the data encoders, which reads a column.
    found |= {path for path in users(".read_text") if "task_rows" not in source_of(path)}
    found -= {"core/fault_injection.py", "data/encoding/data_task.py"}
    assert found <= set(OPEN_CALLS), "use storage.local_files, or give a reason here"


def source_of(path: str) -> str:
    return (PACKAGE / path).read_text()
