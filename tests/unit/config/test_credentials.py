"""Credentials in a config are refused and never quoted; what only looks like one is accepted."""

from __future__ import annotations

import copy
import json
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import secret_values
import yaml

from dist_ft import api
from dist_ft.cluster.jobs.job_request import find_variable_problems, inline_config
from dist_ft.cluster.jobs.job_server import resolve_url
from dist_ft.cluster.k8s.options import parse_options
from dist_ft.config.credentials import credential_problems, find_credential, mask_credentials
from dist_ft.config.load import inspect_config, load_config, resolved_yaml, to_mapping
from dist_ft.config.schema import RunConfig
from dist_ft.config.search import load_search
from dist_ft.config.stages import load_stages
from dist_ft.core.errors import ConfigError

BASE: dict[str, Any] = {
    "run": {"name": "x"},
    "model": {"path": "m"},
    "data": {"train": "a.jsonl"},
    "batch": {"global_batch": 4, "sequence_length": 8},
    "schedule": {"steps": 3},
}
PLACEMENTS = {entry["name"]: entry for entry in secret_values.load("placements.yaml")}
HONEST = secret_values.load("honest_configs.yaml")


def merged(changes: Any) -> dict[str, Any]:
    """Return the base config with sections merged into it."""

    def merge(below: Any, above: Any) -> Any:
        if not (isinstance(below, Mapping) and isinstance(above, Mapping)):
            return above
        return {**below, **{key: merge(below.get(key), item) for key, item in above.items()}}

    return merge(copy.deepcopy(BASE), changes)


def every_text(error: BaseException) -> str:
    """Return all that a user can see of an error: its text, its parts, a traceback with its causes."""
    shown = [str(error), repr(error), "".join(traceback.format_exception(error))]
    if isinstance(error, ConfigError):
        shown += [error.source, *error.problems]
    return "\n".join(shown)


def refuse(entry: Mapping[str, Any], folder: Path) -> list[ConfigError]:
    """Return the errors of a placement, by every way on which such input comes."""
    entry = secret_values.fill(dict(entry))
    base = folder / "base.yaml"
    base.write_text(yaml.safe_dump(merged({"evaluation": {"data": "b.jsonl", "every_steps": 1}})))

    calls: list[Callable[[], Any]] = []
    if "config" in entry:
        document = merged(entry["config"])
        file = folder / "run.yaml"
        file.write_text(yaml.safe_dump(document))
        calls = [lambda: load_config(document), lambda: load_config(file)]
    elif "overrides" in entry:
        calls = [
            lambda: load_config(BASE, entry["overrides"]),
            lambda: load_config(base, entry["overrides"]),
        ]
        if "=" in entry["overrides"][0]:
            # The file was forgotten, so the first override is taken for it.
            calls.append(lambda: load_config(entry["overrides"][0], entry["overrides"][1:]))
    elif "search" in entry:
        file = folder / "search.yaml"
        file.write_text(yaml.safe_dump(entry["search"]))
        calls = [lambda: load_search(str(base), str(file))]
    elif "stages" in entry:
        stages = entry["stages"]
        if stages["config"] == "CONFIG":
            stages["config"] = str(base)
        file = folder / "stages.yaml"
        file.write_text(yaml.safe_dump(stages))
        calls = [lambda: load_stages(str(file))]
    elif "env" in entry:
        problems = list(find_variable_problems(entry["env"]))
        assert problems
        return [ConfigError(problems)]
    elif "address" in entry:
        calls = [lambda: resolve_url(entry["address"])]
    else:
        calls = [lambda: parse_options({}, entry["set"])]

    errors = []
    for call in calls:
        with pytest.raises(ConfigError) as caught:
            call()
        errors.append(caught.value)
    return errors


