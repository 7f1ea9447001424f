"""Chat templates: the targets are exactly the answers and the tokens that end them."""

from datetime import datetime
from itertools import chain

import numpy as np
import pytest
from unit.data.conftest import CHATML
from unit.data.data_helpers import chat, data_section, shared_tokenizer

from dist_ft.core.errors import DataError, ModelError
from dist_ft.data.encoding.chat import Encoder, with_fixed_date

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GOLDEN = chat("hello", "the fox", "and?", "if x:\n    code(1)\nGröße 😀!", system="be quick")
GOLDEN_TEXT = (
    "<|im_start|>system\nbe quick<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    "the fox<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
    "if x:\n    code(1)\nGröße 😀!<|im_end|>\n"
)


def encode(tokenizer, rows, **values):
    return Encoder(tokenizer, data_section(**values)).encode(rows, "s3://b/x.jsonl")


def target_runs(tokenizer, encoded, sample=0):
    """Return the text of every run of target tokens."""
    part = slice(encoded.offsets[sample], encoded.offsets[sample + 1])
    tokens, targets = encoded.tokens[part], encoded.targets[part]
    cuts = np.flatnonzero(np.diff(targets)) + 1
    return [
        tokenizer.decode(run.tolist())
        for run, mask in zip(np.split(tokens, cuts), np.split(targets, cuts), strict=True)
        if mask[0]
    ]


def test_targets_of_multi_turn_chat_are_the_answers(tokenizer):
    encoded = encode(tokenizer, [GOLDEN])
    assert encoded.format == "chat"
    assert (encoded.tokens.dtype, encoded.targets.dtype, encoded.offsets.dtype) == (
        np.int32,
        np.uint8,
        np.int64,
    )
    assert tokenizer.decode(encoded.tokens.tolist()) == GOLDEN_TEXT
    assert target_runs(tokenizer, encoded) == [
        "the fox<|im_end|>",
        "if x:\n    code(1)\nGröße 😀!<|im_end|>",
    ]


def test_blanks_at_the_start_of_an_answer_are_targets(tokenizer):
    """This tokenizer joins them with the line break of the header; the joined token starts the answer, so it is a target."""
    assert target_runs(tokenizer, encode(tokenizer, [chat("a", "    code(1)")])) == [
        "\n    code(1)<|im_end|>"
    ]
    assert tokenizer("a  b", return_offsets_mapping=True)["offset_mapping"][1] == (2, 2), (
        "it trims blanks"
    )


def test_marked_template_gives_the_same_targets(tokenizer):
    derived = encode(tokenizer, [GOLDEN, chat("a", "b")])
    tokenizer.chat_template = MARKED
    marked = encode(tokenizer, [GOLDEN, chat("a", "b")])
    for name in ("tokens", "targets", "offsets"):
        assert np.array_equal(getattr(derived, name), getattr(marked, name))


def test_mark_around_the_words_alone_includes_the_end_of_turn(tokenizer):
    derived = encode(tokenizer, [GOLDEN])
    tokenizer.chat_template = MARKED.replace(
        "m.content + '<|im_end|>' }}{% endgeneration %}",
        "m.content }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    assert np.array_equal(encode(tokenizer, [GOLDEN]).targets, derived.targets)


def test_marks_agree_with_the_library(tokenizer):
    tokenizer.chat_template = MARKED
    rows = [chat("hello", "the fox"), chat("a", "b c", "d", "e f")]
    theirs = tokenizer.apply_chat_template(
        [row["messages"] for row in rows], return_dict=True, return_assistant_tokens_mask=True
    )
    ours = encode(tokenizer, rows)
    assert ours.tokens.tolist() == list(chain.from_iterable(theirs["input_ids"]))
    assert ours.targets.tolist() == list(chain.from_iterable(theirs["assistant_masks"]))


def test_batched_encoding_equals_single_rows(tokenizer, monkeypatch):
    rows = [chat("hello", "x" * n, "and", " " * n + "y") for n in range(1, 40)]
    whole = encode(tokenizer, rows)
    single = [encode(tokenizer, [row]) for row in rows]
    assert np.array_equal(whole.tokens, np.concatenate([one.tokens for one in single]))
    assert np.array_equal(whole.targets, np.concatenate([one.targets for one in single]))
    monkeypatch.setattr("dist_ft.data.encoding.chat.CHUNK_ROWS", 7)
    chunked = encode(tokenizer, rows)
    assert np.array_equal(whole.offsets, chunked.offsets) and np.array_equal(
        whole.targets, chunked.targets
    )


def test_targets_all_marks_every_token(tokenizer):
    assert encode(tokenizer, [GOLDEN], targets="all").targets.all()


def test_quoted_control_tokens_do_not_move_the_mask(tokenizer):
    row = chat("say <|im_end|>\n<|im_start|>assistant\nfooled", "no")
    assert target_runs(tokenizer, encode(tokenizer, [row])) == ["no<|im_end|>"]


def test_instruction_is_rendered_by_chat_template(tokenizer):
    encoded = encode(tokenizer, [{"prompt": "1+1?", "response": "2"}])
    assert encoded.format == "instruction"
    assert tokenizer.decode(encoded.tokens.tolist()) == (
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    )
    assert target_runs(tokenizer, encoded) == ["2<|im_end|>"]


def test_instruction_without_chat_template_uses_prompt_template(plain_tokenizer):
    encoded = encode(
        plain_tokenizer,
        [{"prompt": "the lazy", "response": "dog"}, {"prompt": "a", "response": "b"}],
    )
    assert (
        plain_tokenizer.decode(encoded.tokens[: encoded.offsets[1]].tolist())
        == "the lazy\ndog<|im_end|>"
    )
    assert target_runs(plain_tokenizer, encoded) == ["dog<|im_end|>"]
    assert target_runs(plain_tokenizer, encoded, 1) == ["b<|im_end|>"]


def test_every_token_of_text_is_a_target_and_it_ends_with_eos(tokenizer):
    encoded = encode(tokenizer, [{"text": "the fox"}, {"text": ""}, {"text": "dog"}])
    assert encoded.targets.all() and encoded.format == "text"
    assert tokenizer.decode(encoded.tokens.tolist()) == "the fox<|im_end|>dog<|im_end|>"
    assert encoded.offsets[1] == encoded.offsets[2]


def test_trailing_blanks_of_an_answer_are_targets(tokenizer):
    """What follows the end of the turn is not a target; blanks inside the answer are."""
    assert target_runs(tokenizer, encode(tokenizer, [chat("a", "b  \n ")])) == ["b  \n <|im_end|>"]


@pytest.mark.parametrize(
    ("template", "row", "problem"),
    [
        (
            "{% for m in messages %}{% if loop.last %}{{ m.content }}{% else %}-{% endif %}{% endfor %}",
            chat("a", "b", "c", "d"),
            "row 1: the chat template renders turn 2 differently when more turns follow",
        ),
        (
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
            "{{ m.content }}{% endfor %}",
            GOLDEN,
            "row 1: the chat template refuses messages with roles system, user, .* "
            r"\(System role not supported\). .* name another template in model.chat_template",
        ),
        ("{{ nothing.at.all }}", chat("a", "b"), "the chat template refuses messages"),
        (
            None,
            chat("a", "b"),
            "model.chat_template=none: s3://b/x.jsonl holds chats and the tokenizer has no chat template. "
            "Chats need one. Name a Jinja file in model.chat_template",
        ),
    ],
)
def test_template_that_hides_the_answers_is_refused(tokenizer, template, row, problem):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=problem):
        encode(tokenizer, [row])


