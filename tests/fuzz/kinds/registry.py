"""All kinds of inputs, by name."""

from __future__ import annotations

import random
from collections.abc import Iterator

from fuzz.inputs import Case
from fuzz.kinds import commands, configs, k8s, models, rows, runs, sound, stored, templates
from fuzz.kinds.kind import Kind
from fuzz.materials import Materials

MODULES = (sound, configs, commands, runs, stored, models, rows, templates, k8s)
KINDS: dict[str, Kind] = {module.KIND.name: module.KIND for module in MODULES}


def cases(name: str, seed: int, first: int, count: int, materials: Materials) -> Iterator[Case]:
    """Yield cases [first, first + count) of a kind; each follows from its name alone."""
    for material in KINDS[name].materials:
        materials.path(material)
    for number in range(first, first + count):
        rng = random.Random(f"{name}/{seed}/{number}")
        yield Case(name, f"{name}-{seed}-{number}", KINDS[name].generate(rng, materials, number))
