"""Run folders with mutated files, read by every command that reads runs.

Half of the mutated manifests and indexes get a checksum that fits, as an attacker would write it.
"""

from __future__ import annotations

import json
import random

from fuzz import mutate
from fuzz.inputs import File, Input
from fuzz.kinds import files
from fuzz.kinds.kind import Kind
from fuzz.materials import Materials

RUNS = ("runs/lm", "runs/labels", "runs/lora")
DATA = ("model", "bert", "data", "held-out")
COMMANDS = (
    ("runs", "show", "RUN"),
    ("runs", "show", "RUN"),
    ("runs", "list", "runs"),
    ("runs", "report", "RUN", "--out", "report"),
    ("runs", "report", "RUN", "--out", "report"),
    ("runs", "verify", "RUN"),
    ("runs", "watch", "RUN", "--once"),
    ("runs", "diff", "RUN", "--step", "2", "--step", "4"),
    ("runs", "diff", "RUN", "--step", "1", "--step", "2"),
    ("runs", "prune", "RUN"),
    ("runs", "prune", "RUN", "--yes"),
    ("data", "verify", "RUN"),
    ("data", "verify", "RUN"),
    ("export", "RUN", "--out", "exported"),
    ("export", "RUN", "--out", "exported", "--best"),
    ("train", "CONFIG", "schedule.steps=5"),
    ("train", "CONFIG", "schedule.steps=5"),
    ("check", "CONFIG", "schedule.steps=5"),
    ("check", "run.yaml", "model.path=RUN"),
    ("generate", "RUN", "--prompt", "say the", "--max-new-tokens", "4"),
    ("predict", "RUN", "data/sequence_classification/shard.jsonl", "--out", "predicted.jsonl"),
)
FAVORED = (
    "manifest.json",
    "attempts/",
    "evaluations/",
    "metrics.jsonl",
    "run.yaml",
    "data/",
    "time",
)
"""Files that commands parse: they are mutated more often than weights."""
NAMES = ("step", "kind", "loss", "path", "tensors", "shape", "attempt", "after", "checksum", "name")


def generate(rng: random.Random, materials: Materials, number: int) -> Input:
    """Return a command on a run with one or two mutated files."""
    run = rng.choice(RUNS)
    names = [name for name in materials.files(run) if "tensorboard" not in name]
    if rng.random() < 0.1:
        # Tokenized blocks, which a resumed run reads again.
        materials.path("runs/lm")
        names, run = materials.files("cache"), "runs/lm"
    favored = [name for name in names if any(part in name for part in FAVORED)]

    changed: dict[str, File] = {}
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(favored if favored and rng.random() < 0.75 else names)
        changed[name] = _mutated(rng, name, materials.read(name))

    # The config of the next start is the user's own, not that in the folder.
    config = materials.read(f"{run}/run.yaml")
    command = rng.choice(COMMANDS)
    replacements = {"RUN": run, "CONFIG": "again.yaml", "model.path=RUN": f"model.path={run}"}
    words = tuple(replacements.get(word, word) for word in command)
    return Input(words, materials=(*DATA, "run.yaml", run), files={"again.yaml": config, **changed})


def _mutated(rng: random.Random, name: str, content: bytes) -> File:
    if rng.random() < 0.5:
        if name.endswith("manifest.json"):
            return resealed_manifest(rng, content)
        if name.endswith(("data.train.json", "evaluation.data.json")):
            return resealed_index(rng, content)
    return files.mutated(rng, content, NAMES)


def resealed_manifest(rng: random.Random, content: bytes) -> bytes:
    """Return a mutated manifest whose checksum fits."""
    from dist_ft.checkpoint.manifest import compute_checksum

    values = json.loads(content)
    del values["checksum"]
    body = json.dumps(files.mutated_json(rng, values, NAMES), indent=1).encode()
    if not body.endswith(b"\n}"):
        return body

    digest = compute_checksum(body).encode()
    return body.removesuffix(b"\n}") + b',\n "checksum": "' + digest + b'"\n}'


def resealed_index(rng: random.Random, content: bytes) -> bytes:
    """Return a mutated index of blocks whose checksum fits."""
    import xxhash

    header_line, _, body = content.partition(b"\n")
    header = json.loads(header_line)
    values = files.mutated_json(rng, json.loads(body), ("shards", "blocks", "measures"))
    body = json.dumps(values).encode()
    header["checksum"] = xxhash.xxh3_128_hexdigest(body)
    if rng.random() < 0.1:
        header = mutate.mutate_tree(rng, header, ("format", "checksum"), mutate.json_value)
    return json.dumps(header).encode() + b"\n" + body + b"\n"


KIND = Kind("runs", generate, (*DATA, "run.yaml", *RUNS), quick_cases=20)
