"""Names of 0.1.0: an error with the new name in a user's file, migrated where a run stored them."""

from __future__ import annotations

import pytest

from dist_ft.config import renames
from dist_ft.config.error_messages import schema_paths
from dist_ft.config.identity import Change, check_resume
from dist_ft.config.load import (
    inspect_config,
    load_config,
    load_stored_config,
    load_stored_section,
    read_stored_config,
    to_mapping,
)
from dist_ft.config.schema import PromptingSection, TaskSection
from dist_ft.config.search import SearchSection, load_search
from dist_ft.config.stages import StagesSection, load_stages
from dist_ft.core.errors import ConfigError
from dist_ft.storage.filesystem import Store

BASE = {
    "run": {"name": "x"},
    "model": {"path": "m"},
    "data": {"train": "a"},
    "batch": {"global_batch": 4, "sequence_length": 8},
    "schedule": {"steps": 3},
}
OLD_SECTIONS = {
    "prompting": {
        "method": "likelihood",
        "templates": ["{text}\nIt is"],
        "verbalisers": {"a": " good", "b": " bad", "of": " of", "x.y": " z"},
        "normalise": "mean",
    },
    "task": {"name": "sequence_classification", "masked_share": 0.15},
    "checkpoint": {"node_folder": "/dev/shm/x", "node_every_steps": 7},
    "evaluation": {"of": "weights", "keep_texts": 3, "decoding": {"rows": 5}},
    "anomaly": {"most_in_a_row": 9},
}
NEW_SECTIONS = {
    "prompting": {
        "method": "likelihood",
        "templates": ["{text}\nIt is"],
        "verbalizers": {"a": " good", "b": " bad", "of": " of", "x.y": " z"},
        "normalize": "mean",
    },
    "task": {"name": "sequence_classification", "mask_probability": 0.15},
    "checkpoint": {"local_folder": "/dev/shm/x", "local_every_steps": 7},
    "evaluation": {"weights": "trained", "keep_generations": 3, "decoding": {"batch_size": 5}},
    "anomaly": {"max_consecutive": 9},
}
OLD = {
    **BASE,
    **OLD_SECTIONS,
    "model": {"path": "m", "checkpoint": "newest"},
    "data": {"train": [{"path": "a", "share": 0.5}, "b"], "augment": {"share": 0.25}},
}
NEW = {
    **BASE,
    **NEW_SECTIONS,
    "model": {"path": "m", "checkpoint": "latest"},
    "data": {"train": [{"path": "a", "share": 0.5}, "b"], "augment": {"probability": 0.25}},
}


def test_new_names_are_in_the_schema_and_old_names_are_not():
    paths = schema_paths()
    assert set(renames.RUN.fields.values()) <= set(paths)
    assert set(renames.RUN.values) <= set(paths)
    assert not set(renames.RUN.fields) & set(paths)
    assert set(renames.SEARCH.fields.values()) <= set(SearchSection.model_fields)
    assert set(renames.STAGES.fields.values()) <= set(StagesSection.model_fields)


@pytest.mark.parametrize(("old", "new"), renames.RUN.fields.items())
def test_an_old_field_is_an_error_with_the_new_name(old, new):
    section, _, field = old.rpartition(".")
    nested: dict = {field: "wrong"}
    for name in reversed(section.split(".")):
        nested = {name: nested}
    document = {**BASE, **nested}
    if section.startswith("data"):
        document["data"] = {**BASE["data"], **nested["data"]}
    _, problems, _ = inspect_config(document)
    assert f"{old}: renamed to {new} in 0.2. Rename it." in problems

    _, problems, _ = inspect_config(BASE, [f"{old}=1"])
    assert f"{old}: renamed to {new} in 0.2. Rename it." in problems


def test_the_value_of_an_old_field_is_checked_as_the_new_field():
    _, problems, _ = inspect_config({**BASE, "anomaly": {"most_in_a_row": 0}})
    assert (
        problems[0]
        == "anomaly.most_in_a_row: renamed to anomaly.max_consecutive in 0.2. Rename it."
    )
    assert len(problems) == 2 and problems[1].startswith("anomaly.max_consecutive=0: out of range")


def test_an_old_override_with_a_number_as_text_has_one_problem():
    _, problems, _ = inspect_config(BASE, ["checkpoint.node_folder=7"])
    assert problems == [
        "checkpoint.node_folder: renamed to checkpoint.local_folder in 0.2. Rename it."
    ]


