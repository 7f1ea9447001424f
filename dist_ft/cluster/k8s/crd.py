"""Custom resources held against the schema of their CRD, as the API server does it.

Defaults are put in first, unknown fields are refused, then come the rules (x-kubernetes-validations, CEL). Rules about
a change (oldSelf) say nothing of one manifest, and are left out.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dist_ft.core.errors import ConfigError

Json = dict[str, Any]
Schemas = dict[tuple[str, str], Json]
"""openAPIV3Schema by (kind in lower case, version)."""
KEPT = frozenset(
    (
        "type",
        "enum",
        "required",
        "pattern",
        "minimum",
        "maximum",
        "minLength",
        "maxLength",
        "minItems",
        "maxItems",
        "minProperties",
        "maxProperties",
        "uniqueItems",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
    )
)
"""What OpenAPI and JSON Schema say in the same way."""


def load(path: str) -> Schemas:
    """Return the schemas in a file or folder: CRDs as `kubectl get crd ... -o yaml` gives them, or bare schemas.

    A bare schema is called <kind>.<version>.schema.json (or .yaml). Raises ConfigError.
    """
    place = Path(path)
    if not place.exists():
        raise ConfigError(
            [
                f"--crd={path}: no such file or folder; write one: kubectl get crd rayjobs.ray.io "
                "rayclusters.ray.io -o yaml > crd.yaml"
            ],
            "k8s check",
        )
    files = (
        [place]
        if place.is_file()
        else sorted(file for file in place.iterdir() if file.suffix in (".yaml", ".yml", ".json"))
    )
    found: Schemas = {}
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
            for content in (
                [json.loads(text)] if file.suffix == ".json" else yaml.safe_load_all(text)
            ):
                found |= dict(_schemas(content, file))
        except (yaml.YAMLError, ValueError, OSError) as error:
            raise ConfigError(
                [
                    f"--crd={file}: can not be read ({type(error).__name__}); give CRDs as YAML or JSON"
                ],
                "k8s check",
            ) from error
    if not found:
        raise ConfigError(
            [
                f"--crd={path}: no CRD and no schema in it; write one: kubectl get crd rayjobs.ray.io "
                "rayclusters.ray.io -o yaml > crd.yaml"
            ],
            "k8s check",
        )
    return found


def _schemas(content: Any, file: Path) -> Iterator[tuple[tuple[str, str], Json]]:
    if not isinstance(content, dict):
        return
    if content.get("kind") == "List" or isinstance(content.get("items"), list):
        for item in content["items"]:
            yield from _schemas(item, file)
    elif content.get("kind") == "CustomResourceDefinition":
        for version in content["spec"]["versions"]:
            yield (
                (content["spec"]["names"]["kind"].lower(), version["name"]),
                version["schema"]["openAPIV3Schema"],
            )
    elif "properties" in content or "openAPIV3Schema" in content:
        kind, _, rest = file.name.partition(".")
        version = rest.split(".")[0] if rest.startswith("v") else "v1"
        yield (kind.lower(), version), content.get("openAPIV3Schema", content)


def problems(content: Json, schema: Json, notes: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (path, what is wrong) of an object, which stays as it is; rules that can not be read here go to `notes`."""
    import jsonschema

    content = copy.deepcopy(content)
    _default(content, schema)
    errors = list(jsonschema.Draft202012Validator(strict(schema)).iter_errors(content))
    for error in errors:
        yield dotted(error.absolute_path), error.message.replace("\n", " ")[:300]
    if not errors:
        yield from _twice(content, schema)
        yield from _broken(content, schema, notes)


