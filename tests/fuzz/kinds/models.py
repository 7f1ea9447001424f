"""Model and adapter folders with mutated files, read by every command that reads models."""

from __future__ import annotations

import random

from fuzz.inputs import File, Input
from fuzz.kinds import files
from fuzz.kinds.kind import Kind
from fuzz.materials import Materials

FOLDERS = ("model", "bert", "bart", "out", "classifier", "adapter")
TASKS = {
    "model": "causal_lm",
    "bert": "sequence_classification",
    "bart": "seq2seq",
    "out": "causal_lm",
    "classifier": "sequence_classification",
    "adapter": "causal_lm",
}
DATA = ("data", "held-out", "run.yaml")
SOUND = ("model", "bert", "bart", "data", "held-out")
NAMES = (
    *(
        "base",
        "path",
        "trust_remote_code",
        "revision",
        "auto_map",
        "task",
        "name",
        "labels",
        "tuning",
    ),
    *("model_type", "vocab_size", "hidden_size", "n_embd", "architectures", "quantization_config"),
    *("chat_template", "eos_token", "pad_token", "added_tokens", "model", "type", "weight_map"),
    *("data_offsets", "dtype", "shape", "__metadata__", "id2label", "torch_dtype", "rope_scaling"),
)
FAVORED = (".json", ".jinja")


def generate(rng: random.Random, materials: Materials, number: int) -> Input:
    """Return a command on a model folder with one or two mutated files."""
    folder = rng.choice(FOLDERS)
    names = materials.files(folder)
    favored = [name for name in names if name.endswith(FAVORED)]

    changed: dict[str, File] = {}
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(favored if rng.random() < 0.75 else names)
        changed[name] = files.mutated(rng, materials.read(name), NAMES)
    if rng.random() < 0.05:
        changed[f"{folder}/model.safetensors.index.json"] = (
            b'{"weight_map": {"a": "../b.safetensors"}}'
        )

    # The base of an adapter is a folder of its own.
    needed = {folder, *DATA} | ({"model"} if folder == "adapter" else set())
    words = rng.choice(_commands(folder))
    return Input(words, materials=tuple(sorted(needed)), files=changed)


def _commands(folder: str) -> list[tuple[str, ...]]:
    """Return the command lines that read a model folder."""
    task = TASKS[folder]
    config = ("run.yaml", f"model.path={folder}", f"task.name={task}", "run.name=new")
    data = (f"data.train=data/{task}/*.jsonl", f"evaluation.data=held-out/{task}/*.jsonl")
    commands = [
        ("check", *config, *data),
        ("train", *config, *data),
        ("preview", *config, *data),
        ("plan", *config, *data),
        ("evaluate", *config, *data),
        ("predict", folder, f"data/{task}", "--out", "predicted.jsonl", "--max-new-tokens", "4"),
    ]
    if task == "causal_lm":
        commands.append(("generate", folder, "--prompt", "say the", "--max-new-tokens", "4"))
    if folder == "classifier":
        commands.append(("data", "pseudo", folder, "data/regression", "--out", "pseudo.jsonl"))
    return commands


KIND = Kind("models", generate, (*FOLDERS, *DATA), quick_cases=10)
