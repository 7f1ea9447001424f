"""Custom resources are checked against a small CRD as by the API server."""

from __future__ import annotations

import json

import pytest
import yaml

from dist_ft.cluster.k8s import crd
from dist_ft.core.errors import ConfigError

pytest.importorskip("jsonschema", reason="needs the extra k8s: pip install 'dist-ft[k8s]'")
pytest.importorskip("celpy", reason="needs the extra k8s: pip install 'dist-ft[k8s]'")

SCHEMA = {
    "type": "object",
    "properties": {
        "spec": {
            "type": "object",
            "required": ["size"],
            "x-kubernetes-validations": [
                {
                    "rule": "self.mode == 'a' || self.size > 3",
                    "message": "small objects need mode a",
                },
                {"rule": "self.size == oldSelf.size", "message": "size may not change"},
            ],
            "properties": {
                "size": {"type": "integer", "minimum": 1},
                "mode": {"type": "string", "default": "a", "enum": ["a", "b"]},
                "port": {
                    "x-kubernetes-int-or-string": True,
                    "anyOf": [{"type": "integer"}, {"type": "string"}],
                },
                "free": {
                    "type": "object",
                    "x-kubernetes-preserve-unknown-fields": True,
                    "properties": {"a": {"type": "string"}},
                },
                "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                "none": {"type": "string", "nullable": True},
                "parts": {
                    "type": "array",
                    "x-kubernetes-list-type": "map",
                    "x-kubernetes-list-map-keys": ["name"],
                    "items": {
                        "type": "object",
                        "properties": {
                            "name": {"type": "string"},
                            "many": {"type": "integer", "default": 1},
                        },
                    },
                },
                "below": {"type": "number", "maximum": 5, "exclusiveMaximum": True},
            },
        }
    },
}


def find_problems(**spec):
    return list(crd.check_schema({"spec": spec}, SCHEMA, []))


@pytest.mark.parametrize(
    "spec",
    [
        {"size": 1},
        {"size": 4, "mode": "b"},
        {"size": 1, "port": 1},
        {"size": 1, "port": "http"},
        {"size": 1, "free": {"x": {}}},
        {"size": 1, "labels": {"any": "text"}},
        {"size": 1, "none": None},
        {"size": 1, "parts": [{"name": "a"}, {"name": "b"}]},
    ],
)
def test_valid_object_passes(spec):
    before = json.dumps(spec)
    assert find_problems(**spec) == []
    assert json.dumps(spec) == before, "defaults are filled into a copy"


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({}, ("spec", "'size' is a required property")),
        (
            {"size": 1, "sise": 2},
            ("spec", "Additional properties are not allowed ('sise' was unexpected)"),
        ),
        ({"size": "1"}, ("spec.size", "'1' is not of type 'integer'")),
        ({"size": 1, "mode": "b"}, ("spec", "small objects need mode a")),
        ({"size": 1, "port": 1.5}, ("spec.port", "1.5 is not of type 'integer', 'string'")),
        ({"size": 1, "labels": {"a": 1}}, ("spec.labels.a", "1 is not of type 'string'")),
        ({"size": 1, "below": 5}, ("spec.below", "5 is greater than or equal to the maximum of 5")),
        (
            {"size": 1, "parts": [{"name": "a"}, {"name": "a"}]},
            ("spec.parts", 'name ["a"] is not unique. Remove one.'),
        ),
        (
            {"size": 1, "parts": [{"nam": "a"}]},
            ("spec.parts[0]", "Additional properties are not allowed ('nam' was unexpected)"),
        ),
    ],
)
def test_invalid_object_is_refused(spec, problem):
    assert find_problems(**spec) == [problem]


def test_rule_that_cannot_be_evaluated_is_a_note():
    notes = []
    schema = {
        "type": "object",
        "x-kubernetes-validations": [{"rule": "quantity(self.a).isLessThan(quantity('1Gi'))"}],
    }
    assert list(crd.check_schema({"a": "1"}, schema, notes)) == []
    assert len(notes) == 1 and "cannot be evaluated here: quantity(" in notes[0]


CRD = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "rayjobs.ray.io"},
    "spec": {
        "names": {"kind": "RayJob"},
        "versions": [
            {"name": "v1", "schema": {"openAPIV3Schema": SCHEMA}},
            {"name": "v1alpha1", "schema": {"openAPIV3Schema": {}}},
        ],
    },
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("crd.yaml", yaml.safe_dump(CRD)),
        ("crd.json", json.dumps(CRD)),
        ("list.yaml", yaml.safe_dump({"apiVersion": "v1", "kind": "List", "items": [CRD]})),
        ("two.yaml", yaml.safe_dump_all([{"kind": "Namespace"}, CRD])),
        ("rayjob.v1.schema.json", json.dumps(SCHEMA)),
        ("rayjob.json", json.dumps(SCHEMA)),
        ("RayJob.v1.yaml", yaml.safe_dump({"openAPIV3Schema": SCHEMA})),
    ],
)
def test_crd_files_of_all_forms_are_loaded(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    for path in (tmp_path, tmp_path / name):
        assert crd.load_schemas(str(path))["rayjob", "v1"] == SCHEMA


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.yaml", "a: [", "cannot be read (ParserError). CRDs must be YAML or JSON"),
        ("a.json", "{", "cannot be read (ValueError). CRDs must be YAML or JSON"),
        (
            "a.yaml",
            "kind: Namespace",
            "contains no CRD and no schema. Create one with: kubectl get crd rayjobs.ray.io",
        ),
        (None, None, "no such file or folder. Create one with: kubectl get crd"),
    ],
)
def test_unusable_crd_files_are_refused(tmp_path, name, text, problem):
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        crd.load_schemas(str(tmp_path if name else tmp_path / "none"))
    assert problem in caught.value.problems[0] and len(caught.value.problems) == 1
