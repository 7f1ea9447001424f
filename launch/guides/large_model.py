"""A pre-trained model: a sentiment classifier in 100 steps, and forgetting over several tasks.

MiniLM on sentence polarity, all weights against LoRA (promised: all weights reach an accuracy of at
least 0.80 in 100 steps at length 48). Then banking intents in three stages, without replay and with
a tenth of
replay: the matrix shows how each stage affects the ones before.
"""

from __future__ import annotations

import csv
import json
from typing import Any

import lab
import small_models
import yaml

MIN_ACCURACY = 0.80
REPLAY = 0.1
STAGE_LABELS, STAGES = 10, 3
TRAINING, HELD_OUT = 40, 20
"""Rows of each label; so few that the guide takes minutes on two cores."""


def guide(here: lab.Lab) -> list[str]:
    """Run the guide in one engine; return what it missed."""
    missed = sentiment(here)
    for replay in (0.0, REPLAY):
        stages(here, replay)
    return missed


def sentiment(here: lab.Lab) -> list[str]:
    """Fine-tune all weights, and LoRA; return what was missed."""
    source = here.data / "data" / "mr_sentence_polarity"
    whole = here.imported(
        "labelled",
        "reviews.jsonl",
        f"{source}/rt-polarity.pos=positive",
        f"{source}/rt-polarity.neg=negative",
        "--encoding",
        "latin-1",
    )
    lab.dist_ft(
        "data", "split", str(whole), "--out", str(whole.parent / "reviews"), "--by", "label"
    )
    given = [
        f"model.path={small_models.minilm()}",
        f"data.train={whole.parent}/reviews/train.jsonl",
        f"evaluation.data={whole.parent}/reviews/held-out.jsonl",
        "batch.global_batch=64",
        "batch.micro_batch=32",
        "batch.sequence_length=48",
        "schedule.epochs=null",
        "schedule.steps=100",
        "evaluation.every_steps=50",
        "checkpoint.every_steps=0",
    ]
    runs = {
        "all weights": here.train("reviews", "reviews.yaml", *given),
        "LoRA": here.train("reviews-lora", "reviews-lora.yaml", *given),
    }
    here.table(
        "Sentiment: held-out data by step",
        ["step", *(f"{what}, {name}" for name in runs for what in ("loss", "accuracy"))],
        [
            [str(lines[0]["step"]), *(line[key] for line in lines for key in ("loss", "accuracy"))]
            for lines in zip(*(run["evaluations"] for run in runs.values()), strict=True)
        ],
    )
    here.table(
        "Sentiment: cost and result",
        ["", "trainable parameters", "accuracy", "seconds", "MB"],
        [
            [name, run["trainable"], run["evaluations"][-1]["accuracy"], run["seconds"], run["MB"]]
            for name, run in runs.items()
        ],
    )
    reached = runs["all weights"]["evaluations"][-1]["accuracy"]
    return (
        []
        if reached >= MIN_ACCURACY
        else [f"accuracy {reached:.3f}; at least {MIN_ACCURACY} is promised"]
    )


def stages(here: lab.Lab, replay: float) -> None:
    """Train on intents in stages, and show the score of every stage after each."""
    name = f"intents-replay-{round(100 * replay)}"
    training, held_out = (rows(here, part) for part in ("train", "test"))
    labels = sorted({row["label"] for row in training})[: STAGE_LABELS * STAGES]
    parts: list[dict[str, Any]] = []
    for number in range(STAGES):
        own = labels[number * STAGE_LABELS : (number + 1) * STAGE_LABELS]
        files = [
            here.rows(
                f"intents-{number}-{part}.jsonl",
                [
                    row
                    for label in own
                    for row in [one for one in found if one["label"] == label][:most]
                ],
            )
            for part, found, most in (
                ("train", training, TRAINING),
                ("held-out", held_out, HELD_OUT),
            )
        ]
        parts.append(
            {
                "name": f"part-{number + 1}",
                "overrides": {"data.train": str(files[0]), "evaluation.data": str(files[1])},
                **({"replay": replay} if number and replay else {}),
            }
        )
    file = here.out / f"{name}.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "name": name,
                "config": str(lab.ROOT / "configs/recipes/intents.yaml"),
                "metric": "accuracy",
                "stages": parts,
            }
        )
    )
    lab.command(
        "stages",
        str(file),
        f"model.path={small_models.minilm()}",
        "task.columns.label=label",
        "tuning.method=full",
        "tuning.last_layers=0",
        "schedule.epochs=3",
        "evaluation.every_steps=0",
        "evaluation.at_start=false",
        "evaluation.at_end=false",
        "checkpoint.every_steps=0",
        "checkpoint.keep_best=0",
        f"run.storage={here.out / 'runs'}",
        f"data.cache_dir={here.out / 'cache'}",
        *lab.ENGINES[here.engine],
        quiet=here.out / f"{name}.log",
    )
    matrix = json.loads((here.out / "runs" / name / "matrix.json").read_text())
    here.table(
        f"Intents in stages, {replay:.0%} replay: accuracy of each part after each stage",
        ["after", *(part["name"] for part in parts)],
        [[part["name"], *row] for part, row in zip(parts, matrix["matrix"], strict=True)],
    )
    here.table(
        f"Intents in stages, {replay:.0%} replay: retention",
        ["", "value"],
        [
            [key.replace("_", " "), matrix["after"][-1][key]]
            for key in ("average", "forgetting", "backward_transfer")
        ],
    )


def rows(here: lab.Lab, part: str) -> list[dict[str, str]]:
    """Return the rows of a part of banking77."""
    with open(
        here.data / "data" / "banking77" / f"{part}.csv", newline="", encoding="utf-8"
    ) as file:
        return [{"text": row["text"], "label": row["category"]} for row in csv.DictReader(file)]
