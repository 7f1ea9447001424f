"""Settings of a model's files that do not fit it are errors of one line, not of an index."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_tasks
from unit import small

from dist_ft.config.sections.decoding import DecodingSection
from dist_ft.core.errors import ModelError
from dist_ft.model.generation import GenerationRequest, TextGenerator


def generate(model, *ids: int) -> list[int]:
    generator = TextGenerator(DecodingSection(max_new_tokens=2), tiny_tasks.make_tokenizer())
    ((tokens,),) = generator.generate_all(model, [GenerationRequest(np.array(ids))])
    return tokens


def test_tokens_that_the_model_lacks_are_refused():
    model = small.make_model().eval()
    with pytest.raises(
        ModelError, match=f"gives the token 97, but the model has {small.VOCABULARY}"
    ):
        generate(model, 5, 97)


@pytest.mark.parametrize("pad", [10**6, -1])
def test_padding_that_the_model_lacks_is_not_used(pad):
    model = small.make_model().eval()
    expected = generate(model, 5, 6)
    model.generation_config.pad_token_id = pad
    assert generate(model, 5, 6) == expected


@pytest.mark.parametrize(
    "settings",
    [{"stop_strings": ["x"]}, {"penalty_alpha": 0.5, "top_k": 4}, {"dola_layers": "low"}],
)
def test_settings_that_transformers_refuses_are_one_line(settings):
    model = small.make_model().eval()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    try:
        generate(model, 5, 6)
    except ModelError as error:
        assert "Check its generation_config.json" in str(error) and "\n" not in str(error)
