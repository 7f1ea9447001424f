"""A model that is ready to be scored: by its head, by prompts, by prototypes, or by what it writes.

In this process, without an optimizer, and of the data only what is asked for. Guarantees: a head that was never trained
is refused, or said to be random; all ways give the same metrics on the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from dist_ft.config.schema import RunConfig, Source
from dist_ft.config.sections.prompting import PromptingSection
from dist_ft.config.sections.task import LABELLED
from dist_ft.core.errors import ModelError
from dist_ft.core.world import Collectives, World, collectives
from dist_ft.inference import prototypes
from dist_ft.runtime.bootstrap import build_model
from dist_ft.runtime.bootstrap.build_data import open_held_out
from dist_ft.runtime.bootstrap.few_shot_examples import (
    with_examples,
)
from dist_ft.runtime.bootstrap.labels import with_labels
from dist_ft.storage.filesystem import Store
from dist_ft.training.evaluation import evaluate
from dist_ft.training.held_out_generation import HeldOutGenerator
from dist_ft.training.prediction_collector import PredictionCollector

if TYPE_CHECKING:
    from dist_ft.data.batching.loader import Loader
    from dist_ft.model.prototypes import PrototypeModel


@dataclass(frozen=True)
class Told:
    """What a model told of some rows.

    Attributes:
        values: metrics, tables by label among them.
        wanted: of each row, as `train.scores` takes it.
        told: the same.
    """

    values: dict[str, Any]
    wanted: list[Any]
    told: list[Any]


class Asked:
    """A model of a config, its weights loaded once.

    Attributes:
        config: with labels and examples.
        engine: the model inside an engine that only looks.
        kind: trained, random (a head that was never trained), likelihood or prototypes.
    """

    def __init__(self, config: RunConfig, random_head: bool = False) -> None:
        """Load the model; see `evaluating.evaluate_models`."""
        from dist_ft.model import heads
        from dist_ft.model.loading.load import load_task_model, load_tokenizer

        self._world = World()
        self._comms = collectives(self._world)
        self.config = labelled(config, self._world, self._comms)
        self.tokenizer = load_tokenizer(config.model, config.data.cache_dir)
        self.model, self._new = load_task_model(
            self.config.model_task, config.model, config.data.cache_dir
        )
        if line := heads.length_error(
            self.model.config, config.batch.sequence_length, config.model.path
        ):
            raise ModelError(line)
        if self._new and not random_head:
            raise ModelError(
                f"model.path={config.model.path}: {len(self._new)} weights of its head are not in the "
                f"files, such as {min(self._new)}; its scores would be random; train it first, or ask for "
                "them with --random-head"
            )
        self.kind = "random" if self._new else "trained"
        if config.prompting.method != "none":
            self.kind = config.prompting.method
        self.engine = self._wrapped()
        module = self.engine.module
        heads.initialize_new_weights(
            self.engine.slots,
            self._new,
            {name: one.shape for name, one in build_model.tensors(module).items()},
            module.model.config,
            config.run.seed,
        )
        build_model.probe(self.config, module, self.engine)

    def by_template(self, template: str) -> None:
        """Ask by another template from now on (one of the config as it is here, examples in it)."""
        section = self.config.prompting.model_copy(update={"templates": (template,)})
        self.config = self.config.model_copy(update={"prompting": section})
        self.engine = self._wrapped()

    @contextmanager
    def reading(self, sources: Sequence[Source]) -> Iterator[Loader]:
        """Yield a loader over the rows of `sources`."""
        evaluation = self.config.evaluation.model_copy(update={"data": tuple(sources)})
        config = self.config.model_copy(update={"evaluation": evaluation})
        loader = open_held_out(
            config,
            self.tokenizer,
            Store(f"memory://evaluate-{uuid4().hex}"),
            self._world,
            self._comms,
        )
        try:
            yield loader
        finally:
            loader.store.close()

    def about(self, sources: Sequence[Source]) -> Told:
        """Return what the model tells of the rows of `sources`."""
        config, scorer = self.config, PredictionCollector(self.config.task)
        with self.reading(sources) as loader:
            values = evaluate(
                self.engine,
                loader,
                config.num_lanes,
                self._world,
                self._comms,
                task=config.task,
                scorer=scorer,
                texts=HeldOutGenerator.of(config, self.tokenizer),
            )
        return Told(values, *scorer.gather_predictions(self._comms))

    def _wrapped(self) -> Any:
        import torch

        from dist_ft.engine.forward_engine import ForwardEngine

        device = torch.device("cuda" if self.config.cluster.gpus_per_worker > 0 else "cpu")
        engine = ForwardEngine(build_model.wrapped(self.model, self.config, self.tokenizer), device)
        if self.kind == "prototypes":
            prototypes.learn(
                cast("PrototypeModel", engine.module), self.config, self.tokenizer, device
            )
        return engine


def labelled(config: RunConfig, world: World, comms: Collectives) -> RunConfig:
    """Return the config with labels (the model's own where it has a head for some) and examples; a collective call."""
    if (
        config.task.name in LABELLED
        and config.prompting.method == "none"
        and not config.task.labels
    ):
        own = tuple(label for _, label in sorted((_about(config).id2label or {}).items()))
        if has_own_head(config) and len(own) > 1:
            config = config.model_copy(
                update={"task": config.task.model_copy(update={"labels": own})}
            )
    outside = config.evaluation.robustness.out_of_scope_label
    store = Store(f"memory://evaluate-{uuid4().hex}")
    config = with_labels(config, store, world, comms)
    if (
        config.prompting.method != "none" and outside in config.task.labels
    ):  # found in the training data
        labels = tuple(label for label in config.task.labels if label != outside)
        config = config.model_copy(
            update={"task": config.task.model_copy(update={"labels": labels})}
        )
    return with_examples(config, store, world, comms)


def has_own_head(config: RunConfig) -> bool:
    """Tell whether the files of the config's model hold a head for its task."""
    from dist_ft.model import heads

    return heads.has_head(_about(config), config.task)


def by_head(config: RunConfig) -> RunConfig:
    """Return the config without prompting if its model's files hold a head for the task."""
    if config.prompting.method == "none" or not has_own_head(config):
        return config
    return config.model_copy(update={"prompting": PromptingSection()})


def _about(config: RunConfig) -> Any:
    """Return what a model's files say of it, whatever it can do."""
    from transformers import AutoConfig

    from dist_ft.model.loading.download import fetch_model

    folder = fetch_model(config.model.path, config.model.revision, config.data.cache_dir, weights=False)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path={config.model.path}: is no model folder ({str(error).splitlines()[0][:100]}); "
            "what save_pretrained or `dist-ft export` writes is needed; correct the path"
        ) from error
