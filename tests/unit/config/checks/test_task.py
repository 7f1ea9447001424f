"""Fields that a task does not use, or that contradict it, are an error."""

from __future__ import annotations

import pytest

from dist_ft.config.load import load_config
from dist_ft.config.sections.adapters import ADAPTER_METHODS
from dist_ft.core.errors import ConfigError

DOCUMENT = {
    "run": {"name": "x"},
    "model": {"path": "m"},
    "data": {"train": "d"},
    "schedule": {"steps": 1},
    "batch": {"global_batch": 4, "micro_batch": 2, "sequence_length": 32},
}


def problems(**sections) -> list[str]:
    document = {
        key: {**DOCUMENT.get(key, {}), **sections.get(key, {})} for key in {**DOCUMENT, **sections}
    }
    try:
        load_config(document)
    except ConfigError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        (
            {"tuning": {"method": "prefix_tuning"}},
            "tuning.method=prefix_tuning: samples packed into one sequence would share",
        ),
        (
            {
                "tuning": {"method": "prefix_tuning"},
                "data": {"pack": False},
                "model": {"activation_checkpointing": True},
            },
            "tuning.method=prefix_tuning: the prefix is in the key-value cache, which "
            "model.activation_checkpointing and flash attention do not use.",
        ),
        (
            {"tuning": {"method": "p_tuning"}, "task": {"name": "masked_lm"}},
            "tuning.method=p_tuning: peft has no virtual tokens",
        ),
        (
            {"tuning": {"method": "prompt_tuning", "prompt": {"init": "text"}}},
            "tuning.prompt.init=text: init=text and tuning.prompt.text, its initial text, need "
            "each other.",
        ),
        (
            {"tuning": {"method": "p_tuning", "prompt": {"projection": True}}},
            "tuning.prompt.projection: not used by tuning.method=p_tuning.",
        ),
        (
            {"tuning": {"method": "prompt_tuning", "prompt": {"hidden_size": 4}}},
            "tuning.prompt.hidden_size=4: ",
        ),
        (
            {"tuning": {"method": "prompt_tuning", "layer_decay": 0.5}},
            "tuning.method=prompt_tuning: virtual tokens belong to no layer, so "
            "tuning.layer_decay and tuning.unfreeze_steps have no meaning.",
        ),
        (
            {"tuning": {"prompt": {"tokens": 4}}},
            "tuning.prompt: not used by tuning.method=full. Allowed with "
            "tuning.method=prompt_tuning or p_tuning or prefix_tuning.",
        ),
        (
            {"tuning": {"method": "adalora"}, "model": {"dtype": "float32"}},
            "tuning.adalora.end_step=0: ranks are allocated between tuning.adalora.begin_step=0 "
            "and this step.",
        ),
        (
            {
                "tuning": {"method": "adalora", "adalora": {"end_step": 9, "rank": 12}},
                "model": {"dtype": "float32"},
            },
            "tuning.adalora.rank=12: not below tuning.adalora.initial_rank=12, so no rank would "
            "be removed.",
        ),
        (
            {
                "tuning": {"method": "adalora", "adalora": {"end_step": 9}},
                "model": {"dtype": "float32"},
                "cluster": {"workers": 2},
                "zero": {"stage": 2},
            },
            "zero.stage=2: tuning.method=adalora needs whole gradients, which ZeRO-1 to 3 "
            "partition.",
        ),
        (
            {
                "tuning": {"method": "adalora", "adalora": {"end_step": 9}},
                "model": {"dtype": "bfloat16"},
            },
            "model.dtype=bfloat16: tuning.method=adalora needs float32 gradients of the weights "
            "themselves.",
        ),
        (
            {"task": {"labels": ["a", "b"]}},
            "task.labels: not used by task.name=causal_lm. Allowed with sequence_classification, "
            "multi_label, token_classification.",
        ),
        (
            {"task": {"name": "masked_lm", "focal_gamma": 2}},
            "task.focal_gamma: not used by task.name=masked_lm.",
        ),
        (
            {"task": {"name": "multi_label", "class_weights": [1, 2]}},
            "task.class_weights: not used by task.name=multi_label.",
        ),
        (
            {"task": {"name": "sequence_classification", "labels": ["a", "a"]}},
            "task.labels: a is listed twice.",
        ),
        (
            {"task": {"name": "sequence_classification", "labels": ["a"]}},
            "task.labels=[a]: a single label.",
        ),
        (
            {"task": {"name": "seq2seq"}, "data": {"format": "instruction"}},
            "data.format=instruction: task.name=seq2seq reads the columns of task.columns.",
        ),
        (
            {"task": {"name": "regression"}, "tuning": {"label_smoothing": 0.1}},
            "tuning.label_smoothing=0.1: the loss of ",
        ),
        (
            {"checkpoint": {"best_by": "f1"}},
            "checkpoint.best_by=f1: not a metric of evaluations of task.name=causal_lm. Allowed: "
            "loss, perplexity.",
        ),
        (
            {
                "checkpoint": {"best_by": "bleu"},
                "evaluation": {"data": "h", "decoding": {"max_new_tokens": 9}},
            },
            "checkpoint.best_by=bleu: not a metric of evaluations of task.name=causal_lm. "
            "Allowed: loss, perplexity, chrf, exact_match.",
        ),
        (
            {"evaluation": {"text_metrics": "bleu"}},
            "evaluation.text_metrics=('bleu',): no text is generated. Needs "
            "evaluation.decoding.max_new_tokens.",
        ),
        (
            {"evaluation": {"decoding": {"max_new_tokens": 9}}},
            "evaluation.decoding.max_new_tokens=9: there are no prompts. Needs evaluation.data.",
        ),
        (
            {
                "task": {"name": "masked_lm"},
                "evaluation": {"data": "h", "decoding": {"max_new_tokens": 9}},
            },
            "evaluation.decoding.max_new_tokens=9: models of task.name=masked_lm generate no "
            "text. Allowed with causal_lm and seq2seq.",
        ),
        (
            {"evaluation": {"data": "h", "decoding": {"max_new_tokens": 9, "top_p": 0.5}}},
            "evaluation.decoding.top_p=0.5: not used by strategy=greedy. Allowed with sample.",
        ),
        (
            {
                "evaluation": {
                    "data": "h",
                    "decoding": {"max_new_tokens": 9, "strategy": "beam", "num_samples": 5},
                }
            },
            "evaluation.decoding.num_samples=5: strategy=beam has fewer generations per prompt "
            "here. At most 4 are allowed.",
        ),
        (
            {"evaluation": {"data": "h", "decoding": {"max_new_tokens": 9, "choices": ["a", "a"]}}},
            "evaluation.decoding.choices: one is empty ",
        ),
        (
            {"task": {"risk": {"alpha": 1}}},
            "task.risk: not used by task.objective=likelihood.",
        ),
        (
            {"task": {"objective": "minimum_risk"}},
            "task.objective=minimum_risk: a row has one prompt and one generation, so samples "
            "cannot be packed. Set data.pack=false.",
        ),
        (
            {"task": {"name": "masked_lm", "objective": "minimum_risk"}},
            "task.objective=minimum_risk: models of task.name=masked_lm generate no text.",
        ),
        (
            {
                "task": {"name": "seq2seq", "objective": "minimum_risk"},
                "tuning": {"label_smoothing": 0.1},
            },
            "tuning.label_smoothing=0.1: not used by task.objective=minimum_risk.",
        ),
        (
            {"evaluation": {"decoding": {"choices": ["a"]}}},
            "evaluation.decoding.choices: max_new_tokens=0 generates nothing.",
        ),
        (
            {"task": {"name": "embedding"}, "batch": {"micro_batch": 1}},
            "batch.micro_batch=1: task.name=embedding compares each text with the others of its "
            "micro-batch.",
        ),
        (
            {"task": {"name": "question_answering", "stride": 32}},
            "task.stride=32: too long for windows of batch.sequence_length=32.",
        ),
        (
            {"tuning": {"adversarial": {"method": "fgm", "steps": 2}}},
            "tuning.adversarial.steps=2: not used by tuning.adversarial.method=fgm. Allowed with "
            "pgd.",
        ),
        (
            {"tuning": {"adversarial": {"epsilon": 2}}},
            "tuning.adversarial.epsilon=2.0: not used by tuning.adversarial.method=none. Allowed "
            "with fgm or pgd.",
        ),
        (
            {"tuning": {"adversarial": {"method": "pgd", "steps": 2}}},
            "tuning.adversarial.epsilon=1.0: out of reach of 2 steps of step_size=0.4. At most "
            "0.8 is allowed.",
        ),
        (
            {"data": {"augment": {"delete": 0.1}}},
            "data.augment: not used by task.name=causal_lm (its targets are tokens or positions "
            "of the texts themselves).",
        ),
        (
            {"task": {"name": "regression"}, "data": {"augment": {"replace": 0.1}}},
            "data.augment.replace=0.1: data.augment.synonyms is not set.",
        ),
        (
            {"task": {"name": "regression"}, "data": {"augment": {"probability": 0.1}}},
            "data.augment: no change of words is set.",
        ),
        (
            {"tuning": {"anchor": {"method": "l2"}}},
            "tuning.anchor.strength=0: tuning.anchor.method is l2. Allowed: l2 or ewc with a "
            "strength above 0, or neither.",
        ),
        (
            {"tuning": {"anchor": {"method": "ewc", "strength": 1}}},
            "tuning.anchor.data: is not set with tuning.anchor.method=ewc. ewc, and only ewc, "
            "needs it.",
        ),
        (
            {"tuning": {"anchor": {"method": "l2", "strength": 1, "data": "d"}}},
            "tuning.anchor.data: is set with tuning.anchor.method=l2. ewc, and only ewc, needs it.",
        ),
        (
            {"tuning": {"anchor": {"max_samples": 3}}},
            "tuning.anchor.max_samples=3: not used by tuning.anchor.method=none.",
        ),
        (
            {"tuning": {"method": "lora", "anchor": {"method": "l2", "strength": 1}}},
            "tuning.anchor.method=l2: tuning.method=lora only trains added weights, which have no "
            "initial values to return to.",
        ),
        (
            {"evaluation": {"weights": "ema"}},
            "evaluation.weights=ema: the run has no average of the weights.",
        ),
        (
            {"task": {"name": "seq2seq"}, "data": {"overlong": "split"}},
            "data.overlong=split: only plain text can be split (data.format=auto).",
        ),
    ],
)
def test_contradictions(sections, text):
    found = problems(**sections)
    assert len(found) == 1 and found[0].startswith(text)


