"""Reads YAML that others wrote: bounded in size, depth and aliases, with duplicate keys reported.

Only plain data is constructed (PyYAML's safe loader). The bounds hold while the text is read, so a
document beyond them ends within a second or two:

- bytes, as PyYAML needs about a second for a MiB;
- nested lists and mappings, so that no reader of the value exhausts its stack;
- keys and values, counting each alias as everything it stands for: nested aliases make a text of a
  few lines a value of millions of items;
- no alias to something that contains it.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import yaml

from dist_ft.core.printable import printable_line

MAX_DEPTH = 60
MAX_NUMBER = 100
"""Characters of a number. Longer ones cannot even be printed: Python refuses to."""

# YAML 1.1, which PyYAML reads, takes 1e-5 for a text: its floats need a dot and a signed exponent.
_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class Bounds(NamedTuple):
    """How large a document may be.

    Attributes:
        num_bytes: bytes of the text.
        num_values: keys and values, each alias counted as what it stands for.
    """

    num_bytes: int
    num_values: int


CONFIG = Bounds(2**20, 50_000)
"""Bounds of configs: they have some hundred values, or thousands with a long list of paths."""
STORED = Bounds(4 * 2**20, 200_000)
"""Bounds of a stored config, which has aliases and defaults written out."""
MANIFESTS = Bounds(16 * 2**20, 500_000)
"""Bounds of manifests: a CRD of Ray has tens of thousands of values."""


class ParsedYaml(NamedTuple):
    """YAML values, one for each document of the text, and a line for each duplicate key."""

    values: list[Any]
    problems: list[str]


class YamlProblem(yaml.MarkedYAMLError):
    """Valid YAML that is refused here."""

    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(problem=problem, problem_mark=mark)


class _Loader(yaml.SafeLoader):
    """The safe loader with bounds; also records duplicate keys and reads `1e-5` as a number."""

    def __init__(self, text: str, max_values: int) -> None:
        super().__init__(text)
        self.problems: list[str] = []
        self._max_values = max_values
        self._num_values = 0
        self._depth = 0
        self._open_anchors: set[str] = set()
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node; refuse it if the document grows beyond a bound."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self._open_anchors:
                raise YamlProblem(f"alias *{event.anchor} contains itself", event.start_mark)
            node = super().compose_node(parent, index)  # type: ignore[no-untyped-call]

            # As large as what it stands for, aliases within it included.
            self._count(self._sizes.get(id(node), 1), event.start_mark)
            return node

        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            self._open_anchors.add(anchor)

        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise YamlProblem(f"nested more than {MAX_DEPTH} deep", event.start_mark)
        before = self._num_values
        self._count(1, event.start_mark)
        node = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        self._depth -= 1

        if anchor is not None:
            self._open_anchors.discard(anchor)
            self._sizes[id(node)] = self._num_values - before
        return node

    def _count(self, number: int, mark: Any) -> None:
        self._num_values += number
        if self._num_values > self._max_values:
            raise YamlProblem(
                f"more than {self._max_values:,} values, counting aliases as what they stand for",
                mark,
            )

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping and record duplicate keys."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            # A list as a key is refused below.
            if not isinstance(key, yaml.ScalarNode):
                continue

            name = printable_line(key.value)
            line = key.start_mark.line + 1  # marks count from 0
            if name in lines:
                self.problems.append(
                    f"line {line}: duplicate key '{name}' (first in line {lines[name]}). Each key "
                    "is allowed once. Remove one."
                )
            elif name != "<<":  # merges an anchor; allowed once for each anchor
                lines[name] = line

        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct a value; a text that does not fit its tag is an error of YAML."""
        is_number = isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS
        if is_number and len(node.value) > MAX_NUMBER:
            raise YamlProblem(f"a number of more than {MAX_NUMBER} characters", node.start_mark)

        try:
            return super().construct_object(node, deep)  # type: ignore[no-untyped-call]
        except (yaml.YAMLError, RecursionError, MemoryError):
            raise
        except Exception as error:
            # PyYAML's constructors fail in many ways on a tag such as `!!bool perhaps`.
            tag = node.tag.rpartition(":")[2]
            raise YamlProblem(f"not a valid {tag}", node.start_mark) from error


# The characters are those that such a number can start with: PyYAML looks resolvers up by them.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def parse_yaml(text: str, bounds: Bounds = CONFIG) -> ParsedYaml:
    """Return the values of the documents in `text`; none for an empty text.

    Raises:
        yaml.YAMLError: not YAML, or beyond a bound; see `where` and `reason`.
    """
    if len(text) > bounds.num_bytes:
        raise YamlProblem(f"larger than {bounds.num_bytes / 2**20:g} MiB", None)

    values = []
    # PyYAML refuses characters that are not text when the loader is created.
    loader = _Loader(text, bounds.num_values)
    try:
        while loader.check_data():
            values.append(loader.get_data())
        return ParsedYaml(values, loader.problems)
    except RecursionError:
        # Cannot happen within the bounds, unless the caller's own stack is deep.
        raise YamlProblem("nested too deeply", None) from None
    finally:
        loader.dispose()


class _TaglessDumper(yaml.SafeDumper):
    """Quotes texts with "<", so that it can be escaped."""


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = '"' if "<" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_TaglessDumper.add_representer(str, _represent_text)


def dump_without_tags(value: Any) -> str:
    """Return `value` as YAML without "<", so that no reader of a report takes a text for HTML."""
    text: str = yaml.dump(
        value, Dumper=_TaglessDumper, sort_keys=False, allow_unicode=True, width=110
    )
    # Only quoted texts have it, where YAML reads the escape as the same character.
    return text.rstrip().replace("<", "\\x3C")


def where(error: Exception) -> str:
    """Return 'line N: ' of a YAML error, or nothing."""
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}: " if mark else ""


def reason(error: Exception) -> str:
    """Return the relevant part of a YAML error's text, on one line."""
    # `problem` is the reason alone; the text of a YAML error quotes lines of the file, which may
    # hold a credential.
    words = getattr(error, "problem", None)
    if not words:
        words = (str(error).splitlines() or [type(error).__name__])[0]
    return printable_line(str(words))
