"""Tasks by name: those of dist_ft, and a user's own by import path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dist_ft.config import task_facts
from dist_ft.config.load import load_config, load_stored_mapping, to_mapping
from dist_ft.config.task_facts import TASKS, allow_task, task_class, tasks_where
from dist_ft.core.errors import ConfigError
from dist_ft.tasks.base import Task

OWN = """
from dist_ft import Task
from dist_ft.tasks.causal_lm import CausalLMTask

class Own(CausalLMTask):
    metrics = ("loss_per_byte",)

class NoTask:
    pass

class Half(Task):
    auto_class = "AutoModel"
    def read(self, row, location): ...
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that can be imported and was not."""
    name = f"own_task_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN + f'\nopen("{tmp_path}/imported", "w").close()\n')
    (tmp_path / "broken_own_task.py").write_text("class Own(\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(task_facts, "_allowed", set())
    yield name
    sys.modules.pop(name, None)


def document(task: str) -> dict:
    return {
        "run": {"name": "r", "storage": "/tmp/r"},
        "model": {"path": "m"},
        "data": {"train": "d"},
        "batch": {"global_batch": 2, "micro_batch": 1, "sequence_length": 8},
        "schedule": {"steps": 1},
        "task": {"name": task},
    }


@pytest.mark.parametrize("name", TASKS)
def test_each_task_says_everything_about_itself(name):
    task = task_class(name)
    assert issubclass(task, Task) and task.__doc__
    assert task.metrics and task.auto_class and task.ability.action
    assert not task.__abstractmethods__


def test_tasks_are_found_by_their_facts():
    assert tasks_where(generates_text=True) == ("causal_lm", "seq2seq")
    assert tasks_where(has_labels=True, has_label_per_row=True) == ("sequence_classification",)


def test_the_config_of_the_user_imports_their_own_task(module):
    config = load_config(document(f"{module}:Own"))
    assert config.task.name == f"{module}:Own"
    assert task_class(config.task.name).metrics == ("loss_per_byte",)
    assert load_config(to_mapping(config)) == config


def test_a_stored_config_imports_no_code(module, tmp_path):
    stored = load_stored_mapping(document(f"{module}:Own"), "runs/r/run.yaml")
    assert not (tmp_path / "imported").exists()
    with pytest.raises(
        ConfigError, match=f"a folder names this class.*dist-ft --task {module}:Own"
    ):
        task_class(stored.task.name)
    assert not (tmp_path / "imported").exists()
    allow_task(stored.task.name)
    assert task_class(stored.task.name).metrics == ("loss_per_byte",)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no_such_module_at_all:Own", "cannot be imported (ModuleNotFoundError: No module named"),
        ("{module}:Missing", "cannot be imported (AttributeError: module"),
        ("{module}:NoTask", "is not a task. It must be a subclass of dist_ft.Task."),
        (
            "{module}:Half",
            "the class lacks compute_loss, compute_scores, read_output, metrics. A task must",
        ),
        ("broken_own_task:Own", "cannot be imported (SyntaxError: "),
        ("os:getcwd", "is not a task. It must be a subclass of dist_ft.Task."),
        ("classification", "not a valid choice. Allowed: one of causal_lm, sequence_cl"),
        ("my.tasks.Own", "or the import path of a class such as mypackage.tasks:MyTask."),
    ],
)
def test_what_is_no_task_is_refused_in_one_line(module, name, problem):
    with pytest.raises(ConfigError) as caught:
        load_config(document(name.format(module=module)))
    (line,) = caught.value.problems
    assert line.startswith("task.name=") and problem in line
