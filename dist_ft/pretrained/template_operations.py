"""Checks of the operations by which a template can create a large value from small ones.

Each check charges what the operation is about to create, and refuses numbers that ask for more than
any text of a chat needs. All other operations create no more than they get.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dist_ft.pretrained.template_budget import (
    CONTAINERS,
    STEP,
    RenderBudget,
    TemplateLimitError,
)

MAX_COUNT = 100_000
"""Largest width, number of lines or of repetitions."""
MAX_INTEGER_BITS = 2**14
MAX_PADDING_CHARACTERS = 1000
"""Longest text that a filter may write once for each line or word of another."""
MAX_SCANNED_CHARACTERS = 200_000
"""Longest text for filters whose time grows faster than the text."""
ENCODINGS = ("utf-8", "utf8", "ascii", "latin-1", "latin1", "utf-16", "utf-32")
PADDING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes"})
MAX_PRETTY_BYTES = 2**20
"""Largest value for `pprint`, which is slow."""
_WIDE_PERCENT = re.compile(r"%[^%a-zA-Z]*(?:\d{5,}|\*)")
_FIELD = re.compile(r"\{([^{}]+)\}")
_NESTED_FIELD = re.compile(r"\{[^{}]+\{")
_WIDTH = re.compile(r"\d{5,}")

PLAIN_METHODS = frozenset(
    (
        *("strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "startswith", "endswith"),
        *("split", "rsplit", "splitlines", "partition", "rpartition", "upper", "lower", "title"),
        *("capitalize", "find", "rfind", "index", "count", "isdigit", "isalpha", "isspace"),
        *("isupper", "islower"),
    )
)
"""Methods of texts that create no more text than they get."""
ITERABLE_FILTERS = frozenset({"join", "list", "sum", "sort", "min", "max", "unique", "groupby"})
"""Filters that read all of an iterator, which becomes a list before, item by item."""
_UNCOUNTED_FILTERS = frozenset({"d", "default", "equalto", "attr"})
"""Filters whose numbers are values."""


def to_list(budget: RenderBudget, values: Iterator[Any]) -> list[Any]:
    """Return the values of an iterator, each of which is a step."""
    listed = []
    num_bytes = 0
    for value in values:
        budget.spend(0)
        num_bytes += 8 + budget.weigh(value)
        if num_bytes > budget.left:
            budget.spend(num_bytes)  # raises: the list may hold one large value many times
        listed.append(value)
    return listed


def check_operator(budget: RenderBudget, operator: str, left: Any, right: Any) -> None:
    """Check `left operator right`, an operation that may create a large value."""
    if operator == "+":
        if isinstance(left, str | bytes | list | tuple):
            budget.spend(_size(budget, left) + _size(budget, right))
    elif operator == "*":
        _check_product(budget, left, right)
    elif operator == "**":
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
    elif isinstance(left, str | bytes):
        template = left if isinstance(left, str) else left.decode("latin-1")
        values = right if isinstance(right, tuple) else (right,)
        check_format(budget, template, values)


def _check_product(budget: RenderBudget, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
        return

    sequence, count = (right, left) if isinstance(left, int) else (left, right)
    if isinstance(sequence, str | bytes | list | tuple) and isinstance(count, int):
        budget.spend(max(0, count) * _size(budget, sequence))


def _check_bits(num_bits: int) -> None:
    if num_bits > MAX_INTEGER_BITS:
        raise TemplateLimitError(
            f"it computes an integer of more than {MAX_INTEGER_BITS} bits. Smaller ones are allowed"
        )


def _size(budget: RenderBudget, value: Any) -> int:
    """Return the bytes of a text, or of a container and all its parts."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, CONTAINERS):
        return budget.weigh(value)
    return 0


