"""Kubernetes manifests, mutated, for `k8s check`."""

from __future__ import annotations

import random

import yaml

from fuzz import mutate
from fuzz.inputs import Input
from fuzz.kinds.kind import Kind
from fuzz.materials import Materials

NAMES = (
    *("spec", "metadata", "kind", "apiVersion", "containers", "resources", "limits", "env", "name"),
    *("rayClusterSpec", "headGroupSpec", "workerGroupSpecs", "template", "replicas", "labels"),
)


def generate(rng: random.Random, materials: Materials, number: int) -> Input:
    """Return `k8s check` of a mutated manifest."""
    name = rng.choice([name for name in materials.files("k8s") if "/base/" in name])
    content = materials.read(name)
    if rng.random() < 0.6:
        documents = list(yaml.safe_load_all(content))
        for _ in range(rng.choice((1, 1, 2, 4))):
            documents = mutate.mutate_tree(rng, documents, NAMES)
        if not isinstance(documents, list):
            documents = [documents]
        content = yaml.safe_dump_all(documents).encode("utf-8", "surrogatepass")
    elif rng.random() < 0.5:
        text = mutate.mutate_tokens(rng, content.decode(), NAMES)
        content = text.encode("utf-8", "surrogatepass")
    else:
        content = mutate.mutate_bytes(rng, content)

    words = ["k8s", "check", "mutated.yaml"]
    if rng.random() < 0.15:
        words += ["--crd", "mutated.yaml"]
    return Input(tuple(words), files={"mutated.yaml": content})


KIND = Kind("k8s", generate, ("k8s",), quick_cases=10)
