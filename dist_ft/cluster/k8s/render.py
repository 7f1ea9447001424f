"""Manifests of a run as text: one stream, a folder, or a tree for kustomize. Writes files; decides nothing.

A tree holds `base`, `components` and `overlays`; what kustomize makes of an overlay is what `rendered` gives for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dist_ft.cluster.k8s.components import COMPONENTS, OVERLAYS, parts
from dist_ft.cluster.k8s.manifests import objects
from dist_ft.cluster.k8s.options import Options
from dist_ft.cluster.k8s.patch import Part, applied
from dist_ft.cluster.k8s.pods import Json
from dist_ft.cluster.k8s.sizing import sizing
from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError

MADE = "# Made by `dist-ft k8s render`; change the config or the options, and render anew.\n"


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", value, style="|" if "\n" in value else None
    )


_Dumper.add_representer(str, _text)


def as_yaml(documents: Sequence[Json]) -> str:
    """Return objects as one YAML stream."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=118)


def rendered(
    config: RunConfig, options: Options, overlay: str = "", components: Sequence[str] = ()
) -> dict[str, list[Json]]:
    """Return the objects of a run by file, with an overlay and components applied; raises ConfigError.

    Args:
        config: the run.
        options: what the config does not say.
        overlay: one of OVERLAYS; empty: the base.
        components: further ones of COMPONENTS, in this order; as in kustomize, what is the overlay's own comes last.
    """
    _known("--overlay", [overlay] if overlay else [], list(OVERLAYS))
    _known("--with", components, COMPONENTS)
    files = objects(config, options)
    made = parts(config, options, sizing(config, options))
    taken, own = OVERLAYS.get(overlay, ((), ""))
    for name in dict.fromkeys([*taken, *components, *([own] if own else [])]):
        files = {file: applied(documents, made[name]) for file, documents in files.items()}
    return files


def _known(option: str, names: Sequence[str], allowed: Sequence[str]) -> None:
    wrong = [
        f"{option}={name}: no such one; allowed: {', '.join(allowed)}; correct it"
        for name in names
        if name not in allowed
    ]
    if wrong:
        raise ConfigError(wrong, "k8s render")


def tree(config: RunConfig, options: Options) -> dict[str, str]:
    """Return base, components and overlays for kustomize: texts by path."""
    files = objects(config, options)
    made = parts(config, options, sizing(config, options))
    texts = folder(files, "base/")
    for name in COMPONENTS:
        texts[f"components/{name}/kustomization.yaml"] = _about(made[name]) + as_yaml(
            [
                {
                    "apiVersion": "kustomize.config.k8s.io/v1alpha1",
                    "kind": "Component",
                    **_changes(made[name]),
                }
            ]
        )
    for name, (taken, own) in OVERLAYS.items():
        head: Json = {"resources": ["../../base"]}
        if taken:
            head["components"] = [f"../../components/{component}" for component in taken]
        texts[f"overlays/{name}/kustomization.yaml"] = _about(made[own]) + as_yaml(
            [_kustomization(head | _changes(made[own]))]
        )
    return texts


def folder(files: Mapping[str, Sequence[Json]], below: str = "") -> dict[str, str]:
    """Return the texts of a folder of manifests, with a kustomization that lists them."""
    texts = {f"{below}{name}": MADE + as_yaml(documents) for name, documents in files.items()}
    texts[f"{below}kustomization.yaml"] = MADE + as_yaml(
        [_kustomization({"resources": list(files)})]
    )
    return texts


def _kustomization(content: Json) -> Json:
    return {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", **content}


def _about(part: Part) -> str:
    return f"{MADE}# {part.about}\n"


def _changes(part: Part) -> Json:
    """Return a part as kustomize says it."""
    changes: Json = {"namespace": part.namespace} if part.namespace else {}
    changes["patches"] = [
        {
            "target": {"kind": patch.kind, **({"name": patch.name} if patch.name else {})},
            "patch": as_yaml([list(patch.ops)]),  # type: ignore[list-item]
        }
        for patch in part.patches
    ]
    return changes


def write(texts: Mapping[str, str], out: str) -> None:
    """Write texts below a folder; raises ConfigError where that can not be."""
    try:
        for name, text in texts.items():
            path = Path(out) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            [f"{out}: can not be written ({error.strerror}); give another folder"], "k8s render"
        ) from error
