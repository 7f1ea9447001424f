"""Models scored without training: by prompts and by trained heads, in one table."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import tiny
import tiny_tasks
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_ft import api
from dist_ft.config.load import load_config, to_mapping
from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.core.errors import ConfigError
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import discover_shards
from dist_ft.inference.evaluate import aggregate_templates, evaluate_models
from dist_ft.inference.model_folder import PredictionOptions
from dist_ft.inference.predict import Predictor
from dist_ft.runtime.bootstrap.few_shot_examples import draw_examples
from dist_ft.runtime.preflight import check_run

TEMPLATES = ["say {text} :", "the child counts {text} with"]
WORDS = {"animal": " fox", "drink": " tea", "food": " bread", "place": " distant towns"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny_tasks.base(tmp_path_factory.mktemp("evaluating"))
    tiny.make_model(folder / "model")
    return folder


def config(base, *, templates=TEMPLATES[:1], **fields):
    """A run of the tiny GPT-2 by prompts."""
    document = tiny_tasks.config(
        base,
        "sequence_classification",
        "plain",
        model={"path": str(base / "model")},
        prompting={
            "method": "likelihood",
            "templates": templates,
            "verbalizers": WORDS,
            **fields.pop("prompting", {}),
        },
    )
    for section, changed in fields.items():
        document.setdefault(section, {}).update(changed)
    return load_config(document)


def held_out(made):
    return [
        row
        for source in discover_shards(made.evaluation.data)
        for shard in source
        for row in readers.iter_rows(shard)
    ]


def accuracy_by_hand(folder, rows, prompt_of):
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder).eval(),
    )
    right = 0
    for row in rows:
        scores = {}
        for label, words in WORDS.items():
            prompt, whole = (
                tokenizer(text)["input_ids"]
                for text in (prompt_of(row["text"]), prompt_of(row["text"]) + words)
            )
            with torch.no_grad():
                log_probabilities = torch.log_softmax(model(torch.tensor([whole])).logits[0], -1)
            scores[label] = sum(
                log_probabilities[i - 1, whole[i]].item() for i in range(len(prompt), len(whole))
            )
        right += max(scores, key=scores.__getitem__) == row["label"]
    return right / len(rows)


def test_likelihood_equals_a_plain_loop(base):
    made = config(base)
    found = evaluate_models(made, [made.model.path])[made.model.path]
    assert found["head"] == "likelihood"
    assert found["accuracy"] == pytest.approx(
        accuracy_by_hand(base / "model", held_out(made), lambda t: f"say {t} :")
    )
    assert {"f1_macro", "mcc", "calibration_error", "by_label", "confusion"} <= found.keys()


def test_few_shot_prompts_show_the_drawn_examples(base):
    rng = random.Random(5)
    short = [
        row
        for row in (tiny_tasks.row("sequence_classification", rng) for _ in range(400))
        if len(row["text"]) < 14
    ]
    assert len(short) > 20
    for name, rows in (("shown", short[::2]), ("short", short[1::2])):
        (base / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = config(
        base,
        prompting={"shots": 1, "separator": " and ", "seed": 3},
        batch={"sequence_length": 64},
        data={"overlong": "error", "train": str(base / "shown.jsonl")},
        evaluation={"data": str(base / "short.jsonl")},
    )
    shown = draw_examples(replace(ResolvedRun.from_config(made), labels=tuple(WORDS)), 1)
    assert len(shown) == 4 and sorted(sample.label for sample in shown) == [0, 1, 2, 3]
    assert {sample.first for sample in shown} <= {row["text"] for row in short[::2]}
    before = "".join(f"say {one.first} :{list(WORDS.values())[one.label]} and " for one in shown)
    found = evaluate_models(made, [made.model.path])[made.model.path]
    assert found["accuracy"] == pytest.approx(
        accuracy_by_hand(base / "model", short[1::2], lambda t: f"{before}say {t} :")
    )


def test_several_templates_are_aggregated(base):
    made = config(base, templates=TEMPLATES)
    found = evaluate_models(made, [made.model.path])[made.model.path]
    alone = [
        evaluate_models(config(base, templates=[one]), [made.model.path])[made.model.path]
        for one in TEMPLATES
    ]
    assert list(found["by_template"]) == TEMPLATES
    for one, template in zip(alone, TEMPLATES, strict=True):
        assert found["by_template"][template]["accuracy"] == one["accuracy"]
        assert found["by_template"][template]["loss"] == pytest.approx(one["loss"])
    assert found["loss"] == pytest.approx((alone[0]["loss"] + alone[1]["loss"]) / 2)
    assert found["accuracy_best"] >= found["accuracy"] >= found["accuracy_worst"]


def test_best_and_worst_respect_metrics_that_are_better_low():
    found = aggregate_templates(
        "sequence_classification",
        {
            name: {"accuracy": a, "calibration_error": c}
            for name, a, c in (("x", 0.4, 0.1), ("y", 0.6, 0.3))
        },
    )
    assert (found["accuracy_best"], found["accuracy_worst"]) == (0.6, 0.4)
    assert (found["calibration_error_best"], found["calibration_error_worst"]) == (0.1, 0.3)


def test_evaluation_does_not_read_training_data(base):
    made = config(base)
    gone = made.model_copy(
        update={
            "data": made.data.model_copy(
                update={
                    "train": (
                        made.data.train[0].model_copy(
                            update={"path": str(base / "nowhere" / "*.jsonl")}
                        ),
                    )
                }
            )
        }
    )
    assert evaluate_models(gone, [made.model.path]) == evaluate_models(made, [made.model.path])


def test_trained_head_and_prompted_model_are_evaluated_together(base):
    from dist_ft.runtime import local

    trained = load_config(
        tiny_tasks.config(
            base,
            "sequence_classification",
            "trained",
            schedule={"epochs": 4},
            checkpoint={"every_steps": 0},
            log={"every_steps": 100},
        )
    )
    local.run(trained)
    api.export(trained, str(base / "out"))
    made = config(base)
    found = evaluate_models(made, [str(base / "out"), made.model.path])
    assert [one["head"] for one in found.values()] == ["trained", "likelihood"]
    assert found[str(base / "out")]["accuracy"] > 0.5
    gone = trained.model_copy(
        update={
            "data": trained.data.model_copy(
                update={
                    "train": (
                        trained.data.train[0].model_copy(
                            update={"path": str(base / "nowhere" / "*.jsonl")}
                        ),
                    )
                }
            )
        }
    )
    assert (
        evaluate_models(gone, [str(base / "out")])[str(base / "out")]["accuracy"]
        == found[str(base / "out")]["accuracy"]
    ), "a head's labels stand in its folder"


def test_evaluation_builds_no_optimizer(base, monkeypatch):
    from dist_ft.engine import optimizers

    monkeypatch.setattr(
        optimizers, "build_optimizer", lambda *_: pytest.fail("an optimizer was made")
    )
    made = config(base)
    evaluate_models(made, [made.model.path])


def test_prompted_model_trains_and_exports_as_a_plain_model(base):
    from dist_ft.runtime import local

    made = config(
        base,
        log={"every_steps": 100},
        schedule={"epochs": 4, "warmup_steps": 2},
        optimizer={"learning_rate": 1e-2},
        evaluation={"every_steps": 20},
        checkpoint={"best_by": "accuracy", "keep_best": 1, "every_steps": 20},
        run={"name": "trains"},
        prompting={"shots": 1, "shots_by": "all", "calibrate": True},
    )
    before = evaluate_models(made, [made.model.path])[made.model.path]
    local.run(made)
    api.export(made, str(base / "trained"), best=True)
    after = evaluate_models(made, [str(base / "trained")])[str(base / "trained")]
    assert (
        after["head"] == "likelihood"
        and after["accuracy"] > max(0.5, before["accuracy"])
        and after["loss"] < before["loss"]
    )
    AutoModelForCausalLM.from_pretrained(base / "trained")
    assert "dist-ft predict" in api.next_step(str(base / "trained"))
    rows = held_out(made)
    predictions = Predictor(str(base / "trained"), PredictionOptions(batch_size=7)).predict(
        [{"text": row["text"]} for row in rows]
    )
    right = [one["label"] == row["label"] for one, row in zip(predictions, rows, strict=True)]
    assert sum(right) / len(rows) == pytest.approx(after["accuracy"]), (
        "what is predicted is what was scored"
    )


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {"prompting": {"templates": []}},
            "prompting.templates: not set. likelihood needs a prompt",
        ),
        (
            {"prompting": {"templates": ["no place"]}},
            r"prompting\.templates\.0: has no place for the row's text",
        ),
        (
            {"prompting": {"templates": ["{text} {what}"]}},
            r"prompting\.templates\.0: not a template \(KeyError: 'what'\)",
        ),
        (
            {"prompting": {"templates": ["{text} {pair}"]}},
            r"prompting\.templates\.0: has a place for a second text",
        ),
        ({"prompting": {"verbalizers": {"a": " x", "b": " x"}}}, "two labels have the same words"),
        (
            {"prompting": {"method": "generation"}},
            "prompting.method=generation: not used by task.name=sequence_classification",
        ),
        (
            {"task": {"focal_gamma": 1.0}},
            r"task\.focal_gamma: with prompting\.method=likelihood there is no head",
        ),
        (
            {"task": {"labels": ["animal", "drink"]}},
            r"prompting\.verbalizers\.food: not a label of task\.labels",
        ),
    ],
)
def test_contradictions_are_one_line(base, fields, line):
    with pytest.raises(ConfigError, match=line) as caught:
        config(base, **fields)
    assert all("\n" not in problem for problem in caught.value.problems)


def test_check_tokenizes_the_words_of_labels(base):
    assert check_run.check(config(base)) == []
    (line,) = check_run.check(
        config(base, templates=["{text} t"], prompting={"verbalizers": {**WORDS, "food": "ea"}})
    )
    assert line.startswith(
        "prompting.verbalizers='ea': has no token of its own after the template's end ' t'. "
    )


def test_preview_shows_prompts_and_labels(base):
    shown = api.preview(config(base, prompting={"shots": 1, "shots_by": "all"}), 2)
    assert "say " in shown and any(label in shown for label in WORDS)


def test_evaluate_command_names_templates_and_heads(base, monkeypatch, capsys):
    import yaml

    from dist_ft.cli import main

    made = config(base, templates=TEMPLATES)
    (base / "config.yaml").write_text(yaml.safe_dump(to_mapping(made)))
    monkeypatch.setattr("sys.argv", ["dist-ft", "evaluate", str(base / "config.yaml")])
    with pytest.raises(SystemExit):
        main.main()
    output = capsys.readouterr().out
    joined = "".join(output.split())  # a long path takes several lines
    assert "(prompted)" in joined and "accuracyworst" in joined and "bytemplate" in joined
    monkeypatch.setattr("sys.argv", ["dist-ft", "evaluate", str(base / "config.yaml"), "--json"])
    with pytest.raises(SystemExit):
        main.main()
    (found,) = json.loads(capsys.readouterr().out).values()
    assert list(found["by_template"]) == TEMPLATES and found["head"] == "likelihood"


def test_row_with_unknown_label_is_reported(base):
    rng = random.Random(0)
    (base / "odd.jsonl").write_text(
        json.dumps({**tiny_tasks.row("sequence_classification", rng), "label": "metal"}) + "\n"
    )
    made = config(base)
    made = made.model_copy(
        update={
            "evaluation": made.evaluation.model_copy(
                update={
                    "data": (
                        made.evaluation.data[0].model_copy(
                            update={"path": str(base / "odd.jsonl")}
                        ),
                    )
                }
            )
        }
    )
    with pytest.raises(
        Exception,
        match=r"odd\.jsonl row 1: label is 'metal'\. The labels are animal, drink, food, place",
    ):
        evaluate_models(made, [made.model.path])
