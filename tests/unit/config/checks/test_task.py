"""What a task does not use, or what contradicts it, is said."""

from __future__ import annotations

import pytest

from dist_ft.config.load import load_config
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
            "tuning.method=prefix_tuning: the prefix lies in the cache",
        ),
        (
            {"tuning": {"method": "p_tuning"}, "task": {"name": "masked_lm"}},
            "tuning.method=p_tuning: peft has no virtual tokens",
        ),
        (
            {"tuning": {"method": "prompt_tuning", "prompt": {"init": "text"}}},
            "tuning.prompt.init=text: tuning.prompt.text is what",
        ),
        (
            {"tuning": {"method": "p_tuning", "prompt": {"projection": True}}},
            "tuning.prompt.projection: tuning.method=p_tuning",
        ),
        (
            {"tuning": {"method": "prompt_tuning", "prompt": {"hidden_size": 4}}},
            "tuning.prompt.hidden_size=4: ",
        ),
        (
            {"tuning": {"method": "prompt_tuning", "layer_decay": 0.5}},
            "tuning.method=prompt_tuning: virtual tokens lie in no",
        ),
        (
            {"tuning": {"prompt": {"tokens": 4}}},
            "tuning.prompt: tuning.method=full does not use it; allowed with ",
        ),
        (
            {"tuning": {"method": "adalora"}, "model": {"dtype": "float32"}},
            "tuning.adalora.end_step=0: ranks are dealt between",
        ),
        (
            {
                "tuning": {"method": "adalora", "adalora": {"end_step": 9, "rank": 12}},
                "model": {"dtype": "float32"},
            },
            "tuning.adalora.rank=12: nothing would be taken away",
        ),
        (
            {
                "tuning": {"method": "adalora", "adalora": {"end_step": 9}},
                "model": {"dtype": "float32"},
                "cluster": {"workers": 2},
                "zero": {"stage": 2},
            },
            "zero.stage=2: tuning.method=adalora weighs whole gradients",
        ),
        (
            {
                "tuning": {"method": "adalora", "adalora": {"end_step": 9}},
                "model": {"dtype": "bfloat16"},
            },
            "model.dtype=bfloat16: tuning.method=adalora weighs float32",
        ),
        (
            {"task": {"labels": ["a", "b"]}},
            "task.labels: task.name=causal_lm does not use it; only sequence_classification, ",
        ),
        (
            {"task": {"name": "masked_lm", "focal_gamma": 2}},
            "task.focal_gamma: task.name=masked_lm does not use it; ",
        ),
        (
            {"task": {"name": "multi_label", "class_weights": [1, 2]}},
            "task.class_weights: task.name=multi_label does not use it",
        ),
        (
            {"task": {"name": "sequence_classification", "labels": ["a", "a"]}},
            "task.labels: a stands there twice; ",
        ),
        (
            {"task": {"name": "sequence_classification", "labels": ["a"]}},
            "task.labels=[a]: there is nothing to choose among; ",
        ),
        (
            {"task": {"name": "seq2seq"}, "data": {"format": "instruction"}},
            "data.format=instruction: with task.name=seq2seq ",
        ),
        (
            {"task": {"name": "regression"}, "tuning": {"label_smoothing": 0.1}},
            "tuning.label_smoothing=0.1: the loss of ",
        ),
        (
            {"checkpoint": {"best_by": "f1"}},
            "checkpoint.best_by=f1: evaluations of task.name=causal_lm have no such metric; allowed: loss, perplexity",
        ),
        (
            {
                "checkpoint": {"best_by": "bleu"},
                "evaluation": {"data": "h", "decoding": {"max_new_tokens": 9}},
            },
            "checkpoint.best_by=bleu: evaluations of task.name=causal_lm have no such metric; allowed: loss, perplexity, chrf, exact_match; ",
        ),
        (
            {"evaluation": {"text_metrics": "bleu"}},
            "evaluation.text_metrics=('bleu',): no texts are made; needs evaluation.decoding",
        ),
        (
            {"evaluation": {"decoding": {"max_new_tokens": 9}}},
            "evaluation.decoding.max_new_tokens=9: there are no prompts; needs ",
        ),
        (
            {
                "task": {"name": "masked_lm"},
                "evaluation": {"data": "h", "decoding": {"max_new_tokens": 9}},
            },
            "evaluation.decoding.max_new_tokens=9: models of task.name=masked_lm make no texts; allowed with causal_lm and seq2seq",
        ),
        (
            {"evaluation": {"data": "h", "decoding": {"max_new_tokens": 9, "top_p": 0.5}}},
            "evaluation.decoding.top_p=0.5: strategy=greedy does not use it; only sample does; ",
        ),
        (
            {
                "evaluation": {
                    "data": "h",
                    "decoding": {"max_new_tokens": 9, "strategy": "beam", "num_samples": 5},
                }
            },
            "evaluation.decoding.num_samples=5: strategy=beam makes fewer texts of a prompt here; at most 4 are allowed; ",
        ),
        (
            {"evaluation": {"data": "h", "decoding": {"max_new_tokens": 9, "choices": ["a", "a"]}}},
            "evaluation.decoding.choices: one is empty ",
        ),
        (
            {"task": {"risk": {"alpha": 1}}},
            "task.risk: task.objective=likelihood does not use it; ",
        ),
        (
            {"task": {"objective": "minimum_risk"}},
            "task.objective=minimum_risk: a row holds a prompt and one text; packed samples are not; ",
        ),
        (
            {"task": {"name": "masked_lm", "objective": "minimum_risk"}},
            "task.objective=minimum_risk: models of task.name=masked_lm make no texts; ",
        ),
        (
            {
                "task": {"name": "seq2seq", "objective": "minimum_risk"},
                "tuning": {"label_smoothing": 0.1},
            },
            "tuning.label_smoothing=0.1: task.objective=",
        ),
        (
            {"evaluation": {"decoding": {"choices": ["a"]}}},
            "evaluation.decoding.choices: with max_new_tokens=0 no text is made; ",
        ),
        (
            {"task": {"name": "embedding"}, "batch": {"micro_batch": 1}},
            "batch.micro_batch=1: task.name=embedding tells each ",
        ),
        (
            {"task": {"name": "question_answering", "stride": 32}},
            "task.stride=32: windows of batch.sequence_length=32 can not ",
        ),
        (
            {"tuning": {"adversarial": {"method": "fgm", "steps": 2}}},
            "tuning.adversarial.steps=2: tuning.adversarial.method=fgm does not use it; pgd does; ",
        ),
        (
            {"tuning": {"adversarial": {"epsilon": 2}}},
            "tuning.adversarial.epsilon=2.0: tuning.adversarial.method=none does not use it; fgm or pgd do",
        ),
        (
            {"tuning": {"adversarial": {"method": "pgd", "steps": 2}}},
            "tuning.adversarial.epsilon=1.0: 2 steps of step_size=0.4 do not reach so far; at most 0.8 ",
        ),
        (
            {"data": {"augment": {"delete": 0.1}}},
            "data.augment: task.name=causal_lm does not use it",
        ),
        (
            {"task": {"name": "regression"}, "data": {"augment": {"replace": 0.1}}},
            "data.augment.replace=0.1: data.augment.synonyms is not set; ",
        ),
        (
            {"task": {"name": "regression"}, "data": {"augment": {"probability": 0.1}}},
            "data.augment: it does not say what is done to words; ",
        ),
        (
            {"tuning": {"anchor": {"method": "l2"}}},
            "tuning.anchor.strength=0: tuning.anchor.method is l2; l2 or ewc with a strength",
        ),
        (
            {"tuning": {"anchor": {"method": "ewc", "strength": 1}}},
            "tuning.anchor.data: is not set with tuning.anchor.method=ewc; ",
        ),
        (
            {"tuning": {"anchor": {"method": "l2", "strength": 1, "data": "d"}}},
            "tuning.anchor.data: is set with tuning.anchor.method=l2; ",
        ),
        (
            {"tuning": {"anchor": {"max_samples": 3}}},
            "tuning.anchor.max_samples=3: tuning.anchor.method=none does not use it; ",
        ),
        (
            {"tuning": {"method": "lora", "anchor": {"method": "l2", "strength": 1}}},
            "tuning.anchor.method=l2: with tuning.method=lora only ",
        ),
        ({"evaluation": {"weights": "ema"}}, "evaluation.weights=ema: no average of the weights is kept; "),
        (
            {"task": {"name": "seq2seq"}, "data": {"overlong": "split"}},
            "data.overlong=split: only plain text can go on",
        ),
    ],
)
def test_contradictions(sections, text):
    found = problems(**sections)
    assert len(found) == 1 and found[0].startswith(text)


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
def test_what_is_allowed(sections):
    assert problems(**sections) == []


def test_tasks_with_padded_batches_do_not_pack():
    config = load_config({**DOCUMENT, "task": {"name": "question_answering", "stride": 8}})
    assert (config.effective_data.pack, config.effective_data.bucket, config.effective_data.overlong) == (
        False,
        64,
        "split",
    )
    plain = load_config(DOCUMENT)
    assert (plain.effective_data.pack, plain.effective_data.bucket) == (True, 0)


def test_adversaries_and_augmentation_want_the_texts_of_the_data():
    found = problems(task={"objective": "minimum_risk"}, tuning={"adversarial": {"method": "fgm"}})
    assert any(
        line.startswith(
            "tuning.adversarial.method=fgm: does not go with task.objective=minimum_risk, "
        )
        for line in found
    )
    found = problems(
        task={"name": "sequence_classification"},
        prompting={"method": "prototypes"},
        data={"augment": {"delete": 0.1}},
    )
    assert any(
        line.startswith("data.augment: does not go with prompting.method=prototypes, ")
        for line in found
    )
