"""Every config that is shipped is one that `load_config` takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_ft.config.load import load_config
from dist_ft.config.search import load_search
from dist_ft.config.stages import load_stages

FOLDER = Path(__file__).parents[3] / "configs"
SERIES = ("stages-intents", "search")
CONFIGS = sorted(path for path in FOLDER.rglob("*.yaml") if path.stem not in SERIES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_is_a_config(path):
    config = load_config(str(path))
    text = path.read_text()
    assert (
        "dist-ft train" in text
        or f"dist-ft evaluate configs/recipes/{path.name}" in text
        or path.parent.name == "configs"
    ), "a recipe says how it is run"
    assert path.parent.name != "recipes" or config.run.name == path.stem


def test_the_stages_and_the_search_are_of_a_recipe():
    stages = load_stages(str(FOLDER / "recipes" / "stages-intents.yaml"))
    assert [len(stage.config.data.train) for stage in stages.stages] == [1, 2, 3]
    search = load_search(
        str(FOLDER / "recipes" / "intents.yaml"), str(FOLDER / "recipes" / "search.yaml")
    )
    assert search.section.num_trials == 12


def test_there_is_a_recipe_for_each_task():
    tasks = {load_config(str(path)).task.name for path in CONFIGS}
    assert {
        "causal_lm",
        "sequence_classification",
        "token_classification",
        "question_answering",
        "seq2seq",
        "masked_lm",
        "embedding",
    } <= tasks