def test_an_old_value_is_an_error_with_the_new_value():
    _, problems, _ = inspect_config(BASE, ["model.checkpoint=newest", "evaluation.weights=weights"])
    assert problems == [
        "model.checkpoint=newest: renamed to latest in 0.2. Write model.checkpoint=latest.",
        "evaluation.weights=weights: renamed to trained in 0.2. Write evaluation.weights=trained.",
    ]


def test_a_stored_config_is_migrated(tmp_path):
    import yaml

    store = Store(str(tmp_path))
    assert read_stored_config(store) == {}
    store.write("run.yaml", yaml.safe_dump(OLD).encode())
    assert read_stored_config(store) == NEW
    assert load_stored_config(store).anomaly.max_consecutive == 9
    assert load_stored_config(store).evaluation.weights == "trained"


def test_names_of_0_1_0_are_restored_for_hashes():
    assert renames.RUN.migrate(OLD) == NEW
    assert renames.RUN.restore(NEW) == OLD
    assert renames.RUN.restore(NEW["prompting"], "prompting") == OLD["prompting"]
    config = to_mapping(load_config(BASE))
    assert renames.RUN.migrate(renames.RUN.restore(config)) == config


def test_a_resume_migrates_renamed_fields():
    base = {**BASE, "data": {"train": "a", "augment": {"probability": 0.5, "swap": 0.1}}}
    new = load_config({**base, "task": {"name": "sequence_classification"}})
    stored = renames.RUN.restore(to_mapping(new))
    assert stored["data"]["augment"]["share"] == 0.5
    assert check_resume(stored, new) == []

    stored["anomaly"]["most_in_a_row"] = 6
    assert check_resume(stored, new) == [Change("anomaly.max_consecutive", 6, 5)]

    stored["data"]["augment"]["share"] = 0.75
    with pytest.raises(ConfigError, match=r"data\.augment\.probability=0\.5: "):
        check_resume(stored, new)


def test_an_unknown_stored_field_is_an_error(tmp_path):
    stored = to_mapping(load_config(BASE))
    stored["evaluation"]["decoding"]["gone"] = 1
    stored["gone"] = {"too": 2}
    lines = [
        f"{path}: another version of dist_ft stored this field. This version does not know it. "
        "Use the version that stored it."
        for path in ("evaluation.decoding.gone", "gone")
    ]
    with pytest.raises(ConfigError) as caught:
        check_resume(stored, load_config(BASE))
    assert [line.partition(" (")[0] for line in caught.value.problems] == lines

    import yaml

    Store(str(tmp_path)).write("run.yaml", yaml.safe_dump(stored).encode())
    with pytest.raises(ConfigError) as caught:
        load_stored_config(Store(str(tmp_path)))
    assert list(caught.value.problems) == lines
    assert caught.value.source.endswith("run.yaml")


def test_sections_of_exported_models_are_migrated():
    about = {"task": {"name": "masked_lm", "masked_share": 0.3}, "int8": {"free": "form"}}
    task = load_stored_section(about, "task", TaskSection, "dist_ft.json")
    assert task.mask_probability == 0.3
    prompting = load_stored_section(about, "prompting", PromptingSection, "dist_ft.json")
    assert prompting == PromptingSection()
    with pytest.raises(ConfigError, match=r"dist_ft\.json: 1 problem\n  - task\.gone: another ver"):
        load_stored_section({"task": {"gone": 1}}, "task", TaskSection, "dist_ft.json")


def test_old_names_in_search_and_stages_files(tmp_path):
    import yaml

    def write(name, document):
        (tmp_path / name).write_text(yaml.safe_dump(document))
        return str(tmp_path / name)

    config = write("config.yaml", {**BASE, "evaluation": {"data": "b", "at_end": True}})
    search = {"name": "s", "space": {"schedule.steps": [1, 2]}, "at_once": 2}
    with pytest.raises(ConfigError) as caught:
        load_search(config, write("search.yaml", search))
    assert caught.value.problems == ("at_once: renamed to max_concurrent in 0.2. Rename it.",)

    stages = {"name": "s", "config": config, "stages": [{"name": "a"}], "begin": "newest"}
    with pytest.raises(ConfigError) as caught:
        load_stages(write("stages.yaml", stages))
    assert caught.value.problems == (
        "begin: renamed to checkpoint in 0.2. Rename it.",
        "checkpoint=newest: renamed to latest in 0.2. Write checkpoint=latest.",
    )
    space = {"name": "s", "search": "grid", "space": {"prompting.normalise": ["sum"]}}
    with pytest.raises(ConfigError, match=r"prompting\.normalise: renamed to prompting\.normalize"):
        load_search(config, write("space.yaml", space))
