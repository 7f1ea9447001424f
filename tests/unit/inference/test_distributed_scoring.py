"""Models scored by workers: what is refused, and the zero-step run that scores them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_tasks

from dist_ft.config.load import load_config
from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.core.errors import ConfigError, ModelError
from dist_ft.inference import distributed_scoring
from dist_ft.inference.evaluate import evaluate_models
from dist_ft.runtime import local
from dist_ft.runtime.ray_backend import driver
from dist_ft.storage.filesystem import Store
from dist_ft.training.result import Result


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_tasks.base(tmp_path_factory.mktemp("scoring"))


def config(base, *overrides):
    return load_config(
        tiny_tasks.config(base, "sequence_classification", "scored", workers=2), overrides
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompting.method=prototypes"], "prompting.method=prototypes: needs one process"),
        (["evaluation.robustness.typo_rate=0.1"], "evaluation.robustness: needs one process"),
        (
            ["prompting.method=likelihood", "prompting.templates=['a {text}', 'b {text}']"],
            "prompting.templates: 2 templates are given",
        ),
    ],
)
def test_scores_that_need_one_process_are_refused(base, overrides, message):
    made = config(base, *overrides)
    with pytest.raises(ConfigError, match=message):
        distributed_scoring.score(ResolvedRun.from_config(made), made.cluster)


def test_untrained_head_is_refused_before_workers_start(base):
    made = config(base)
    with pytest.raises(
        ModelError,
        match=r"hold no head for task\.name=sequence_classification, and scores would be random",
    ):
        evaluate_models(made, [made.model.path])


def test_distributed_metrics_equal_one_process_and_the_run_is_removed(base, monkeypatch):
    """The run is in this process here; tests/integration uses workers."""
    made = config(base)
    configs = []

    def run(derived):
        configs.append(derived)
        return local.run(
            derived.model_copy(
                update={"cluster": derived.cluster.model_copy(update={"workers": 0})}
            )
        )

    monkeypatch.setattr(driver, "run", run)
    (sharded,) = evaluate_models(made, [made.model.path], random_head=True).values()
    alone = made.model_copy(update={"cluster": made.cluster.model_copy(update={"workers": 0})})
    (plain,) = evaluate_models(alone, [made.model.path], random_head=True).values()
    assert sharded["head"] == plain["head"] == "random"
    for name, value in plain.items():
        if isinstance(value, float):
            assert sharded[name] == pytest.approx(value, abs=1e-6), name
    assert sharded["confusion"] == plain["confusion"]
    (one,) = configs
    assert (
        one.max_workers == 2 and one.schedule.steps == 0 and one.data.train == made.evaluation.data
    )
    assert one.run.name != made.run.name and not Store(one.run_url).list()


def test_zero_step_run_evaluates_and_saves_no_checkpoint(base):
    made = load_config(
        tiny_tasks.config(base, "sequence_classification", "none"),
        ["schedule.steps=0", "schedule.epochs=null", "schedule.warmup_steps=null"],
    )
    result = local.run(made)
    assert isinstance(result, Result) and replace(result, evaluation_before=None).checkpoint is None
    assert (
        result.step == result.total_steps == 0
        and result.evaluation_before is not None
        and result.evaluation_after is None
    )
