"""The section `data`: a broken prompt is a problem of the config, not of every row."""

from __future__ import annotations

import pytest

from dist_ft.config.load import load_config
from dist_ft.core.errors import ConfigError

BASE = {
    "run": {"name": "x"},
    "model": {"path": "m", "dtype": "float32"},
    "data": {"train": "a.jsonl", "bad_rows": "skip"},
    "batch": {"global_batch": 4, "sequence_length": 8},
    "schedule": {"steps": 10},
}


@pytest.mark.parametrize(
    "template",
    [
        "{prompt",
        "}",
        "{text}",
        "{}",
        "{0}",
        "{prompt.__class__}",
        "{prompt[0]}",
        "{prompt!r}",
        "{prompt:>9999999999}",
        "{prompt}" * 101,
    ],
)
def test_a_broken_prompt_is_one_problem(template):
    """With data.bad_rows=skip, version 0.1.0 skipped each row because of it."""
    document = {**BASE, "data": {**BASE["data"], "prompt_template": template}}
    with pytest.raises(ConfigError) as caught:
        load_config(document)
    (problem,) = caught.value.problems
    assert problem.startswith("data.prompt_template=") and len(problem) < 300


@pytest.mark.parametrize("template", ["", "{prompt}\n", "{system}\nQ: {prompt} {{x}}\nA: "])
def test_prompts_with_texts_alone_are_allowed(template):
    document = {**BASE, "data": {**BASE["data"], "prompt_template": template}}
    assert load_config(document).data.prompt_template == template
