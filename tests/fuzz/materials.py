"""Sound files that cases start from: models, data, runs and exports, made once in a folder.

Their names are paths in a project's folder. Whatever needs training trains in a forked process.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import tiny
import tiny_tasks
import yaml

from fuzz.documents import ROOT, TASKS, base_document

ROWS = 24


class Material(NamedTuple):
    """How a material is made.

    Attributes:
        make: makes it at a path, in a process whose folder is that of the materials.
        needed: materials that must exist before.
        further: other paths that belong to it.
    """

    make: Callable[[Path], object]
    needed: tuple[str, ...] = ()
    further: tuple[str, ...] = ()


class Materials:
    """Makes materials below `folder` when they are needed first, and copies them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, name: str) -> Path:
        """Return the path of a material, which is made if it does not exist yet."""
        path = self._folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            material = MATERIALS[name]
            for needed in material.needed:
                self.path(needed)
            _in_own_process(self._folder, lambda: material.make(Path(name)))
        return path

    def copy(self, names: Iterable[str], project: Path) -> None:
        """Copy materials into a project's folder."""
        for name in names:
            _copy(self.path(name), project / name)
            for further in MATERIALS[name].further:
                _copy(self._folder / further, project / further)

    def files(self, name: str) -> list[str]:
        """Return the files of a material, with its name in front."""
        folder = self.path(name)
        if folder.is_file():
            return [name]
        found = [path for path in folder.rglob("*") if path.is_file()]
        return sorted(str(path.relative_to(self._folder)) for path in found)

    def read(self, file: str) -> bytes:
        """Return the content of one of `files`."""
        return (self._folder / file).read_bytes()


def _in_own_process(folder: Path, work: Callable[[], object]) -> None:
    """Do `work` in a forked process, in `folder`."""
    # The threads it starts must not be in this process when it forks the cases.
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.chdir(folder)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError("a material cannot be made; its traceback is above")


def _train_lm(path: Path) -> None:
    document = base_document("causal_lm", path.name)
    document["schedule"]["steps"] = 4
    document["evaluation"] |= {"every_steps": 2}
    document["checkpoint"] |= {"every_steps": 2, "keep_last": 3}
    _train(document)


def _train_labels(path: Path) -> None:
    document = base_document("sequence_classification", path.name)
    document["schedule"]["steps"] = 2
    document["evaluation"] |= {"every_steps": 1}
    document["data"]["cache_dir"] = "cache-labels"
    _train(document)


def _train_lora(path: Path) -> None:
    document = base_document("causal_lm", path.name)
    del document["evaluation"]
    document["tuning"] = {"method": "lora", "lora": {"rank": 2, "alpha": 4}}
    document["data"]["cache_dir"] = "cache-lora"
    _train(document)


def _train(document: dict[str, Any]) -> None:
    from dist_ft import api
    from dist_ft.config.load import load_config

    # A run stores the places of its data. A case has a folder of its own, and the data are here.
    for section, field in (("data", "train"), ("evaluation", "data")):
        if section in document:
            document[section][field] = str(Path.cwd() / document[section][field])
    api.train(load_config(document))


def _export(path: Path, run: str, adapter: bool = False) -> None:
    from dist_ft import api

    api.export(run, str(path), adapter=adapter)


def _write_rows(folder: Path, seed: int) -> None:
    for task in TASKS:
        # Rows of a causal model are pairs of a prompt and a response.
        if task == "causal_lm":
            tiny.make_data(folder / task, ROWS, seed=seed)
            continue
        rows_folder = folder / task
        rows_folder.mkdir(parents=True)
        rng = random.Random(seed)
        lines = [json.dumps(tiny_tasks.row(task, rng)) for _ in range(ROWS)]
        (rows_folder / "shard.jsonl").write_text("\n".join(lines) + "\n")


def _write_config(path: Path) -> None:
    path.write_text(yaml.safe_dump(base_document("causal_lm", "mine")))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=shutil.copyfile)
    else:
        shutil.copyfile(source, target)


MATERIALS = {
    "model": Material(tiny.make_model),
    "bert": Material(tiny_tasks.make_encoder),
    "bart": Material(tiny_tasks.make_encoder_decoder),
    "data": Material(lambda path: _write_rows(path, seed=0)),
    "held-out": Material(lambda path: _write_rows(path, seed=1)),
    "run.yaml": Material(_write_config),
    "configs": Material(lambda path: _copy(ROOT / "configs", path)),
    "k8s": Material(lambda path: _copy(ROOT / "k8s", path)),
    "runs/lm": Material(_train_lm, ("model", "data", "held-out"), ("cache",)),
    "runs/labels": Material(_train_labels, ("bert", "data", "held-out")),
    "runs/lora": Material(_train_lora, ("model", "data")),
    "out": Material(lambda path: _export(path, "runs/lm"), ("runs/lm",)),
    "classifier": Material(lambda path: _export(path, "runs/labels"), ("runs/labels",)),
    "adapter": Material(lambda path: _export(path, "runs/lora", adapter=True), ("runs/lora",)),
}
"""Material by its path in a project."""
