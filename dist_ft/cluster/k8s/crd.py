"""Checks custom resources against the schema of their CRD, as the API server does.

Defaults are filled in first, unknown fields are refused, then rules (x-kubernetes-validations, CEL)
are evaluated. Rules about a change (oldSelf) do not apply to a single manifest and are skipped.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dist_ft.cluster.k8s.load_manifests import Problem
from dist_ft.core import yaml_documents
from dist_ft.core.errors import ConfigError
from dist_ft.core.json_documents import decode_json
from dist_ft.storage.local_files import read_regular

Json = dict[str, Any]
MAX_MESSAGE_LENGTH = 300
WRONG_FORM = (KeyError, TypeError, AttributeError)
"""What the code that looks for schemas raises for a file of another form."""
COMMON_KEYWORDS = frozenset(
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
"""Keywords with the same meaning in OpenAPI and JSON Schema."""
EXPORT_COMMAND = "kubectl get crd rayjobs.ray.io rayclusters.ray.io -o yaml > crd.yaml"


class SchemaKey(NamedTuple):
    """Identifies a schema: kind in lower case, and version."""

    kind: str
    version: str


Schemas = dict[SchemaKey, Json]
"""openAPIV3Schema by kind and version."""


class _SchemaValue(NamedTuple):
    """A value in an object.

    Attributes:
        value: the value.
        schema: schema of the value.
        path: path of the value in the object.
    """

    value: Any
    schema: Json
    path: tuple[str | int, ...]


def load_schemas(path: str) -> Schemas:
    """Return the schemas in a file or folder.

    These are CRDs as `kubectl get crd ... -o yaml` writes them, or bare schemas. A bare schema is
    called <kind>.<version>.schema.json (or .yaml).

    Raises:
        ConfigError: nothing can be read.
    """
    source = Path(path)
    if not source.exists():
        raise ConfigError(
            [f"--crd={path}: no such file or folder. Create one with: {EXPORT_COMMAND}"],
            "k8s check",
        )
    files = [source]
    if not source.is_file():
        suffixes = (".yaml", ".yml", ".json")
        files = sorted(file for file in source.iterdir() if file.suffix in suffixes)

    schemas: Schemas = {}
    for file in files:
        try:
            text = read_regular(file, yaml_documents.MANIFESTS.num_bytes).decode()
            # a YAML file may hold several documents, a JSON file holds one
            if file.suffix == ".json":
                contents = [decode_json(text)]
            else:
                contents = yaml_documents.parse_yaml(text, yaml_documents.MANIFESTS).values
            for content in contents:
                schemas |= dict(_iter_schemas(content, file))
        except (yaml.YAMLError, ValueError, OSError, *WRONG_FORM) as error:
            raise ConfigError(
                [
                    f"--crd={file}: cannot be read ({type(error).__name__}). CRDs must be YAML or "
                    "JSON. Check the file."
                ],
                "k8s check",
            ) from error

    if not schemas:
        raise ConfigError(
            [f"--crd={path}: contains no CRD and no schema. Create one with: {EXPORT_COMMAND}"],
            "k8s check",
        )
    return schemas


def _iter_schemas(content: Any, file: Path) -> Iterator[tuple[SchemaKey, Json]]:
    if not isinstance(content, dict):
        return

    # `kubectl get` returns one object as itself, several as a List
    if content.get("kind") == "List" or isinstance(content.get("items"), list):
        for item in content["items"]:
            yield from _iter_schemas(item, file)
    elif content.get("kind") == "CustomResourceDefinition":
        kind = content["spec"]["names"]["kind"].lower()
        for version in content["spec"]["versions"]:
            yield SchemaKey(kind, version["name"]), version["schema"]["openAPIV3Schema"]
    elif "properties" in content or "openAPIV3Schema" in content:
        kind, _, rest = file.name.partition(".")
        version = rest.split(".")[0] if rest.startswith("v") else "v1"
        yield SchemaKey(kind.lower(), version), content.get("openAPIV3Schema", content)


def schema_key(content: Mapping[str, Any]) -> SchemaKey:
    """Return the key of an object's schema in `Schemas`."""
    version = str(content.get("apiVersion", "")).rsplit("/", 1)[-1]
    return SchemaKey(str(content.get("kind", "")).lower(), version)


def check_schema(content: Json, schema: Json, notes: list[str]) -> Iterator[Problem]:
    """Yield the problems of an object, which is not changed.

    Rules that cannot be evaluated here are appended to `notes`.
    """
    import jsonschema

    content = copy.deepcopy(content)
    _fill_defaults(content, schema)

    validator = jsonschema.Draft202012Validator(strict_json_schema(schema))
    errors = list(validator.iter_errors(content))

    for error in errors:
        message = error.message.replace("\n", " ")[:MAX_MESSAGE_LENGTH]
        yield Problem(format_path(error.absolute_path), message)

    # rules assume the types that the schema promises, and would fail in other ways
    if not errors:
        yield from _check_duplicates(content, schema)
        yield from _check_rules(content, schema, notes)


