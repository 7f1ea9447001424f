"""No training: three ways to use what models already know, next to a head that was never trained.

SmolLM2 by the likelihood of words after a prompt (sentiment: three templates, then with examples)
and by generation (entities in tweets, after examples); MiniLM by the nearest mean vector of a few
examples (77 banking intents); MiniLM with a random head as control. A model of 135 M parameters
finds few entities. Prototypes and generated entities run in one process in both engines.
"""

from __future__ import annotations

import csv
import json
import random

import lab
import small_models

TEMPLATES = (
    "Review: {text}\nSentiment:",
    "{text}\nIs this review positive or negative? It is",
    "{text} All in all the film was",
)
ROWS, TWEETS, INTENT_ROWS = 120, 24, 600


def guide(here: lab.Lab) -> list[str]:
    """Run the guide in one engine; return what it missed: a random head must be marked as one."""
    causal, encoder = (
        f"model.path={small_models.smollm2(lab.say)}",
        f"model.path={small_models.minilm()}",
    )
    given = sentiment_data(here)
    found = []
    for number, template in enumerate(TEMPLATES, 1):
        one = f"prompting.templates={json.dumps([template])}"
        found.append(
            [
                f"SmolLM2, no example, template {number}",
                *cells(here.evaluate("zero-shot.yaml", causal, one, *given)),
            ]
        )
    shown = [
        f"prompting.templates={json.dumps(TEMPLATES[:1])}",
        "prompting.shots=2",
        "batch.sequence_length=384",
    ]
    found.append(
        [
            "SmolLM2, two examples a label, template 1",
            *cells(here.evaluate("zero-shot.yaml", causal, *shown, *given)),
        ]
    )
    control = here.evaluate("reviews.yaml", encoder, *given, "--random-head")
    found.append([f"MiniLM, {control['head']} head (control)", *cells(control)])
    here.table(
        "Sentiment without training", ["", "accuracy", "macro F1", "method", "seconds"], found
    )
    intents = [
        here.rows(f"intents-{part}.jsonl", banking(here, part)) for part in ("train", "test")
    ]
    near = here.evaluate(
        "prototypes.yaml",
        encoder,
        f"data.train={intents[0]}",
        f"evaluation.data={intents[1]}",
        f"evaluation.max_samples={INTENT_ROWS}",
        "task.columns.label=label",
        in_process=True,
    )
    here.table(
        "77 intents by the nearest of their means, 10 examples each",
        ["", "accuracy", "macro F1", "method", "seconds"],
        [["MiniLM", *cells(near)]],
    )
    tweets = [
        here.imported("conll", f"btc-{part}.jsonl", str(here.data / f"data/btc/btc.{part}"))
        for part in ("train", "dev")
    ]
    generated = here.evaluate(
        "few-shot-entities.yaml",
        causal,
        f"data.train={tweets[0]}",
        f"evaluation.data={tweets[1]}",
        f"evaluation.max_samples={TWEETS}",
        "data.bad_rows=skip",
        "prompting.shots=4",
        "prompting.verbalizers={PER: person, LOC: place, ORG: organisation}",
        in_process=True,
    )
    here.table(
        "Generated entities, after four examples",
        ["", "F1", "readable answers", "method", "seconds"],
        [["SmolLM2", *(generated[key] for key in ("f1", "readable", "head", "seconds"))]],
    )
    return [] if control["head"] == "random" else ["the control's head is not marked as random"]


def cells(scores: dict) -> list:
    """Return the cells of a row."""
    return [scores["accuracy"], scores["f1_macro"], scores["head"], scores["seconds"]]


def sentiment_data(here: lab.Lab) -> list[str]:
    """Return training and held-out reviews as overrides."""
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
    held_out = (whole.parent / "reviews" / "held-out.jsonl").read_text("utf-8").splitlines()
    some = here.rows("reviews-some.jsonl", map(json.loads, random.Random(0).sample(held_out, ROWS)))
    return [f"data.train={whole.parent}/reviews/train.jsonl", f"evaluation.data={some}"]


def banking(here: lab.Lab, part: str) -> list[dict[str, str]]:
    """Return the rows of a part of banking77, every fifth of the test data (with all intents)."""
    with open(
        here.data / "data" / "banking77" / f"{part}.csv", newline="", encoding="utf-8"
    ) as file:
        rows = [{"text": row["text"], "label": row["category"]} for row in csv.DictReader(file)]
    return rows[::5] if part == "test" else rows
