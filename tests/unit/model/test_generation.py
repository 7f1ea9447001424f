"""Batched generation equals plain transformers row by row; draws ignore the batch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import tiny_tasks
import torch
from unit.small import FAMILIES, VOCABULARY, batch, make_model, make_module

from dist_ft.config.sections.decoding import DecodingSection
from dist_ft.core.errors import ConfigError
from dist_ft.model.causal_lm import batch_to_inputs
from dist_ft.model.generation import GenerationRequest, Gumbel, TextGenerator

STRATEGIES = {
    "greedy": {},
    "penalized": {"repetition_penalty": 1.7},
    "beam": {"strategy": "beam", "num_beams": 3, "length_penalty": 0.3},
    "beam_early": {
        "strategy": "beam",
        "num_beams": 4,
        "length_penalty": 1.5,
        "early_stopping": True,
        "num_samples": 2,
    },
}
LENGTH = 12


class Words:
    """A tokenizer of words w3 .. w96, as far as texts need one."""

    eos_token_id, pad_token_id = 2, 0

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [int(word[1:]) for word in text.split()]}

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(f"w{token}" for token in ids if token > 2)


def rows(seed: int = 0) -> list[GenerationRequest]:
    rng = np.random.default_rng(seed)
    return [
        GenerationRequest(rng.integers(3, VOCABULARY, size), number)
        for number, size in enumerate((5, 1, 9, 9, 3, 14, 2))
    ]


def decoder(batch_rows: int = 3, **fields) -> TextGenerator:
    return TextGenerator(
        DecodingSection(**{"max_new_tokens": LENGTH, "batch_size": batch_rows, **fields}), Words()
    )


def alone(model, row: GenerationRequest, **fields) -> list[list[int]]:
    """Return what plain transformers generates for one row."""
    beam = fields.get("strategy") == "beam"
    given = {
        name: value for name, value in fields.items() if name not in ("strategy", "num_samples")
    }
    generated = model.generate(
        torch.tensor(row.ids)[None],
        max_new_tokens=LENGTH,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=0,
        num_return_sequences=fields.get("num_samples", 1),
        **(given if beam else {**given, "num_beams": 1}),
    )
    found = []
    for text in generated[:, 1 if model.config.is_encoder_decoder else len(row.ids) :].tolist():
        found.append(text[: text.index(2)] if 2 in text else text)
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_gives_what_each_row_gives_alone(family, strategy):
    plain, module = make_model(family).eval(), make_module(family).train()
    module(
        **batch_to_inputs(batch((9, 13, 5), (11, 6)), "cpu")
    ).backward()  # packed samples were trained on before
    found = decoder(**STRATEGIES[strategy]).generate_all(module.eval().model, rows())
    assert found == [alone(plain, row, **STRATEGIES[strategy]) for row in rows()]
    assert len({tuple(text) for each in found for text in each}) > 3, (
        "a model that says the same of all tells nothing"
    )


def bart() -> tuple[torch.nn.Module, object]:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(3)
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
            init_std=0.4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
    ).eval()
    return model


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_encoder_decoder_batch_gives_what_each_row_gives_alone(strategy):
    found = decoder(**STRATEGIES[strategy]).generate_all(bart(), rows())
    assert found == [alone(bart(), row, **STRATEGIES[strategy]) for row in rows()]
    assert len({tuple(text) for each in found for text in each}) > 3


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(
    "strategy", [{}, {"strategy": "beam", "num_beams": 2}, {"strategy": "sample"}]
)
def test_generation_is_exactly_one_of_the_choices(strategy, both):
    choices = ("w5 w6", "w5 w6 w7", "w8", "w9 w10 w11 w12", "w90")
    model = bart() if both else make_model().eval()
    found = decoder(choices=choices, **strategy).generate_all(model, rows() + rows(1))
    texts = [Words().decode(each[0]) for each in found]
    assert set(texts) <= set(choices)
    assert len(set(texts)) > 1
    again = [
        decoder(1, choices=choices, **strategy).generate_all(model, [row])[0]
        for row in rows() + rows(1)
    ]
    assert again == found
    if not strategy:
        # by hand: the likeliest next token among those that go on with a choice
        row, tokens = rows()[0], [[*Words()(choice)["input_ids"], 2] for choice in choices]
        generated: list[int] = []
        while 2 not in generated and not both:
            allowed = {
                text[len(generated)] for text in tokens if text[: len(generated)] == generated
            }
            logits = model(torch.tensor([[*row.ids, *generated]])).logits[0, -1]
            generated.append(max(allowed, key=lambda token: logits[token].item()))
        assert both or found[0] == [generated[:-1]]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.7, "top_k": 20},
        {"top_p": 0.8},
        {"min_p": 0.05, "repetition_penalty": 1.3},
    ],
)
def test_draws_do_not_depend_on_the_batch(fields):
    model = make_model().eval()
    sampling = {"strategy": "sample", "num_samples": 2, **fields}
    found = decoder(7, **sampling).generate_all(model, rows())
    assert found == [decoder(1, **sampling).generate_all(model, [row])[0] for row in rows()]
    assert found[::-1] == decoder(2, **sampling).generate_all(model, rows()[::-1])
    assert found != decoder(7, seed=1, **sampling).generate_all(model, rows())
    assert all(first != second for first, second in found)
    single = decoder(7, strategy="sample", **fields).generate_all(model, rows())
    assert [each[:1] for each in found] == single, "the first of two is the one of one"


def test_gumbel_noise_draws_by_probability():
    shares = np.array([0.5, 0.3, 0.15, 0.05])
    scores = torch.from_numpy(np.log(shares)).float().repeat(20000, 1)
    drawn = Gumbel(range(20000))(torch.zeros(20000, 1), scores).argmax(1).tolist()
    counts = np.array([Counter(drawn)[token] for token in range(4)])
    assert (
        (counts - 20000 * shares) ** 2 / (20000 * shares)
    ).sum() < 16.3  # chi-square, 3 degrees, p = 0.001


def test_truncated_tokens_are_never_drawn():
    model = make_model().eval()
    greedy = decoder().generate_all(model, rows())
    assert decoder(strategy="sample", top_k=1).generate_all(model, rows()) == greedy
    assert decoder(strategy="sample", top_p=1e-6).generate_all(model, rows()) == greedy
    assert decoder(strategy="sample", min_p=0.9999).generate_all(model, rows()) == greedy


def test_the_models_own_strategy_is_ignored():
    model = make_model().eval()
    greedy = decoder().generate_all(model, rows())
    for name, value in {
        "num_beams": 4,
        "do_sample": True,
        "no_repeat_ngram_size": 1,
        "min_length": 99,
        "top_k": 3,
        "repetition_penalty": 9.0,
        "temperature": 0.1,
    }.items():
        setattr(model.generation_config, name, value)
    assert decoder().generate_all(model, rows()) == greedy


def test_further_stop_token_ends_a_generation():
    model = make_model().eval()
    (text,), *_ = decoder().generate_all(model, rows())
    assert len(text) > 2
    cut = TextGenerator(DecodingSection(max_new_tokens=LENGTH), Words(), {text[2]}).generate_all(
        model, rows()[:1]
    )
    assert cut == [[text[: text.index(text[2])]]]


def test_prompts_that_leave_no_room_are_refused():
    long = [GenerationRequest(np.full(120, 5))]
    with pytest.raises(
        ConfigError,
        match=r"max_new_tokens=12: the model has 128 positions and the longest prompt 120 tokens. "
        r"At most 8 are allowed",
    ):
        decoder().generate_all(make_model("gpt2").eval(), long)


def test_encoder_decoder_choices_have_special_tokens(tmp_path):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    folder = tiny_tasks.make_encoder_decoder(tmp_path)
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForSeq2SeqLM.from_pretrained(folder).eval(),
    )
    section = DecodingSection(max_new_tokens=1, choices=("the quick fox", "bread"))
    generator = TextGenerator(section, tokenizer)
    texts = {
        generator.decode_text(each[0])
        for each in generator.generate_all(
            model, [GenerationRequest(np.array([2, word, 3]), 0) for word in range(5, 40)]
        )
    }
    assert texts <= {"the quick fox", "bread"} and texts