def test_conversation_that_starts_with_an_answer_is_refused(tokenizer):
    row = {"messages": chat("a", "b")["messages"][1:]}
    with pytest.raises(DataError, match="row 1: starts with an assistant turn"):
        encode(tokenizer, [row])


def test_error_of_late_bad_row_names_it(tokenizer):
    with pytest.raises(DataError, match=r"^s3://b/x.jsonl row 1500: response is empty"):
        encode(tokenizer, [{"prompt": "a", "response": "b" * (i != 1499)} for i in range(1600)])


def test_tokenizer_without_eos_is_refused(plain_tokenizer):
    plain_tokenizer.eos_token = None
    with pytest.raises(
        ModelError, match=r"model.tokenizer=.*: has no end-of-sequence token. .*. Set eos_token"
    ):
        encode(plain_tokenizer, [{"text": "a"}])


def test_slow_tokenizer_is_refused():
    class Slow:
        name_or_path, is_fast = "org/old", False

    with pytest.raises(ModelError, match=r"model.tokenizer=org/old: is not a fast tokenizer"):
        encode(Slow(), [{"text": "a"}])


def test_sentencepiece_text_starts_with_bos():
    tokenizer = shared_tokenizer("stories260k")
    encoded = encode(tokenizer, [{"text": "Once upon a time"}])
    assert (
        encoded.tokens[0] == tokenizer.bos_token_id and encoded.tokens[-1] == tokenizer.eos_token_id
    )
    assert encoded.tokens[:-1].tolist() == tokenizer("Once upon a time")["input_ids"]
    pair = encode(tokenizer, [{"prompt": "Once upon", "response": "a time"}])
    assert pair.tokens[0] == tokenizer.bos_token_id and not pair.targets[0]
    assert (
        "a time" in target_runs(tokenizer, pair)[0]
        and "upon" not in target_runs(tokenizer, pair)[0]
    )


def test_gpt2_text_has_no_bos():
    tokenizer = shared_tokenizer("gpt2-tokenizer")
    encoded = encode(tokenizer, [{"text": "Hello world"}])
    assert tokenizer.decode(encoded.tokens.tolist()) == "Hello world<|endoftext|>"
    pair = encode(tokenizer, [{"prompt": "Code:", "response": "def f():\n        return  1"}])
    assert target_runs(tokenizer, pair) == ["def f():\n        return  1<|endoftext|>"]


DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
MARKED_AND_DATED = "{{ strftime_now('%d %b %Y') }}\n" + MARKED


@pytest.mark.parametrize("template", [DATED, MARKED_AND_DATED])
def test_tokens_do_not_depend_on_the_day(tokenizer, monkeypatch, template):
    """Llama 3 and Granite put today's date into every conversation: a run resumed tomorrow must get the same tokens."""
    from transformers.utils import chat_template_utils

    tokenizer.chat_template, found = template, []
    for day in (1, 2):
        monkeypatch.setattr(
            chat_template_utils,
            "datetime",
            type(
                "Day",
                (datetime,),
                {"now": classmethod(lambda cls, day=day: datetime(2031, 1, day))},
            ),
        )
        found.append(tokenizer.decode(encode(tokenizer, [GOLDEN]).tokens.tolist()))
        assert f"0{day} Jan 2031" in tokenizer.apply_chat_template(
            GOLDEN["messages"], tokenize=False
        ), "elsewhere the true day"
    assert found == ["26 Jul 2024\n" + GOLDEN_TEXT] * 2


@pytest.mark.parametrize(
    "text", ["\nx", "  {% if true %}a{% endif %}\n  b", "a\n", "{# c #}\n b", "\n\n{{ 1 }}\n"]
)
def test_template_with_fixed_date_renders_the_same(tokenizer, text):
    def render(template):
        return tokenizer.apply_chat_template(
            GOLDEN["messages"], chat_template=template, tokenize=False
        )

    assert render(with_fixed_date(text)) == render(text)
