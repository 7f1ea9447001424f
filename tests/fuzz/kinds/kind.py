"""What a kind of inputs is."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from fuzz.inputs import Input
from fuzz.materials import Materials


@dataclass(frozen=True)
class Kind:
    """A kind of inputs.

    Attributes:
        name: as on the command line.
        generate: draws the input of a number; the same one for the same random generator.
        materials: what cases may need.
        must_succeed: an exit code other than 0 is a failure.
        may_write_outside: the user wrote the input and may name any path to write to.
        quick_cases: how many cases of the quick tier are of this kind.
    """

    name: str
    generate: Callable[[random.Random, Materials, int], Input]
    materials: tuple[str, ...]
    must_succeed: bool = False
    may_write_outside: bool = False
    quick_cases: int = 40
