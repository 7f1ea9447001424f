"""Renders chat templates in bounded time and memory, through transformers' own code.

transformers compiles each template in a sandbox without limits, and offers no place for another
one. So its function that compiles is replaced here, for the whole process: nothing in it can render
a chat template without limits.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dist_ft.core.errors import MAX_LINE

MAX_TEMPLATE_CHARACTERS = 2**18
"""Templates of models have a few thousand."""
_COMPILE = "_compile_jinja_template"


class TemplateError(Exception):
    """A template that cannot be rendered for some messages; its text is a clause, such as
    "it makes more than 1,000,000 steps. Templates with fewer are allowed"."""


class MarkedText(NamedTuple):
    """A rendered conversation.

    Attributes:
        text: all of it.
        marks: character ranges of the {% generation %} marks of the template.
    """

    text: str
    marks: list[tuple[int, int]]


@functools.lru_cache(maxsize=64)
def _compile_once(chat_template: str) -> Any:
    """Return a compiled template with limits; the `TemplateError` if there is one."""
    from dist_ft.pretrained.template_environment import BoundedEnvironment

    if len(chat_template) > MAX_TEMPLATE_CHARACTERS:
        return TemplateError(
            f"it has {len(chat_template):,} characters. Up to {MAX_TEMPLATE_CHARACTERS:,} are "
            "allowed"
        )

    # An error is cached too: with data.bad_rows=skip each row would compile the template again.
    try:
        return _call(BoundedEnvironment(_source_environment()).from_string, chat_template)
    except TemplateError as error:
        return error


def _compile(chat_template: str) -> Any:
    """Return a compiled template with limits; raises TemplateError."""
    compiled = _compile_once(chat_template)
    if isinstance(compiled, TemplateError):
        raise compiled.with_traceback(None)
    return compiled


@functools.cache
def _source_environment() -> Any:
    """Return the environment in which transformers compiles chat templates."""
    from transformers.utils import chat_template_utils

    return getattr(chat_template_utils, _COMPILE)("").environment


@functools.cache
def _install() -> None:
    """Let transformers compile templates with limits, in this process."""
    from transformers.utils import chat_template_utils

    _source_environment()  # from the function that is about to be replaced
    setattr(chat_template_utils, _COMPILE, _compile)


def compile_template(chat_template: str) -> Any:
    """Return Jinja's template, whose `globals` are its own.

    Raises:
        TemplateError: it cannot be compiled.
    """
    _install()
    return _compile(chat_template)


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """Return the text of a conversation.

    Args:
        tokenizer: of transformers; its special tokens are variables of the template.
        messages: the turns, with `role` and `content`.
        chat_template: default: the tokenizer's.
        add_generation_prompt: end with the start of the next answer.

    Raises:
        TemplateError: the template refuses the messages, or needs too much time or memory.
    """
    _install()
    return str(
        _call(
            tokenizer.apply_chat_template,
            list(messages),
            chat_template=chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    )


def render_with_marks(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], chat_template: str
) -> MarkedText:
    """Return the text of a conversation with the marks of the template; see `render`."""
    from transformers.utils import chat_template_utils

    _install()
    (text,), (marks,) = _call(
        chat_template_utils.render_jinja_template,
        conversations=[list(messages)],
        chat_template=chat_template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return MarkedText(text, marks)


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function that compiles or renders; any error becomes a `TemplateError`."""
    try:
        return function(*args, **kwargs)
    except TemplateError:
        raise
    except MemoryError:
        raise TemplateError("it needs more memory than there is") from None
    except RecursionError:
        raise TemplateError("it nests or calls itself too deeply") from None
    except Exception as error:
        # A template may raise anything: 1 / 0, a wrong type, an error of its own.
        text = " ".join(str(error).split()) or type(error).__name__
        raise TemplateError(text[:MAX_LINE]) from error
