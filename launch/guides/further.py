"""Further recipes on real data, each for a few steps: the loss falls.

A row each: relations between marked words, answers in texts (split by article), summaries and
arithmetic by a small causal model with LoRA, instructions, conversations, continued pre-training,
rare entities.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lab
import small_models

SMALL = (
    "batch.global_batch=4",
    "batch.micro_batch=2",
    "batch.sequence_length=192",
    "schedule.steps=12",
    "schedule.epochs=null",
    "schedule.warmup_ratio=0.1",
    "tuning.method=lora",
    "optimizer.learning_rate=1e-3",
    "evaluation.max_samples=16",
    "data.overlong=truncate",
)
"""A model of 135 M parameters without a GPU: adapters, few and short sequences."""
ENCODER = ("schedule.steps=60", "schedule.epochs=null", "evaluation.max_samples=400")


def guide(here: lab.Lab) -> list[str]:
    """Run the recipes in one engine; return those whose held-out loss did not fall."""
    rows, missed = [], []
    for name, recipe, files, overrides in recipes(here):
        run = here.train(
            name, recipe, *files, *overrides, "evaluation.every_steps=0", "checkpoint.every_steps=0"
        )
        losses = [line["loss"] for line in run["train"]]
        part = max(1, len(losses) // 4)
        first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
        before, after = run["evaluations"][0], run["evaluations"][-1]
        metric = next(
            (key for key in ("f1", "f1_macro", "exact_match", "number_match") if key in after), None
        )
        rows.append(
            [
                name,
                run["task"].replace("_", " "),
                run["steps"],
                first,
                last,
                before["loss"],
                after["loss"],
                metric or "",
                before.get(metric),
                after.get(metric),
                run["seconds"],
            ]
        )
        if (
            after["loss"] >= before["loss"]
        ):  # on the same samples, unlike the training loss of the first and last steps
            missed.append(f"{name}: the held-out loss did not fall")
    here.table(
        "Further recipes, a few steps each",
        [
            "data",
            "task",
            "steps",
            "training loss, first quarter",
            "last quarter",
            "held-out loss before",
            "after",
            "metric",
            "its value before",
            "its value after",
            "seconds",
        ],
        rows,
    )
    return missed


def recipes(here: lab.Lab) -> Iterator[tuple[str, str, list[str], tuple[str, ...]]]:
    """Yield (data set, recipe, files as overrides, further overrides)."""
    data, encoder, causal = (
        here.data / "data",
        str(small_models.minilm()),
        str(small_models.smollm2(lab.say)),
    )
    on_encoder, on_causal = (f"model.path={encoder}", *ENCODER), (f"model.path={causal}", *SMALL)
    yield (
        "relations",
        "relations.yaml",
        files(data / "semeval2010_task8/train.jsonl", data / "semeval2010_task8/test.jsonl"),
        on_encoder,
    )
    whole = here.imported("squad", "xquad.jsonl", str(data / "xquad/xquad.en.json"))
    lab.dist_ft(
        "data",
        "split",
        str(whole),
        "--out",
        str(whole.parent / "xquad"),
        "--share",
        "train=0.85",
        "--share",
        "held-out=0.15",
        "--group",
        "title",
    )
    yield (
        "answers",
        "answers.yaml",
        files(whole.parent / "xquad/train.jsonl", whole.parent / "xquad/held-out.jsonl"),
        on_encoder,
    )
    rare = [
        here.imported("conll", f"wnut-{name}.jsonl", str(data / "wnut17" / file))
        for name, file in (("train", "wnut17train.conll"), ("dev", "emerging.dev.conll"))
    ]
    yield "rare-entities", "entities.yaml", files(*rare), on_encoder
    titles = [
        here.rows(f"scitldr-{part}.jsonl", map(summary, read(data / f"scitldr_a/{part}.jsonl")))
        for part in ("train", "dev")
    ]
    yield "summaries", "instructions.yaml", files(*titles), on_causal
    yield (
        "arithmetic",
        "math.yaml",
        files(data / "gsm8k/train.jsonl", data / "gsm8k/test.jsonl"),
        (
            *on_causal,
            "evaluation.every_epochs=0",
            "checkpoint.best_by=loss",
            "evaluation.generate_samples=2",
            "evaluation.decoding.max_new_tokens=48",
        ),
    )
    tasks = list(map(instruction, read(data / "self_instruct/seed_tasks.jsonl")))
    seeds = [
        here.rows(f"self-instruct-{name}.jsonl", rows)
        for name, rows in (("train", tasks[:-20]), ("held-out", tasks[-20:]))
    ]
    yield "instructions", "instructions.yaml", files(*seeds), on_causal
    yield (
        "conversations",
        "chat.yaml",
        files(data / "sgd_chat/train.jsonl", data / "sgd_chat/eval.jsonl"),
        on_causal,
    )
    lines = [
        line
        for line in (data / "wikitext2/valid.txt").read_text("utf-8").splitlines()
        if len(line) > 200
    ]
    some = here.rows("wikitext2-held-out.jsonl", ({"text": line} for line in lines[:16]))
    yield (
        "encyclopedia",
        "continued.yaml",
        files(data / "wikitext2/test.txt", some),
        (*on_causal[:-1], "data.overlong=split"),
    )


def files(train: Path, held_out: Path) -> list[str]:
    """Return training and held-out data as overrides."""
    return [f"data.train={train}", f"evaluation.data={held_out}"]


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def summary(row: dict[str, Any]) -> dict[str, str]:
    """Return the first sentences of an abstract, and its summary in one sentence."""
    return {
        "prompt": " ".join(row["source"][:4]) + "\n\nIn one sentence:",
        "response": row["target"][0],
    }


def instruction(row: dict[str, Any]) -> dict[str, str]:
    """Return an instruction with its first input, and the output."""
    one = row["instances"][0]
    return {
        "prompt": re.sub(r"\s+$", "", f"{row['instruction']}\n{one['input']}"),
        "response": one["output"],
    }
