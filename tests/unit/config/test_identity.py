"""What a resume may change."""

from __future__ import annotations

import pytest

from dist_ft.config.load import Change, changes, check_resume, identity, load_config, to_mapping
from dist_ft.core.errors import ConfigError

BASE = {
    "run": {"name": "x"},
    "model": {"path": "m"},
    "data": {"train": ["a", "b"]},
    "batch": {"global_batch": 4, "sequence_length": 8},
    "schedule": {"steps": 3},
}


def with_(*overrides):
    return load_config(BASE, overrides)


def test_the_identity_of_a_run():
    """Frozen on purpose: a field that joins or leaves this list changes which old runs can be resumed."""
    assert identity(with_()) == {
        "run.seed": 0,
        "model.path": "m",
        "model.checkpoint": "latest",
        "model.revision": None,
        "model.tokenizer": None,
        "model.chat_template": None,
        **{
            f"data.train.{i}.{name}": value
            for i, path in enumerate("ab")
            for name, value in {
                "path": path,
                "subset": None,
                "split": "train",
                "name": None,
                "weight": None,
                "repeat": None,
                "share": None,
            }.items()
        },
        "data.format": "auto",
        "data.fields.messages": "messages",
        "data.fields.prompt": "prompt",
        "data.fields.response": "response",
        "data.fields.system": None,
        "data.fields.text": "text",
        "data.prompt_template": "{prompt}\n",
        "data.system_prompt": None,
        "data.targets": "response",
        "data.shuffle": True,
        "data.pack": True,
        "data.bucket": None,
        "data.augment.probability": 1.0,
        "data.augment.synonyms": None,
        "data.augment.replace": 0.0,
        "data.augment.swap": 0.0,
        "data.augment.delete": 0.0,
        "data.temperature": None,
        "data.mixing": [],
        "data.bad_rows": "error",
        "data.max_row_mib": 64,
        "data.block_mib": 16,
        "data.shuffle_blocks": 16,
        "data.overlong": "error",
        "task.name": "causal_lm",
        "task.labels": [],
        "task.new_head": False,
        "task.grow_head": False,
        "task.stride": 64,
        "task.mask_probability": 0.15,
        "task.pooling": "mean",
        "task.columns.pair": None,
        **{
            f"task.columns.{name}": name
            for name in (
                "text",
                "label",
                "tokens",
                "tags",
                "question",
                "context",
                "answers",
                "source",
                "target",
            )
        },
        "prompting.method": "none",
        "prompting.templates": [],
        "prompting.verbalizers": {},
        "prompting.shots": 0,
        "prompting.shots_by": "label",
        "prompting.separator": "\n\n",
        "prompting.seed": 0,
        "prompting.normalize": "sum",
        "prompting.calibrate": False,
        "tuning.method": "full",
        "tuning.last_layers": 0,
        "tuning.trainable": [],
        "tuning.frozen": [],
        "tuning.lora.rank": 8,
        "tuning.lora.alpha": 16.0,
        "tuning.lora.targets": ["all-linear"],
        "tuning.lora.rslora": False,
        "tuning.lora.dora": False,
        "tuning.adalora.initial_rank": 12,
        "tuning.adalora.rank": 8,
        "tuning.adalora.alpha": 16.0,
        "tuning.adalora.targets": ["all-linear"],
        "tuning.adalora.begin_step": 0,
        "tuning.adalora.end_step": 0,
        "tuning.adalora.every_steps": 10,
        "tuning.bottleneck.size": 64,
        "tuning.bottleneck.activation": "gelu",
        "tuning.bottleneck.targets": ["auto"],
        "tuning.prompt.tokens": 20,
        "tuning.prompt.init": "vocabulary",
        "tuning.prompt.text": None,
        "tuning.prompt.hidden_size": 0,
        "tuning.prompt.projection": False,
        "tuning.anchor.method": "none",
        "tuning.ema_decay": 0.0,
        "batch.global_batch": 4,
        "batch.micro_batch": 1,
        "batch.sequence_length": 8,
    }


def test_identity_and_operational_changes_are_separated():
    new = with_(
        "cluster.workers=1..2",
        "checkpoint.every_steps=2",
        "batch.micro_batch=2",
        "optimizer.learning_rate=1e-3",
        "evaluation.data=c",
        "zero.deepspeed.steps_per_print=1",
    )
    assert changes(with_(), new) == (
        [Change("batch.micro_batch", 1, 2)],
        [
            Change("optimizer.learning_rate", 2e-5, 1e-3),
            Change("zero.deepspeed", {}, {"steps_per_print": 1}),
            Change("cluster.workers", 0, {"min": 1, "max": 2}),
            Change("checkpoint.every_steps", 0, 2),
            Change(
                "evaluation.data",
                [],
                [
                    {
                        "path": "c",
                        "subset": None,
                        "split": "train",
                        "name": None,
                        "weight": None,
                        "repeat": None,
                        "share": None,
                    }
                ],
            ),
        ],
    )
    assert changes(with_(), with_()) == ([], [])


def test_operational_changes_are_allowed_in_a_resume_and_returned():
    assert check_resume(
        to_mapping(with_()), with_("cluster.workers=2", "zero.stage=1", "schedule.steps=9")
    ) == [
        Change("schedule.steps", 3, 9),
        Change("zero.stage", 3, 1),
        Change("cluster.workers", 0, 2),
    ]


def test_identity_changes_are_refused_all_at_once():
    with pytest.raises(ConfigError) as caught:
        check_resume(
            to_mapping(with_()), with_("run.seed=7", "data.train=[a, c, d]", "cluster.workers=2")
        )
    assert str(caught.value) == (
        "resume of run 'x': 4 problems\n"
        "  - run.seed=7: the stored run 'x' has 0, and this must not change when a run is resumed. "
        "Restore 0, or use another run.name.\n"
        "  - data.train.1.path=c: the stored run 'x' has b, and this must not change when a run is "
        "resumed. Restore b, or use another run.name.\n"
        "  - data.train.2.path=d: the stored run 'x' has null, and this must not change when a run is "
        "resumed. Restore null, or use another run.name.\n"
        "  - data.train.2.split=train: the stored run 'x' has null, and this must not change when a "
        "run is resumed. Restore null, or use another run.name."
    )


def test_an_older_config_takes_defaults_and_its_contradictions_pass():
    old = {key: dict(value) for key, value in reversed(BASE.items())}
    assert check_resume(old, with_()) == []
    old["schedule"]["epochs"] = 5  # a contradiction by today's rules, but the run exists
    assert check_resume(old, with_()) == [Change("schedule.epochs", 5, None)]


def test_a_broken_stored_config_is_an_error():
    with pytest.raises(ConfigError) as caught:
        check_resume({**BASE, "batch": {"global_batch": "x", "sequence_length": 8}}, with_())
    assert str(caught.value) == (
        "stored config of run 'x': 1 problem\n  - batch.global_batch=x: not a whole number. Allowed: "
        "a whole number of at least 1. Correct it. (Use another run.name than 'x' if the run cannot "
        "be repaired.)"
    )
