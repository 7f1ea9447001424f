"""Command lines: all commands and options of the real parser, with mutated words.

A new command or option is fuzzed without a change here; a value that makes sense for it can be
added to `VALUES`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from fuzz import documents, mutate
from fuzz.inputs import Input, Special
from fuzz.kinds.kind import Kind
from fuzz.materials import Materials

VALUES: dict[str, tuple[str, ...]] = {
    "config": ("run.yaml", "configs/single.yaml", "configs/recipes/reviews.yaml"),
    "run": ("runs/lm", "run.yaml", "runs/labels", "runs"),
    "storage": ("runs", "."),
    "folder": ("new", "runs/lm"),
    "file": ("configs/recipes/stages-intents.yaml", "run.yaml"),
    "search": ("configs/recipes/search.yaml", "run.yaml"),
    "model": ("model", "out", "classifier", "runs/lm", "runs/labels"),
    "paths": ("data/causal_lm/*.jsonl", "data", "held-out/regression", "data/seq2seq/shard.jsonl"),
    "kind": ("conll", "squad", "labelled", "parallel", "pairs"),
    "name": ("mine", "mine-2"),
    "out": ("written", "written.jsonl", "runs/lm", "run.yaml"),
    "prompt": ("say the fox",),
    "strategy": (
        "greedy",
        "beam:2",
        "sample:0.7,top_p=0.9,num_samples=2,seed=1",
        "beam:2,length_penalty=0.8",
    ),
    "share": ("train=0.8", "held-out=0.2"),
    "by": ("label", "prompt"),
    "group": ("label",),
    "crd": ("k8s", "run.yaml"),
    "scenario": ("death", "hang"),
    "check": ("parity", "resume"),
    "format": ("parquet", "jsonl"),
    "suffix": ("jsonl", "parquet"),
    "dtype": ("bfloat16", "float32"),
    "gpu": ("H100", "L40S"),
    "model_config": ("configs/architectures/gpt2-xl.json",),
    "address": ("http://127.0.0.1:9",),
    "project": (".", "data"),
    "shared": ("data",),
    "env": ("A=b",),
    "exclude": ("*.bin",),
    "overlay": ("development", "production", "production-spot"),
    "component": ("kueue", "spot"),
    "kustomize": ("tree",),
    "image": ("dist-ft:1",),
    "namespace": ("mine",),
    "node_selector": ("a=b",),
    "more": ("claim=shared",),
    "kubernetes": ("1.33",),
    "task": ("mine:Task",),
    "json_out": ("drill.json",),
    "system": ("be brief",),
    "encoding": ("utf-8", "latin-1"),
    "part": ("0", "train"),
}
"""Parameter -> values that make sense."""
NUMBERS = ("1", "2", "4", "32")
MATERIALS = (
    "model",
    "bert",
    "data",
    "held-out",
    "run.yaml",
    "configs",
    "k8s",
    "runs/lm",
    "runs/labels",
)
EXPORTS = {"out": "out", "classifier": "classifier"}
"""Word -> material that is copied only for the cases that name it."""
ODD_FILES: dict[str, bytes | Special] = {
    "empty.yaml": b"",
    "empty.jsonl": b"",
    "binary.yaml": bytes(range(256)),
    "binary.jsonl": bytes(range(256)) * 4,
    "binary.parquet": b"PAR1" + bytes(range(256)) + b"PAR1",
    "text.gz": b"not compressed",
    "rows.csv": b"text,label\na,b\nc\n",
    "folder.yaml": Special.FOLDER,
    "loop.yaml": Special.LINK_TO_ITSELF,
    "pipe.yaml": Special.FIFO,
    "pipe.jsonl": Special.FIFO,
    "nested.json": b"[" * 100_000,
}
"""Files that can stand where another was expected."""


class Parameter(NamedTuple):
    """One parameter of a command.

    Attributes:
        name: of the function's argument.
        options: --name, -n; empty: an argument.
        takes_value: it is no flag.
        is_number: its value is a number.
        is_required: it must be given.
        is_repeatable: it may be given several times.
    """

    name: str
    options: tuple[str, ...]
    takes_value: bool
    is_number: bool
    is_required: bool
    is_repeatable: bool


class Command(NamedTuple):
    """A command of the parser: its words and its parameters."""

    words: tuple[str, ...]
    parameters: tuple[Parameter, ...]


@cache
def commands() -> tuple[Command, ...]:
    """Return all commands of dist-ft."""
    import typer

    from dist_ft.cli import main

    return tuple(_walk(typer.main.get_command(main.app), ()))


def _walk(command: Any, words: tuple[str, ...]) -> Iterator[Command]:
    for name, child in getattr(command, "commands", {}).items():
        yield from _walk(child, (*words, name))
    if not hasattr(command, "commands"):
        yield Command(words, tuple(_parameter(item) for item in command.params))


def _parameter(item: Any) -> Parameter:
    is_option = item.param_type_name == "option"
    return Parameter(
        item.name,
        (*item.opts, *item.secondary_opts) if is_option else (),
        not getattr(item, "is_flag", False),
        _is_number(item),
        item.required,
        item.multiple or item.nargs == -1,
    )


def _is_number(item: Any) -> bool:
    """Return whether a parameter of click, or of typer's own parser, takes a number."""
    kind = getattr(item, "bare_type", None) or getattr(item, "type", None)
    return any(name in repr(kind).lower() for name in ("int", "float"))


