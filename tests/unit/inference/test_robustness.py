"""Robustness scores, prototypes and generated entities, against transformers and numpy."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import tiny
import tiny_tasks
import torch
from sklearn.metrics import accuracy_score, roc_auc_score
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from dist_ft import api
from dist_ft.config.load import load_config
from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.core.errors import ConfigError, DataError, ModelError
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import discover_shards
from dist_ft.data.tools import perturb
from dist_ft.inference.evaluate import evaluate_models
from dist_ft.runtime import local
from dist_ft.runtime.bootstrap.few_shot_examples import draw_examples

LABELS = tiny_tasks.LABELS


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny_tasks.base(tmp_path_factory.mktemp("robust"))
    tiny.make_model(folder / "model")
    trained = load_config(
        tiny_tasks.config(
            folder,
            "sequence_classification",
            "trained",
            schedule={"epochs": 2},
            log={"every_steps": 100},
            checkpoint={"every_steps": 0},
        )
    )
    local.run(trained)
    api.export(trained, str(folder / "out"))
    return folder


def config(base, kind="sequence_classification", **fields):
    document = tiny_tasks.config(base, kind, "robust")
    for section, changed in fields.items():
        document.setdefault(section, {}).update(changed)
    return load_config(document)


def rows_of(made, sources=None):
    return [
        row
        for source in discover_shards(sources or made.evaluation.data)
        for shard in source
        for row in readers.iter_rows(shard)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def logits(base, texts):
    tokenizer = AutoTokenizer.from_pretrained(base / "out")
    model = AutoModelForSequenceClassification.from_pretrained(base / "out").eval()
    with torch.no_grad():
        return np.array(
            [model(**tokenizer(text, return_tensors="pt")).logits[0].numpy() for text in texts]
        )


def found_of(made, base):
    return evaluate_models(made, [str(base / "out")])[str(base / "out")]


def test_out_of_scope_auroc_uses_confidence(base):
    inside = rows_of(config(base))
    outside = [
        {"text": " ".join(random.Random(i).choices(tiny_tasks.PLAIN, k=6)), "label": "oos"}
        for i in range(9)
    ]
    more = [{"text": "morning comes with news"}, {"text": "count stars"}]
    mixed = write(base / "mixed.jsonl", [*inside[:12], *outside, *inside[12:]])
    made = config(
        base,
        evaluation={
            "data": mixed,
            "robustness": {
                "out_of_scope_label": "oos",
                "out_of_scope": write(base / "more.jsonl", more),
            },
        },
    )
    found = found_of(made, base)
    sure = (
        torch.softmax(
            torch.tensor(logits(base, [row["text"] for row in [*inside, *outside, *more]])), 1
        )
        .max(1)
        .values.numpy()
    )
    assert found["out_of_scope_auroc"] == pytest.approx(
        roc_auc_score([1] * len(inside) + [0] * 11, sure), abs=1e-6
    )
    assert found["out_of_scope_rows"] == 11
    assert found["accuracy"] == found_of(config(base), base)["accuracy"], (
        "rows out of scope are no part of it"
    )


def test_typo_metrics_are_added_to_clean_metrics(base):
    made = config(base, evaluation={"robustness": {"typo_rate": 0.5, "seed": 4}})
    rows, found = rows_of(made), found_of(made, base)
    noisy = [
        perturb.make_typo_function(0.5, 4, number)(row["text"]) for number, row in enumerate(rows)
    ]
    expected = [LABELS.index(row["label"]) for row in rows]
    assert (
        found["accuracy_typos"]
        == accuracy_score(expected, logits(base, noisy).argmax(1))
        < found["accuracy"]
    )
    assert found["accuracy"] == accuracy_score(
        expected, logits(base, [row["text"] for row in rows]).argmax(1)
    )
    assert found_of(made, base) == found, "the same again"


def test_swapped_names_change_predictions(base):
    made = config(
        base,
        evaluation={
            "robustness": {
                "swaps": write(
                    base / "swaps.jsonl",
                    [{"first": "tea", "second": "bread"}, {"first": "quick", "second": "lazy"}],
                )
            }
        },
    )
    rows, found, swap = (
        rows_of(made),
        found_of(made, base),
        perturb.make_swap_function([("tea", "bread"), ("quick", "lazy")]),
    )
    pairs = [(row, swap(row["text"])) for row in rows if swap(row["text"]) != row["text"]]
    before, after = (
        logits(base, texts).argmax(1)
        for texts in zip(*[(row["text"], other) for row, other in pairs], strict=True)
    )
    expected = np.array([LABELS.index(row["label"]) for row, _ in pairs])
    assert found["counterfactual_rows"] == len(pairs) > 5
    assert (
        found["counterfactual_changed"] == pytest.approx((before != after).mean())
        and (before != after).mean() > 0
    )
    assert found["counterfactual_gap"] == pytest.approx(
        abs((before == expected).mean() - (after == expected).mean())
    )


@pytest.mark.parametrize("shots", [0, 3])
def test_prototypes_are_mean_vectors_of_examples(base, shots):
    made = config(base, prompting={"method": "prototypes", "shots": shots, "seed": 2})
    found = evaluate_models(made, [made.model.path])[made.model.path]
    tokenizer, model = (
        AutoTokenizer.from_pretrained(base / "bert"),
        AutoModel.from_pretrained(base / "bert").eval(),
    )

    def vector(text):
        with torch.no_grad():
            mean = (
                model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
            )
        return mean / np.linalg.norm(mean)

    run = replace(ResolvedRun.from_config(made), labels=tuple(LABELS))
    drawn = (
        [(one.first, one.label) for one in draw_examples(run, shots)]
        if shots
        else [(row["text"], LABELS.index(row["label"])) for row in rows_of(made, made.data.train)]
    )
    assert len(drawn) == (4 * shots or 96)
    means = np.array(
        [np.mean([vector(text) for text, own in drawn if own == label], 0) for label in range(4)]
    )
    rows = rows_of(made)
    cosines = (
        np.array([vector(row["text"]) for row in rows])
        @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    )
    expected = [LABELS.index(row["label"]) for row in rows]
    assert (
        found["accuracy"] == accuracy_score(expected, cosines.argmax(1))
        and found["head"] == "prototypes"
    )
    assert found["loss"] == pytest.approx(
        -torch.log_softmax(torch.tensor(cosines * 20), 1)[range(len(rows)), expected].mean().item(),
        rel=1e-4,
    )


def test_label_without_an_example_is_reported(base):
    made = config(base, prompting={"method": "prototypes"}, task={"labels": [*LABELS, "metal"]})
    with pytest.raises(DataError, match="has no row with the label metal"):
        evaluate_models(made, [made.model.path])


def test_generated_entities_are_scored(base, monkeypatch):
    from dist_ft.data.encoding import entity_text
    from dist_ft.inference.entities import EntityGenerator

    made = config(
        base,
        "token_classification",
        prompting={
            "method": "generation",
            "templates": ["{text} :"],
            "shots": 1,
            "separator": "\n",
            "max_new_tokens": 5,
        },
        model={"path": str(base / "model")},
        batch={"sequence_length": 64},
    )
    found = evaluate_models(made, [made.model.path])[made.model.path]
    assert found["head"] == "generation" and found["f1"] == 0 and 0 <= found["readable"] < 1, (
        "an untrained model writes garbage"
    )
    prompts = []

    def perfect(self, samples):
        names = {entity_type: entity_type for entity_type in LABELS}
        prompts.extend(self._template.format(text=" ".join(one.first)) for one in samples)
        return [
            entity_text.format_entities(
                one.first, [self.run.labels[tag] for tag in one.label], names
            )
            for one in samples
        ]

    monkeypatch.setattr(EntityGenerator, "_generate", perfect)
    found = evaluate_models(made, [made.model.path])[made.model.path]
    assert found["f1"] == 1 == found["readable"]
    assert len(prompts) == 23 and all(prompt.count(" :") == 2 for prompt in prompts), (
        "one answered example, then the row"
    )


def test_prompt_that_does_not_fit_is_one_line(base):
    with pytest.raises(
        ConfigError, match=r"prompting\.max_new_tokens=64: leaves no tokens for a prompt"
    ):
        made = config(
            base,
            "token_classification",
            prompting={"method": "generation"},
            model={"path": str(base / "model")},
        )
        evaluate_models(made, [made.model.path])
    made = config(base, batch={"sequence_length": 65})
    with pytest.raises(
        ModelError, match=r"batch\.sequence_length=65: longer than the model accepts. At most 64"
    ):
        evaluate_models(made, [str(base / "out")])


def test_robustness_needs_its_task(base):
    with pytest.raises(
        ConfigError, match=r"evaluation\.robustness\.swaps=x: not used by task\.name=regression"
    ):
        config(base, "regression", evaluation={"robustness": {"swaps": "x"}})
    with pytest.raises(ConfigError, match=r"out_of_scope_label=tea: is one of task\.labels"):
        config(
            base,
            task={"labels": ["tea", "fox"]},
            evaluation={"robustness": {"out_of_scope_label": "tea"}},
        )


def test_untrainable_prompting_is_refused(base):
    made = config(base, prompting={"method": "prototypes"}, run={"name": "never"})
    with pytest.raises(ConfigError, match=r"prompting\.method=prototypes: it has nothing to train"):
        api.train(made)
    with pytest.raises(ConfigError, match=r"prompting\.method=prototypes: it has nothing to train"):
        api.train(made, skip_check=True)
