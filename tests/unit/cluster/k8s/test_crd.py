"""Custom resources against a CRD: as the API server does it, tried on a small one."""

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
                {"rule": "self.mode == 'a' || self.size > 3", "message": "small ones need mode a"},
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


def said(**spec):
    return list(crd.problems({"spec": spec}, SCHEMA, []))


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
def test_what_passes(spec):
    before = json.dumps(spec)
    assert said(**spec) == []
    assert json.dumps(spec) == before, "defaults are put into a copy"


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({}, ("spec", "'size' is a required property")),
        (
            {"size": 1, "sise": 2},
            ("spec", "Additional properties are not allowed ('sise' was unexpected)"),
        ),
        ({"size": "1"}, ("spec.size", "'1' is not of type 'integer'")),
        ({"size": 1, "mode": "b"}, ("spec", "small ones need mode a")),
        ({"size": 1, "port": 1.5}, ("spec.port", "1.5 is not of type 'integer', 'string'")),
        ({"size": 1, "labels": {"a": 1}}, ("spec.labels.a", "1 is not of type 'string'")),
        ({"size": 1, "below": 5}, ("spec.below", "5 is greater than or equal to the maximum of 5")),
        (
            {"size": 1, "parts": [{"name": "a"}, {"name": "a"}]},
            ("spec.parts", 'name ["a"] stands there twice'),
        ),
        (
            {"size": 1, "parts": [{"nam": "a"}]},
            ("spec.parts[0]", "Additional properties are not allowed ('nam' was unexpected)"),
        ),
    ],
)
def test_what_is_refused(spec, problem):
    assert said(**spec) == [problem]


def test_a_rule_that_can_not_be_tried_here_is_a_note():
    notes = []
    schema = {
        "type": "object",
        "x-kubernetes-validations": [{"rule": "quantity(self.a).isLessThan(quantity('1Gi'))"}],
    }
    assert list(crd.problems({"a": "1"}, schema, notes)) == []
    assert len(notes) == 1 and "could not be tried here: quantity(" in notes[0]


WHOLE = {
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
        ("crd.yaml", yaml.safe_dump(WHOLE)),
        ("crd.json", json.dumps(WHOLE)),
        ("list.yaml", yaml.safe_dump({"apiVersion": "v1", "kind": "List", "items": [WHOLE]})),
        ("two.yaml", yaml.safe_dump_all([{"kind": "Namespace"}, WHOLE])),
        ("rayjob.v1.schema.json", json.dumps(SCHEMA)),
        ("rayjob.json", json.dumps(SCHEMA)),
        ("RayJob.v1.yaml", yaml.safe_dump({"openAPIV3Schema": SCHEMA})),
    ],
)
def test_crds_as_people_have_them(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    for path in (tmp_path, tmp_path / name):
        assert crd.load(str(path))["rayjob", "v1"] == SCHEMA


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.yaml", "a: [", "can not be read (ParserError); give CRDs as YAML or JSON"),
        ("a.json", "{", "can not be read (JSONDecodeError); give CRDs as YAML or JSON"),
        (
            "a.yaml",
            "kind: Namespace",
            "no CRD and no schema in it; write one: kubectl get crd rayjobs.ray.io",
        ),
        (None, None, "no such file or folder; write one: kubectl get crd"),
    ],
)
def test_crds_that_are_none(tmp_path, name, text, problem):
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        crd.load(str(tmp_path if name else tmp_path / "none"))
    assert problem in caught.value.problems[0] and len(caught.value.problems) == 1