def generate(rng: random.Random, materials: Materials, number: int) -> Input:
    """Return a command line, mostly with mutations."""
    command = rng.choice(commands())
    words = [*command.words, *_arguments(rng, command)]
    if rng.random() < 0.05:
        words = [rng.choice(("--debug", "--task", "--task=os:system", "--help")), *words]

    count = rng.choice((0, 0, 1, 1, 1, 2, 3))
    for _ in range(count):
        words = _mutated(rng, words, command)

    used = [word for word in words if word in EXPORTS]
    needed = (*MATERIALS, *(EXPORTS[word] for word in dict.fromkeys(used)))
    files = {name: content for name, content in ODD_FILES.items() if name in words}
    return Input(tuple(map(_as_argument, words)), materials=needed, files=files)


def _arguments(rng: random.Random, command: Command) -> list[str]:
    """Return correct words for the parameters of a command."""
    words: list[str] = []
    for parameter in command.parameters:
        if not parameter.options:
            words += _positional(rng, parameter)
        elif parameter.is_required or rng.random() < 0.3:
            times = rng.choice((1, 1, 2)) if parameter.is_repeatable else 1
            for _ in range(times):
                words.append(rng.choice(parameter.options))
                if parameter.takes_value:
                    words.append(_value(rng, parameter))
    return words


def _positional(rng: random.Random, parameter: Parameter) -> list[str]:
    if parameter.name == "overrides":
        return [_override(rng)] if rng.random() < 0.3 else []
    if not parameter.is_required and rng.random() < 0.5:
        return []
    return [_value(rng, parameter)]


def _value(rng: random.Random, parameter: Parameter) -> str:
    if parameter.is_number:
        return rng.choice(NUMBERS)
    return rng.choice(VALUES.get(parameter.name, mutate.WORDS))


def _override(rng: random.Random) -> str:
    return f"{rng.choice(documents.field_paths())}={rng.choice(mutate.WORDS)}"


def _mutated(rng: random.Random, words: list[str], command: Command) -> list[str]:
    words = list(words)
    at = rng.randrange(len(words))
    kind = rng.randrange(10)
    if kind == 0:
        del words[at]
    elif kind == 1:
        words.insert(at, words[rng.randrange(len(words))])
    elif kind == 2:
        words.append(rng.choice(mutate.WORDS))
    elif kind == 3:
        words[at] = rng.choice(list(ODD_FILES))
    elif kind == 4:
        words.insert(at, rng.choice(_all_options()))
    elif kind == 5 and len(words) > 1:
        other = rng.randrange(len(words))
        words[at], words[other] = words[other], words[at]
    elif kind == 6:
        words[at] = mutate.mutate_tokens(rng, words[at])
    elif kind == 7:
        content = mutate.mutate_bytes(rng, os.fsencode(_as_argument(words[at])))
        words[at] = os.fsdecode(content)
    elif kind == 8:
        name, equals, _ = words[at].partition("=")
        words[at] = f"{name}{equals or '='}{rng.choice(mutate.WORDS)}"
    else:
        words[at] = rng.choice(mutate.WORDS)
    return words or list(command.words)


@cache
def _all_options() -> tuple[str, ...]:
    names: dict[str, None] = {}
    for command in commands():
        for parameter in command.parameters:
            names |= dict.fromkeys(parameter.options)
    return tuple(names)


def _as_argument(word: str) -> str:
    """Return a word as the system passes it: no zero byte, and surrogates only for odd bytes."""
    # Linux allows 128 KiB for a word.
    content = word.replace("\x00", "").encode("utf-8", "surrogatepass")[: 2**17 - 1]
    return os.fsdecode(content)


KIND = Kind("commands", generate, (*MATERIALS, *EXPORTS), may_write_outside=True, quick_cases=40)