def dotted(path: Any) -> str:
    """Return a path as people write it: spec.containers[0].image."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.lstrip(".") or "(all of it)"


def strict(schema: Json) -> Json:
    """Return a structural schema as a JSON Schema that refuses fields it does not know."""
    made = {key: value for key, value in schema.items() if key in KEPT}
    for bound in ("Minimum", "Maximum"):  # OpenAPI 3.0 writes them as true beside the bound
        if made.get(f"exclusive{bound}") is True:
            made[f"exclusive{bound}"] = made.pop(bound.lower())
        elif made.get(f"exclusive{bound}") is False:
            del made[f"exclusive{bound}"]
    for word in ("allOf", "anyOf", "oneOf"):
        if word in schema and not schema.get("x-kubernetes-int-or-string"):
            made[word] = [_loose(part) for part in schema[word]]
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    if "items" in schema:
        made["items"] = strict(schema["items"])
    if "properties" in schema:
        made["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
    more = schema.get("additionalProperties")
    if isinstance(more, dict):
        made["additionalProperties"] = strict(more)
    elif (
        schema.get("properties")
        and more is None
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        made["additionalProperties"] = False
    if schema.get("nullable") and isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    return made


def _loose(schema: Any) -> Any:
    """Return a part of allOf, anyOf or not, which adds bounds and knows no fields of its own."""
    made = strict(schema)
    made.pop("additionalProperties", None)
    return made


def _default(value: Any, schema: Json) -> None:
    """Put defaults in, in place, as the API server does before it looks at rules."""
    if isinstance(value, dict):
        for name, part in schema.get("properties", {}).items():
            if name not in value and "default" in part:
                value[name] = copy.deepcopy(part["default"])
            if name in value:
                _default(value[name], part)
        if isinstance(schema.get("additionalProperties"), dict):
            for inner in value.values():
                _default(inner, schema["additionalProperties"])
    elif isinstance(value, list) and "items" in schema:
        for inner in value:
            _default(inner, schema["items"])


def _inner(
    value: Any, schema: Json, path: tuple[str | int, ...]
) -> Iterator[tuple[Any, Json, tuple[str | int, ...]]]:
    """Yield a value and all values in it, each with its schema and path."""
    yield value, schema, path
    if isinstance(value, dict):
        more = schema.get("additionalProperties")
        for name, inner in value.items():
            part = schema.get("properties", {}).get(name) or (
                more if isinstance(more, dict) else None
            )
            if part:
                yield from _inner(inner, part, (*path, name))
    elif isinstance(value, list) and "items" in schema:
        for index, inner in enumerate(value):
            yield from _inner(inner, schema["items"], (*path, index))


def _twice(content: Json, schema: Json) -> Iterator[tuple[str, str]]:
    """Yield entries of lists that are maps by their keys, and of sets, which stand there twice."""
    for value, part, path in _inner(content, schema, ()):
        if not isinstance(value, list) or part.get("x-kubernetes-list-type") not in ("map", "set"):
            continue
        keys = part.get("x-kubernetes-list-map-keys")
        seen = [json.dumps([entry.get(key) for key in keys] if keys else entry) for entry in value]
        for one in sorted({one for one in seen if seen.count(one) > 1}):
            yield dotted(path), f"{', '.join(keys or ['value'])} {one} stands there twice"


def _broken(content: Json, schema: Json, notes: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the rules that do not hold."""
    import celpy

    environment = celpy.Environment()
    for value, part, path in _inner(content, schema, ()):
        for rule in part.get("x-kubernetes-validations", ()):
            if "oldSelf" in rule["rule"]:
                continue
            try:
                program = environment.program(environment.compile(rule["rule"]))
                held = bool(program.evaluate({"self": celpy.json_to_cel(value)}))
            except (celpy.CELParseError, celpy.CELEvalError):  # a function only the API server has
                notes.append(
                    f"{dotted(path)}: a rule of the schema could not be tried here: {rule['rule']}"
                )
                continue
            if not held:
                yield dotted(path), str(rule.get("message") or f"breaks the rule {rule['rule']}")


def version_of(content: Mapping[str, Any]) -> tuple[str, str]:
    """Return the key of an object's schema in `Schemas`."""
    return str(content.get("kind", "")).lower(), str(content.get("apiVersion", "")).rsplit("/", 1)[
        -1
    ]