def check_format(budget: RenderBudget, template: str, values: tuple[Any, ...]) -> None:
    """Check that a format string has no width that creates a large text."""
    is_wide = _WIDE_PERCENT.search(template) or _NESTED_FIELD.search(template)
    for field in _FIELD.findall(template):
        is_wide = is_wide or _WIDTH.search(field.partition(":")[2])
    if is_wide:
        raise TemplateLimitError(
            "it formats with a width of 10000 or more, or one that is computed. Smaller widths are "
            "allowed"
        )

    # A field may be written several times.
    num_fields = 1 + template.count("{") + template.count("%")
    if num_fields > MAX_COUNT:
        raise TemplateLimitError(f"it formats a text with more than {MAX_COUNT:,} fields")
    largest = 0
    for value in values:
        if isinstance(value, (str, bytes, *CONTAINERS)):
            largest = max(largest, budget.weigh(value))
    budget.spend(len(template) + num_fields * largest)


def check_method(
    budget: RenderBudget,
    owner: Any,
    name: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[Any, ...]:
    """Check the call of a method of a text or number; return its arguments, iterators as lists."""
    if name in PADDING_METHODS:
        for value in (*args, *kwargs.values()):
            if isinstance(value, int):
                _check_count(f".{name}", value)

    if not isinstance(owner, str | bytes):
        return args

    if name == "join" and args:
        values = args[0]
        if isinstance(values, Iterator):
            values = to_list(budget, values)
        _check_join(budget, owner, values)
        return (values, *args[1:])

    if name == "replace" and len(args) > 1:
        _check_replace(budget, owner, args[0], args[1])
    elif name == "expandtabs":
        tabs = "\t" if isinstance(owner, str) else b"\t"
        width = next((value for value in (*args, *kwargs.values())), 8)
        budget.spend(owner.count(tabs) * int(width))  # type: ignore[arg-type]
    elif name == "translate" and args and isinstance(args[0], dict):
        longest = max((_size(budget, value) for value in args[0].values()), default=0)
        budget.spend(len(owner) * (1 + longest))
    elif name in ("encode", "decode"):
        for value in (*args, *kwargs.values()):
            _check_encoding(value)
    elif name in ("striptags", "unescape"):
        _check_scanned(f".{name}", owner)
    return args


def _check_encoding(name: Any) -> None:
    allowed = (*ENCODINGS, "strict", "ignore", "replace", "surrogatepass")
    if isinstance(name, str) and name.lower() not in allowed:
        raise TemplateLimitError(
            f"it uses the encoding {name[:40]!r}. Allowed: utf-8, ascii, latin-1"
        )


def _check_join(budget: RenderBudget, separator: Any, values: Any) -> None:
    if isinstance(values, str):
        budget.spend(len(values) * (1 + len(separator)))
    elif hasattr(values, "__len__"):
        budget.spend(budget.weigh(values) + len(values) * len(separator))


def _check_replace(budget: RenderBudget, text: Any, old: Any, new: Any) -> None:
    same_type = isinstance(old, type(text)) or (isinstance(text, str) and isinstance(old, str))
    if same_type and isinstance(new, str | bytes):
        budget.spend(len(text) + text.count(old) * len(new))


def check_function(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check the call of a function that creates text by itself."""
    if getattr(function, "__name__", "") == "generate_lorem_ipsum":
        for value in (*args, *kwargs.values()):
            if isinstance(value, int) and value > MAX_PADDING_CHARACTERS:
                raise TemplateLimitError("it creates a large text by lipsum()")


def check_filter(
    budget: RenderBudget,
    name: str,
    args: tuple[Any, ...],
    first: int,
    kwargs: Mapping[str, Any],
) -> tuple[Any, ...]:
    """Check the call of a filter; return its arguments, iterators as lists where it reads all.

    Args:
        budget: of the rendering.
        name: name of the filter.
        args: positional arguments.
        first: position of the value that is filtered.
        kwargs: keyword arguments.
    """
    budget.spend(0)
    if len(args) <= first:
        return args  # the filter reports it

    value = args[first]
    if name in ITERABLE_FILTERS and isinstance(value, Iterator):
        value = to_list(budget, value)
        args = (*args[:first], value, *args[first + 1 :])
    others = args[first + 1 :]
    check_counts(name, others, kwargs)
    check = FILTER_CHECKS.get(name)
    if check is not None:
        check(budget, value, others, kwargs)
    return args


def check_counts(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check the numbers that a filter gets in addition to its value."""
    if name in _UNCOUNTED_FILTERS:
        return
    for value in (*args, *kwargs.values()):
        if isinstance(value, int):
            _check_count(f"|{name}", value)


def _check_count(operation: str, count: int) -> None:
    if not -MAX_COUNT <= count <= MAX_COUNT:
        raise TemplateLimitError(
            f"it calls {operation} with the number {str(count)[:30]}. Up to {MAX_COUNT:,} are "
            "allowed"
        )


def _check_scanned(operation: str, value: Any) -> None:
    if isinstance(value, str) and len(value) > MAX_SCANNED_CHARACTERS:
        raise TemplateLimitError(
            f"it calls {operation} on {len(value):,} characters. Up to {MAX_SCANNED_CHARACTERS:,} "
            "are allowed"
        )


def _check_paddings(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse long texts that are written once for each line, word or part."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, str) and len(value) > MAX_PADDING_CHARACTERS:
            raise TemplateLimitError(
                f"it calls |{name} with a text of {len(value):,} characters. Up to "
                f"{MAX_PADDING_CHARACTERS} are allowed"
            )


FilterCheck = Callable[[RenderBudget, Any, tuple[Any, ...], Mapping[str, Any]], None]


def _join(
    budget: RenderBudget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    separator = args[0] if args else kwargs.get("d", "")
    if not isinstance(separator, str):
        separator = ""
    _check_join(budget, separator, value)


def _replace(
    budget: RenderBudget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    arguments = [*args, *kwargs.values()]
    if len(arguments) > 1:
        _check_replace(budget, str(value), str(arguments[0]), str(arguments[1]))


def _indent(
    budget: RenderBudget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    _check_paddings("indent", args, kwargs)
    width = args[0] if args else kwargs.get("width", 4)
    if isinstance(width, str):
        width = len(width)
    if isinstance(value, str) and isinstance(width, int):
        budget.spend(len(value) + (1 + value.count("\n")) * max(0, width))


def _to_json(
    budget: RenderBudget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    _check_paddings("tojson", args, kwargs)
    indent = 0
    for option in (*args, *kwargs.values()):
        if isinstance(option, str):
            indent = max(indent, len(option))
        elif isinstance(option, int) and not isinstance(option, bool):
            indent = max(indent, option)
    budget.spend(budget.weigh(value) * (1 + indent // 8))


def _format(
    budget: RenderBudget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    check_format(budget, str(value), (*args, *kwargs.values()))


def _as_text(
    budget: RenderBudget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    budget.spend_text(value)


def _pretty(
    budget: RenderBudget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    if budget.weigh(value) > MAX_PRETTY_BYTES:
        raise TemplateLimitError("it calls |pprint on a large value. Use tojson")


def _padded(
    budget: RenderBudget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    _check_paddings("batch", args, kwargs)
    count = next((number for number in args if isinstance(number, int)), 0)
    budget.spend(STEP * abs(count))


def _sum(
    budget: RenderBudget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    for start in (*args, *kwargs.values()):
        if isinstance(start, CONTAINERS) and hasattr(value, "__len__"):
            budget.spend(len(value) * budget.weigh(value))


def _scanned(
    budget: RenderBudget, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    _check_paddings("urlize, |wordwrap or |striptags", args, kwargs)
    budget.spend_text(value)
    _check_scanned("|urlize, |wordwrap or |striptags", value)


PLAIN_FILTERS = frozenset(
    ("trim", "upper", "lower", "title", "capitalize", "string", "length", "count", "first", "last")
)
"""Filters that create no more text than they get."""
FILTER_CHECKS: dict[str, FilterCheck] = {
    "join": _join,
    "replace": _replace,
    "indent": _indent,
    "tojson": _to_json,
    "format": _format,
    "sum": _sum,
    **dict.fromkeys(("batch", "slice"), _padded),
    **dict.fromkeys(("urlize", "wordwrap", "striptags"), _scanned),
    "pprint": _pretty,
    **dict.fromkeys(("string", "escape", "e", "forceescape", "upper", "lower"), _as_text),
    **dict.fromkeys(("title", "trim", "capitalize", "center", "truncate", "list"), _as_text),
    **dict.fromkeys(("urlencode", "xmlattr", "wordcount"), _as_text),
}
"""What to check before each filter that may create a large text."""
