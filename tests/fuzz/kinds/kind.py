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
        generate: draws an input; the same one for the same random generator.
        materials: what cases may need.
        may_write_outside: the user wrote the input and may name any path to write to.
        quick_cases: how many cases of the quick tier are of this kind.
    """

    name: str
    generate: Callable[[random.Random, Materials], Input]
    materials: tuple[str, ...]
    may_write_outside: bool = False
    quick_cases: int = 40
