"""Additive fine-tuning: a pre-trained encoder with a new head that tags words; both are trained.

MiniLM, tweets with persons, places and organisations (two thirds of the Broad Twitter Corpus, so
that both engines finish within twenty minutes on two cores), three epochs. Promised: F1 of whole
entities of at least 0.55.
"""

from __future__ import annotations

import json
from pathlib import Path

import lab
import small_models

SENTENCES = (
    "Angela Merkel meets Apple in Berlin",
    "nothing happened today",
    "Liverpool beat Chelsea at Anfield",
    "I love the BBC and @stephenfry",
)
MIN_F1 = 0.55


def guide(here: lab.Lab) -> list[str]:
    """Run the guide in one engine; return what it missed."""
    source = here.data / "data" / "btc"
    sets = {
        name: here.imported("conll", f"{name}.jsonl", str(source / f"btc.{name}"))
        for name in ("train", "dev", "test")
    }
    some = [
        row for number, row in enumerate(read(sets["train"])) if number % 3
    ]  # from all parts of the corpus
    sets["train"] = here.rows("some.jsonl", some)
    run = here.train(
        "entities",
        "entities.yaml",
        f"model.path={small_models.minilm()}",
        f"data.train={sets['train']}",
        f"evaluation.data={sets['dev']}",
        "evaluation.every_steps=0",
        "evaluation.every_epochs=1",
        "checkpoint.every_steps=0",
    )
    steps = run["steps"]
    rows = [
        [
            f"epoch {round(3 * line['step'] / steps)}",
            line["loss"],
            line["precision"],
            line["recall"],
            line["f1"],
        ]
        for line in run["evaluations"]
    ]
    here.table(
        "Held-out data by epoch (epoch 0: before, the head is random)",
        ["", "loss", "precision", "recall", "F1"],
        rows,
    )
    for title, name in (
        ("Whole entities (seqeval)", "by_label"),
        ("Single tags, B- and I- apart", "by_tag"),
    ):
        here.table(
            title,
            ["", "precision", "recall", "F1", "support"],
            [
                [label, *(row[key] for key in ("precision", "recall", "f1-score", "support"))]
                for label, row in run["tables"][name].items()
            ],
        )
    model = here.export(run["url"])
    tested = here.evaluate(
        "entities.yaml",
        f"data.train={sets['train']}",
        f"evaluation.data={sets['test']}",
        f"model.path={model}",
    )
    here.table(
        "Test data",
        ["", "precision", "recall", "F1"],
        [["after", *(tested[name] for name in ("precision", "recall", "f1"))]],
    )
    new = here.rows("new.jsonl", [{"text": sentence} for sentence in SENTENCES])
    predictions = here.out / "predictions.jsonl"
    lab.dist_ft("predict", str(model), str(new), "--out", str(predictions))
    here.table(
        "New sentences",
        ["", "found"],
        [[row["text"], tags(row["prediction"])] for row in read(predictions)],
    )
    best = max(line["f1"] for line in run["evaluations"])
    return (
        []
        if best >= MIN_F1
        else [f"F1 {best:.3f} within three epochs; at least {MIN_F1} is promised"]
    )


def tags(prediction: dict[str, list[str]]) -> str:
    """Return the words that have a tag, with it."""
    return (
        ", ".join(
            f"{word}/{tag}"
            for word, tag in zip(prediction["tokens"], prediction["tags"], strict=True)
            if tag != "O"
        )
        or "nothing"
    )


def read(path: Path) -> list[dict]:
    """Return the rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