def test_the_data_has_what_was_promised():
    assert len(PLACEMENTS) >= 60 and len(HONEST) >= 100
    assert len(secret_values.load("placements.yaml")) == len(PLACEMENTS), "names are unique"


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_credential_is_refused_and_not_quoted(name, tmp_path):
    entry = PLACEMENTS[name]
    for error in refuse(entry, tmp_path):
        leaked = secret_values.leaks(every_text(error), secret_values.marks(entry))
        assert not leaked, f"{error}"
        if entry["by"] != "broken" and "overrides" not in entry:
            text = str(error)
            assert "credential" in text or "user name" in text, text


@pytest.mark.parametrize("document", HONEST, ids=[json.dumps(entry)[:80] for entry in HONEST])
def test_an_honest_config_is_accepted(document):
    whole = merged(document)
    config = load_config(whole)
    assert not credential_problems(config)

    # Nothing is masked in it, and what a run stores of it loads again.
    assert mask_credentials(whole).mapping == whole
    assert load_config(to_mapping(config)) == config


def test_recipes_and_configs_hold_no_credential():
    root = Path(__file__).resolve().parents[3]
    for file in (root / "configs").rglob("*.yaml"):
        assert not mask_credentials(yaml.safe_load(file.read_text())).problems, file


def test_the_line_names_the_field_and_the_variables_to_set():
    with pytest.raises(ConfigError) as caught:
        load_config(BASE, ["storage.options.s3.client_kwargs.aws_secret_access_key=abc-1"])
    assert caught.value.problems == (
        "storage.options.s3.client_kwargs.aws_secret_access_key: looks like a credential, and a "
        "config is stored with the run. Credentials come from the environment. Remove it and set "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
    )


def test_all_other_problems_are_reported_as_well():
    config, problems, _ = inspect_config(
        merged({"storage": {"options": {"s3": {"secret": "x-1977", "anon": False}}}}),
        ["batch.micro_batch=x", "model.path=https://u:s3cr3t@h/m"],
    )
    assert [line.split(":")[0] for line in problems] == [
        "batch.micro_batch=x",
        "model.path",
        "storage.options.s3.secret",
    ]
    # The rest of the config can be checked: options without the credential, no model.
    assert config.storage.options == {"s3": {"anon": False}}
    with pytest.raises(AttributeError):
        config.model.path  # noqa: B018


def test_a_value_of_the_environment_that_the_shell_put_there(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "s3cr3t-value-1977")
    for override in (
        "run.storage=s3://b/s3cr3t-value-1977",
        "data.system_prompt=say s3cr3t-value-1977",
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(BASE, [override])
        assert "s3cr3t" not in every_text(caught.value)


def test_a_config_that_python_made_is_searched_before_it_is_used_or_stored():
    document = to_mapping(load_config(BASE))
    document["storage"]["options"] = {"s3": {"secret": "s3cr3t-1977"}}
    config = RunConfig.model_validate(document)

    assert "storage.options.s3.secret" in api.check(config)[0]
    for use in (api.train, resolved_yaml, inline_config):
        with pytest.raises(ConfigError) as caught:
            use(config)
        assert "s3cr3t" not in every_text(caught.value)


def test_a_broken_file_is_not_quoted(tmp_path):
    for line in (
        '  key: "s3cr3t-1977',
        "  key: *s3cr3t-1977",
        "  key: !s3cr3t-1977 x",
        "  s3cr3t-1977: a: b",
        "  key: [s3cr3t-1977",
    ):
        file = tmp_path / "run.yaml"
        file.write_text(f"run: {{name: x}}\nstorage:\n{line}\n")
        with pytest.raises(ConfigError) as caught:
            load_config(file)
        assert "s3cr3t" not in every_text(caught.value)


def test_options_of_other_commands():
    assert find_credential("password", "x1")
    assert find_credential("image", "https://u:p@h/x")
    assert not find_credential("image", "registry/x:1@sha256:" + "0" * 64)
    assert not list(find_variable_problems(["NCCL_DEBUG=INFO", "TOKENIZERS_PARALLELISM=false"]))
    assert resolve_url("http://127.0.0.1:8265/") == "http://127.0.0.1:8265"
    assert parse_options({}, ["secret=my-secret", "efa=4"]).secret == "my-secret"
