"""Decoding strategies before and after fine-tuning.

SmolLM2 with LoRA on English to French news, greedy and beam search before and after, BLEU, chrF and
time; then a sequence-level stage (minimum risk training) from there. A BART of 0.75 M parameters on
spelling to pronunciation, with its phoneme error rate. The size of the models bounds the quality:
the tables tell what decoding and training change.
"""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import lab
import small_models

STRATEGIES = ("greedy", "beam:4")
HELD_OUT, STEPS, RISK_STEPS = 16, 24, 4
SPEAKING_STEPS, WORDS = 100, 200


def guide(here: lab.Lab) -> list[str]:
    """Run the guide in one engine; return what it missed: chrF must rise with training."""
    missed = translation(here)
    words = pronunciations()
    if words is None:
        lab.say(
            "pronunciation is skipped: the package misaki with its word list is not installed "
            "(pip install --no-deps misaki)"
        )
        return missed
    return missed + pronunciation(here, words)


def translation(here: lab.Lab) -> list[str]:
    """Translate before and after, and after a sequence-level stage."""
    base, source = str(small_models.smollm2(lab.say)), here.data / "data" / "ntrex"
    pairs = here.imported(
        "parallel",
        "pairs.jsonl",
        str(source / "newstest2019-src.eng.txt"),
        str(source / "newstest2019-ref.fra.txt"),
    )
    rows = [
        row
        for row in map(json.loads, pairs.read_text("utf-8").splitlines())
        if len(row["source"]) < 90
    ]
    random.Random(0).shuffle(rows)
    given = [
        f"data.train={here.rows('train.jsonl', rows[HELD_OUT:])}",
        f"evaluation.data={here.rows('held-out.jsonl', rows[:HELD_OUT])}",
        "batch.sequence_length=160",
        "evaluation.decoding.max_new_tokens=48",
        "evaluation.patience=0",
    ]
    run = here.train(
        "translation",
        "translation.yaml",
        f"model.path={base}",
        *given,
        "schedule.epochs=null",
        f"schedule.steps={STEPS}",
        "batch.global_batch=4",
        "evaluation.every_steps=0",
        "checkpoint.every_steps=0",
    )
    model = here.export(run["url"])
    risk = here.train(
        "translation-risk",
        "translation.yaml",
        f"model.path={model}",
        *given,
        "schedule.epochs=null",
        f"schedule.steps={RISK_STEPS}",
        "batch.global_batch=2",
        "batch.micro_batch=1",
        "optimizer.learning_rate=1e-4",
        "data.pack=false",
        "task.objective=minimum_risk",
        "task.risk={candidates: 3, max_new_tokens: 32}",
        "evaluation.every_steps=0",
        "checkpoint.every_steps=0",
    )
    models = {
        "before": base,
        "after": str(model),
        "after minimum risk": str(here.export(risk["url"])),
    }
    arguments = [word for path in models.values() for word in ("--model", path)]
    arguments += [word for strategy in STRATEGIES for word in ("--strategy", strategy)]
    results = json.loads(
        lab.dist_ft(
            "decode",
            "configs/recipes/translation.yaml",
            f"model.path={base}",
            *given,
            f"data.cache_dir={here.out / 'cache'}",
            *arguments,
            "--json",
        )
    )
    names = {path: name for name, path in models.items()}
    here.table(
        "English to French",
        ["", "strategy", "BLEU", "chrF", "seconds", "tokens/s"],
        [
            [
                names[one["model"]],
                one["strategy"],
                one["bleu"],
                one["chrf"],
                one["seconds"],
                one["tokens_per_s"],
            ]
            for one in results
        ],
    )
    here.table(
        "While training",
        ["", "loss before", "loss after", "chrF before", "chrF after", "seconds"],
        [
            [
                name,
                found["evaluations"][0]["loss"],
                found["evaluations"][-1]["loss"],
                found["evaluations"][0]["chrf"],
                found["evaluations"][-1]["chrf"],
                found["seconds"],
            ]
            for name, found in (("likelihood", run), ("minimum risk", risk))
        ],
    )
    greedy = {one["model"]: one["chrf"] for one in results if one["strategy"] == "greedy"}
    return [] if greedy[str(model)] > greedy[base] else ["chrF did not rise with training"]


def pronunciations() -> list[tuple[str, str]] | None:
    """Return words and phonemes of the package misaki; None if it is not installed."""
    found = importlib.util.find_spec("misaki")
    if found is None or found.origin is None:
        return None
    words = json.loads((Path(found.origin).parent / "data" / "us_gold.json").read_text("utf-8"))
    return [
        (word, phonemes)
        for word, phonemes in words.items()
        if isinstance(phonemes, str) and word.isalpha() and word.islower() and 4 <= len(word) <= 14
    ]


def pronunciation(here: lab.Lab, words: list[tuple[str, str]]) -> list[str]:
    """Fine-tune the small BART on words and phonemes; it knows such words, so the gain is small."""
    model = small_models.speller(here.data / "models" / "bart-g2p-us", here.out / "models" / "bart")
    random.Random(0).shuffle(words)
    rows: list[dict[str, Any]] = [
        {"source": " ".join(("<s>", *word)), "target": " ".join(phonemes)}
        for word, phonemes in words
    ]
    run = here.train(
        "pronunciation",
        "pronunciation.yaml",
        f"model.path={model}",
        f"data.train={here.rows('words.jsonl', rows[WORDS : WORDS + 8000])}",
        f"evaluation.data={here.rows('held-out-words.jsonl', rows[:WORDS])}",
        "schedule.epochs=null",
        f"schedule.steps={SPEAKING_STEPS}",
        "batch.sequence_length=64",
        "optimizer.learning_rate=1e-5",
        "evaluation.every_steps=0",
        "checkpoint.every_steps=0",
    )
    first, last = run["evaluations"][0], run["evaluations"][-1]
    here.table(
        "Spelling to pronunciation (beam search)",
        ["", "phoneme error rate", "words right", "seconds"],
        [
            ["before", first["token_error_rate"], first["exact_match"], None],
            ["after", last["token_error_rate"], last["exact_match"], run["seconds"]],
        ],
    )
    return []