@pytest.mark.parametrize("method", ADAPTER_METHODS)
def test_an_anchor_needs_weights_with_initial_values(method):
    anchor = {"method": "l2", "strength": 1}
    refusal = f"tuning.anchor.method=l2: tuning.method={method} only trains added weights"
    found = problems(tuning={"method": method, "anchor": anchor})
    assert [line for line in found if line.startswith(refusal)]
    found = problems(tuning={"method": method, "anchor": anchor, "trainable": ["*.bias"]})
    assert not [line for line in found if line.startswith(refusal)]


@pytest.mark.parametrize(
    "sections",
    [
        {
            "task": {
                "name": "sequence_classification",
                "labels": [0, 1],
                "class_weights": [1, 3],
                "focal_gamma": 1,
            }
        },
        {"task": {"name": "masked_lm"}, "data": {"overlong": "split"}},
        {"task": {"name": "embedding", "pooling": "first"}},
    ],
)
def test_similar_configs_are_valid(sections):
    assert problems(**sections) == []


def test_tasks_with_padded_batches_do_not_pack():
    config = load_config({**DOCUMENT, "task": {"name": "question_answering", "stride": 8}})
    assert (
        config.effective_data.pack,
        config.effective_data.bucket,
        config.effective_data.overlong,
    ) == (
        False,
        64,
        "split",
    )
    plain = load_config(DOCUMENT)
    assert (plain.effective_data.pack, plain.effective_data.bucket) == (True, 0)


def test_adversarial_training_and_augmentation_need_the_texts_of_the_data():
    found = problems(task={"objective": "minimum_risk"}, tuning={"adversarial": {"method": "fgm"}})
    assert any(
        line.startswith(
            "tuning.adversarial.method=fgm: conflicts with task.objective=minimum_risk, "
        )
        for line in found
    )
    found = problems(
        task={"name": "sequence_classification"},
        prompting={"method": "prototypes"},
        data={"augment": {"delete": 0.1}},
    )
    assert any(
        line.startswith("data.augment: conflicts with prompting.method=prototypes, ")
        for line in found
    )
