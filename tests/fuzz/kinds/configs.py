"""YAML files of runs, searches and stages, and overrides: mutated bytes, tokens and values."""

from __future__ import annotations

import random
from typing import Any

import yaml

from fuzz import documents, mutate
from fuzz.inputs import Input
from fuzz.kinds.kind import Kind
from fuzz.materials import Materials

COMMANDS = (
    *(("check",),) * 10,
    *(("train",),) * 4,
    *(("plan",), ("plan", "--json"), ("preview",), ("data", "pack-stats"), ("k8s", "render")),
    *(("evaluate",), ("decode",), ("data", "write", "--out", "shards"), ("runs", "show")),
    *(("submit", "--print", "--skip-check"), ("export", "--out", "exported"), ("data", "verify")),
)
MOVED = ("model", "bert", "bart", "data", "held-out")
"""Materials that a config may name."""
TAGS = (
    "!!python/object/apply:os.system [exit]",
    "!!binary AAAA",
    "!!set {a, b}",
    "!custom x",
    "!!timestamp x",
)


def generate(rng: random.Random, materials: Materials, number: int) -> Input:
    """Return a command on a mutated config."""
    if rng.random() < 0.08:
        return _series(rng)

    content, overrides = _config(rng)
    command = rng.choice(COMMANDS)
    words = (command[0], "mutated.yaml", *command[1:], *overrides)
    if command[0] in ("data", "k8s", "runs"):
        words = (*command[:2], "mutated.yaml", *command[2:], *overrides)
    return Input(words, materials=MOVED, files={"mutated.yaml": content})


def _series(rng: random.Random) -> Input:
    """Return a command on a mutated file of a search or of stages; their config stays correct."""
    folder = documents.ROOT / "configs" / "recipes"
    is_search = rng.random() < 0.5
    name = "search.yaml" if is_search else "stages-intents.yaml"
    content = _mutated(rng, (folder / name).read_bytes())
    base = yaml.safe_dump(documents.base_document("sequence_classification", "base")).encode()

    files = {"mutated.yaml": content, "intents.yaml": base}
    words = ["stages", "mutated.yaml"]
    if is_search:
        words = ["tune", "intents.yaml", "mutated.yaml"]
    if rng.random() < 0.3:
        words.append(_override(rng))
    return Input(tuple(words), materials=MOVED, files=files)


def _config(rng: random.Random) -> tuple[bytes, list[str]]:
    """Return a mutated config and overrides."""
    overrides: list[str] = []
    if rng.random() < 0.4:
        path = rng.choice(documents.shipped_configs())
        content = path.read_bytes()
        if rng.random() < 0.7:
            task = (yaml.safe_load(content).get("task") or {}).get("name", "causal_lm")
            local = f"model.path={documents.TASKS.get(task, 'model')}"
            overrides += [local, f"data.train=data/{task}/*.jsonl", *documents.LOCAL]
    else:
        task = rng.choice(list(documents.TASKS))
        document = documents.base_document(task, "drawn")
        document = documents.with_random_fields(rng, document, rng.choice((0, 0, 0, 1, 1, 2, 6)))
        content = yaml.safe_dump(document, sort_keys=False).encode()

    if rng.random() < 0.75:
        content = _mutated(rng, content)
    if rng.random() < 0.2:
        overrides.insert(rng.randrange(len(overrides) + 1), _override(rng))
    return content, overrides


def _mutated(rng: random.Random, content: bytes) -> bytes:
    """Return YAML with one to three mutations of its values, then of its text."""
    count = rng.choice((1, 1, 2, 3))
    if rng.random() < 0.6:
        tree = yaml.safe_load(content)
        for _ in range(count):
            if isinstance(tree, dict) and rng.random() < 0.35:
                # A value that its field allows, so that more than the schema is tested.
                tree = documents.with_random_fields(rng, tree, 1)
            else:
                tree = mutate.mutate_tree(rng, tree, documents.field_names())
        content = _dump(rng, tree)
        count = rng.choice((0, 0, 0, 1))

    for _ in range(count):
        kind = rng.randrange(4)
        if kind == 0:
            content = mutate.mutate_bytes(rng, content)
        elif kind == 1:
            content = _odd_yaml(rng, content)
        else:
            text = mutate.mutate_tokens(
                rng, content.decode(errors="replace"), documents.field_names()
            )
            content = text.encode("utf-8", "surrogatepass")
    return content


def _dump(rng: random.Random, tree: Any) -> bytes:
    style = rng.choice((None, False, True))
    try:
        text = yaml.safe_dump(tree, default_flow_style=style, allow_unicode=rng.random() < 0.5)
    except (yaml.YAMLError, TypeError):
        text = repr(tree)
    return text.encode("utf-8", "surrogatepass")


def _odd_yaml(rng: random.Random, content: bytes) -> bytes:
    """Return the text with something that YAML allows and few people know, or that it forbids."""
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(12)
    if kind == 0:
        return content.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n\t", b"\xe2\x80\xa8")))
    if kind == 1:
        text = content.decode(errors="replace")
        return text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "latin-1")), "replace")
    if kind == 2:
        return rng.choice((b"%YAML 9.9\n---\n", b"---\n", b"--- !!set\n", b"\t", b"? ")) + content
    if kind == 3:
        return content + rng.choice((b"\n---\n" + content, b"\n...\nx", b"\nrun: &r {name: *r}\n"))
    if kind == 4:
        # Aliases that double at each line.
        bomb = b"a0: &a0 [x, x]\n"
        for number in range(rng.choice((3, 12, 30))):
            bomb += b"a%d: &a%d [*a%d, *a%d]\n" % (number + 1, number + 1, number, number)
        return bomb + content
    if kind == 5:
        return content + b"\nlog: &a [*a]\n"
    if kind == 6:
        return content + b"\n" + rng.choice(lines) + b"\n"
    if kind == 7:
        key, _, _ = lines[at].partition(b":")
        lines[at] = key + b": " + rng.choice(TAGS).encode()
    elif kind == 8:
        lines[at] = b"<<: " + rng.choice((b"5", b"[1]", b"*nothing", b"{a: b}"))
    elif kind == 9:
        depth = rng.choice((20, 500, 20_000))
        lines[at] = b"log: " + b"[" * depth + b"]" * depth
    elif kind == 10:
        lines[at] = b" " + lines[at]
    else:
        lines[at] = b"? [a, b]\n: {1: 2, null: 3}"
    return b"\n".join(lines)


def _override(rng: random.Random) -> str:
    path = rng.choice(documents.field_paths())
    if rng.random() < 0.2:
        path = mutate.mutate_tokens(rng, path, documents.field_names())
    value = rng.choice(mutate.WORDS)
    # Words of a command line end at a zero byte.
    return f"{path}={value}".replace("\x00", "")


KIND = Kind("configs", generate, MOVED, may_write_outside=True, quick_cases=60)
