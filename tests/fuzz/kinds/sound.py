"""Inputs without a mutation: they must succeed, or the other kinds would test refusals only."""

from __future__ import annotations

import random

import yaml

from fuzz import documents
from fuzz.inputs import Input
from fuzz.kinds import models, runs
from fuzz.kinds.kind import Kind
from fuzz.materials import Materials

TRAINED = ("causal_lm", "sequence_classification", "question_answering")


def _inputs() -> list[Input]:
    """Return all of them."""
    found = []
    for task in documents.TASKS:
        content = yaml.safe_dump(documents.base_document(task, "sound")).encode()
        for command in ("check", "train") if task in TRAINED else ("check",):
            words = (command, "sound.yaml")
            found.append(Input(words, materials=models.SOUND, files={"sound.yaml": content}))

    for command in dict.fromkeys(runs.COMMANDS):
        if "CONFIG" not in command and "1" not in command and "predict" not in command:
            words = tuple("runs/lm" if word == "RUN" else word for word in command)
            found.append(Input(words, materials=(*runs.DATA, "run.yaml", "runs/lm")))

    for folder in ("out", "adapter", "classifier"):
        words = ("predict", folder, f"data/{models.TASKS[folder]}", "--out", "predicted.jsonl")
        found.append(Input(words, materials=("model", "data", folder)))
    return found


INPUTS = _inputs()


def generate(rng: random.Random, materials: Materials, number: int) -> Input:
    """Return the input of a number: all of them in turn."""
    return INPUTS[number % len(INPUTS)]


KIND = Kind("sound", generate, models.SOUND, must_succeed=True, quick_cases=len(INPUTS))
