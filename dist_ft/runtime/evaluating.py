"""Models as they are, scored on the held-out data of a config, without training: the same metrics as a run's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import uuid4

from dist_ft import storage
from dist_ft.checkpoint import origin
from dist_ft.config.schema import RunConfig
from dist_ft.errors import ConfigError, ModelError
from dist_ft.runtime.data import open_data
from dist_ft.storage import Store
from dist_ft.train.evaluate import evaluate
from dist_ft.world import World, collectives


def evaluate_models(config: RunConfig, paths: list[str], random_head: bool = False,
                    told: Callable[[str, dict[str, Any]], None] = lambda path, values: None
                    ) -> dict[str, dict[str, Any]]:
    """Return the metrics of the model at each of `paths` on evaluation.data, in this process, with a head as it is.

    Args:
        config: task, data and batch; its model is replaced by each of `paths`, but for the tokenizer it names.
        paths: folders, URLs, hub names.
        random_head: score a head that was never trained too; else that is an error.
        told: called with each model's path and metrics.

    Raises:
        ConfigError: there is no held-out data.
        ModelError: a model that can not do the task, or whose head was never trained.
    """
    if not config.evaluation.data:
        raise ConfigError(["evaluation.data: is empty; what to score on is needed; set it"], "evaluate")
    storage.configure(config.storage.options)
    found = {}
    for path in paths:
        found[path] = _evaluate(_of_model(config, path), random_head)
        told(path, found[path])
    return found


def _of_model(config: RunConfig, path: str) -> RunConfig:
    """Return the config with another model, in this process and all of its weights as they lie in the files."""
    changes: dict[str, Any] = {"cluster": config.cluster.model_copy(update={"workers": 0}),
                               "tuning": type(config.tuning)(),
                               "task": config.task.model_copy(update={"new_head": False, "grow_head": False})}
    model = config.model
    if path != config.model.path:
        model = config.model.model_copy(update={"path": path, "revision": None})
    changes["model"] = origin.local(model, config.data.cache_dir)
    return config.model_copy(update=changes)


def _evaluate(config: RunConfig, random_head: bool) -> dict[str, Any]:
    from dist_ft.model import heads
    from dist_ft.runtime.opening import open_engine, probe, tensors

    world = World()
    comms = collectives(world)
    data = open_data(config, Store(f"memory://evaluate-{uuid4().hex}"), world, comms)
    try:
        config = data.config
        module, engine, new = open_engine(config, world, False, data.tokenizer)
        if new and not random_head:
            raise ModelError(f"model.path={config.model.path}: {len(new)} weights of its head are not in the files, "
                             f"such as {min(new)}; its scores would be random; train it first, or ask for them with "
                             "--random-head")
        heads.begin(engine.slots, new, {name: one.shape for name, one in tensors(module).items()}, module.model.config,
                    config.run.seed)
        engine.finish_load(0)
        probe(config, module, engine)
        assert data.evaluation is not None
        values = evaluate(engine, data.evaluation, config.num_lanes, world, comms, task=config.task)
        return {**values, "head": "random" if new else "trained"}
    finally:
        data.close()