def format_path(path: Sequence[str | int]) -> str:
    """Return a path as users write it: spec.containers[0].image."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.lstrip(".") or "(the whole object)"


def strict_json_schema(schema: Json) -> Json:
    """Return a structural schema as a JSON Schema that refuses unknown fields."""
    converted = {key: value for key, value in schema.items() if key in COMMON_KEYWORDS}
    is_int_or_string = schema.get("x-kubernetes-int-or-string")

    for bound in ("Minimum", "Maximum"):
        # OpenAPI 3.0 writes `exclusiveMinimum: true` next to the bound
        if converted.get(f"exclusive{bound}") is True:
            converted[f"exclusive{bound}"] = converted.pop(bound.lower())
        elif converted.get(f"exclusive{bound}") is False:
            del converted[f"exclusive{bound}"]

    for keyword in ("allOf", "anyOf", "oneOf"):
        if keyword in schema and not is_int_or_string:
            converted[keyword] = [_without_unknown_field_check(part) for part in schema[keyword]]
    if is_int_or_string:
        converted["type"] = ["integer", "string"]
    if "items" in schema:
        converted["items"] = strict_json_schema(schema["items"])
    if "properties" in schema:
        properties = {}
        for name, part in schema["properties"].items():
            properties[name] = strict_json_schema(part)
        converted["properties"] = properties

    additional = schema.get("additionalProperties")
    allows_unknown = schema.get("x-kubernetes-preserve-unknown-fields")

    # Without strict validation, the API server drops unknown fields silently ("pruning"). Here they
    # are errors, because they are misspelled names. A schema without properties accepts anything.
    if isinstance(additional, dict):
        converted["additionalProperties"] = strict_json_schema(additional)
    elif schema.get("properties") and additional is None and not allows_unknown:
        converted["additionalProperties"] = False

    # `nullable` is OpenAPI's word; JSON Schema lists null as a type
    if schema.get("nullable") and isinstance(converted.get("type"), str):
        converted["type"] = [converted["type"], "null"]
    return converted


def _without_unknown_field_check(schema: Any) -> Any:
    """Return a part of allOf, anyOf or oneOf, which adds bounds but does not list all fields."""
    converted = strict_json_schema(schema)
    converted.pop("additionalProperties", None)
    return converted


def _fill_defaults(value: Any, schema: Json) -> None:
    """Fill in defaults, in place, as the API server does before it evaluates rules."""
    # A default is filled in before the values in it: it may lack fields that have defaults.
    if isinstance(value, dict):
        for name, part in schema.get("properties", {}).items():
            if name not in value and "default" in part:
                value[name] = copy.deepcopy(part["default"])
            if name in value:
                _fill_defaults(value[name], part)
        if isinstance(schema.get("additionalProperties"), dict):
            for inner in value.values():
                _fill_defaults(inner, schema["additionalProperties"])
    elif isinstance(value, list) and "items" in schema:
        for inner in value:
            _fill_defaults(inner, schema["items"])


def _iter_values(
    value: Any, schema: Json, path: tuple[str | int, ...] = ()
) -> Iterator[_SchemaValue]:
    """Yield a value and all values in it."""
    yield _SchemaValue(value, schema, path)
    if isinstance(value, dict):
        additional = schema.get("additionalProperties")
        for name, inner in value.items():
            inner_schema = schema.get("properties", {}).get(name)
            if not inner_schema and isinstance(additional, dict):
                inner_schema = additional
            if inner_schema:
                yield from _iter_values(inner, inner_schema, (*path, name))
    elif isinstance(value, list) and "items" in schema:
        for index, inner in enumerate(value):
            yield from _iter_values(inner, schema["items"], (*path, index))


def _check_duplicates(content: Json, schema: Json) -> Iterator[Problem]:
    """Yield duplicates in sets, and in lists that are maps by some keys."""
    for value, part, path in _iter_values(content, schema):
        if not isinstance(value, list) or part.get("x-kubernetes-list-type") not in ("map", "set"):
            continue

        # as JSON, because entries may be mappings, which cannot be hashed
        keys = part.get("x-kubernetes-list-map-keys")
        entries = []
        for entry in value:
            identity = [entry.get(key) for key in keys] if keys else entry
            entries.append(json.dumps(identity))

        duplicates = {text for text, count in Counter(entries).items() if count > 1}
        for duplicate in sorted(duplicates):
            name = ", ".join(keys or ["value"])
            yield Problem(format_path(path), f"{name} {duplicate} is not unique. Remove one.")


def _check_rules(content: Json, schema: Json, notes: list[str]) -> Iterator[Problem]:
    """Yield the rules that do not hold."""
    import celpy

    environment = celpy.Environment()
    for value, part, path in _iter_values(content, schema):
        for rule in part.get("x-kubernetes-validations", ()):
            if "oldSelf" in rule["rule"]:
                continue

            try:
                program = environment.program(environment.compile(rule["rule"]))
                holds = bool(program.evaluate({"self": celpy.json_to_cel(value)}))
            except (celpy.CELParseError, celpy.CELEvalError):
                # a function that only the API server has
                note = f"a rule of the schema cannot be evaluated here: {rule['rule']}"
                notes.append(f"{format_path(path)}: {note}")
                continue

            if not holds:
                message = rule.get("message") or f"violates the rule {rule['rule']}"
                yield Problem(format_path(path), str(message))
