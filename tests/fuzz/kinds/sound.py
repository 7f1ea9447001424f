"""Inputs without a mutation: they must succeed, or the other kinds would test refusals only."""

from __future__ import annotations

import random

import yaml

from fuzz import documents
from fuzz.inputs import Input
from fuzz.kinds import models, runs
from fuzz.kinds.kind import Kind
from fuzz.materials import Materials

CHECKED = ("causal_lm", "token_classification", "question_answering", "seq2seq")
TRAINED = ("causal_lm", "sequence_classification")


def _inputs() -> list[Input]:
    """Return all of them."""
    found = []
    for command, tasks in (("check", CHECKED), ("train", TRAINED)):
        for task in tasks:
            content = yaml.safe_dump(documents.base_document(task, "sound")).encode()
            files = {"sound.yaml": content}
            found.append(Input((command, "sound.yaml"), materials=models.SOUND, files=files))

    for command in dict.fromkeys(runs.COMMANDS):
        if "CONFIG" not in command and "1" not in command and "predict" not in command:
            words = tuple(word.replace("RUN", "runs/lm") for word in command)
            found.append(Input(words, materials=(*runs.DATA, "run.yaml", "runs/lm")))

    words = ("train", "run.yaml", "model.path=adapter", "run.name=from-adapter")
    found.append(Input(words, materials=(*runs.DATA, "run.yaml", "adapter")))
    for folder in ("adapter", "classifier"):
        words = ("predict", folder, f"data/{models.TASKS[folder]}", "--out", "predicted.jsonl")
        words += ("--max-new-tokens", "4")
        found.append(Input(words, materials=("model", "data", folder)))
    return found


INPUTS = _inputs()


def generate(rng: random.Random, materials: Materials, number: int) -> Input:
    """Return the input of a number: all of them in turn."""
    return INPUTS[number % len(INPUTS)]


KIND = Kind("sound", generate, models.SOUND, must_succeed=True, quick_cases=len(INPUTS))
