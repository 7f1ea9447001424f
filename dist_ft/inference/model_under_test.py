"""Models ready for evaluation: by a head, label likelihood, prototypes or generated text.

Runs in this process, without an optimizer, and reads only the data that the evaluation needs.
Guarantees: a head that was never trained is an error, or is reported as random; all methods compute
the same metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, cast
from uuid import uuid4

from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.config.schema import Source
from dist_ft.core.errors import ModelError
from dist_ft.core.world import World, collectives
from dist_ft.inference import prototypes
from dist_ft.inference.evaluation_run import resolve_answers
from dist_ft.model.loading.load import load_tokenizer
from dist_ft.runtime.bootstrap import build_model
from dist_ft.runtime.bootstrap.build_data import build_held_out_loader
from dist_ft.storage.filesystem import Store
from dist_ft.training.evaluation import EvaluationOutputs, evaluate
from dist_ft.training.held_out_generation import HeldOutGenerator
from dist_ft.training.prediction_collector import PredictionCollector

if TYPE_CHECKING:
    from dist_ft.data.batching.loader import Loader
    from dist_ft.model.prototypes import PrototypeModel


@dataclass(frozen=True)
class ModelScores:
    """The scores of a model on some rows.

    Attributes:
        metrics: metrics by name; the value of a table is a mapping (such as one by label).
        expected: label of each row, in the form that `metrics.task_scores` takes.
        predicted: prediction for each row, in the form that `metrics.task_scores` takes.
    """

    metrics: dict[str, Any]
    expected: list[Any]
    predicted: list[Any]


class ModelUnderTest(Protocol):
    """A model with loaded weights that can be scored on rows.

    Attributes:
        run: the run with labels and templates.
        head: source of the predictions: trained, random (a head that was never trained), or the
            prompting method.
    """

    run: ResolvedRun
    head: str

    def use_template(self, template: str) -> None:
        """Use `template`, one of the run's templates, for all further prompts."""

    def score(self, sources: Sequence[Source]) -> ModelScores:
        """Return the scores on the rows of `sources`."""


class ForwardModel:
    """A model that predicts in one forward pass: by a head, label likelihood or prototypes.

    Attributes:
        run: the run with labels, templates and tokenizer.
        engine: a `ForwardEngine` with the model, its loss and no optimizer.
        head: trained, random (a head that was never trained), likelihood or prototypes.
    """

    def __init__(self, run: ResolvedRun, random_head: bool = False) -> None:
        """Load the model at run.model.

        Args:
            run: the run to evaluate.
            random_head: initialize a head that was never trained instead of raising an error.

        Raises:
            ModelError: batch.sequence_length exceeds the model's limit, or the head is not trained.
        """
        from dist_ft.model import heads
        from dist_ft.model.loading.load import load_task_model

        config = run.config
        self._world = World()
        self._comms = collectives(self._world)

        # The labels come first: they decide the size of the head that is loaded.
        run = resolve_answers(run, self._world, self._comms)
        tokenizer = load_tokenizer(run.model, config.data.cache_dir)
        self.run = run = replace(run, tokenizer=tokenizer)

        self._model, new_weights = load_task_model(run.model_task, run.model, config.data.cache_dir)
        length_error = heads.length_error(
            self._model.config, config.batch.sequence_length, config.model.path
        )
        if length_error:
            raise ModelError(length_error)

        if new_weights and not random_head:
            raise ModelError(
                f"model.path={config.model.path}: {len(new_weights)} weights of the head are not "
                f"in the files, such as {min(new_weights)}, and scores would be random. A trained "
                "head is required. Train it first, or use --random-head."
            )

        self.head: str = config.prompting.method
        if config.prompting.method == "none":
            self.head = "trained"
            if new_weights:
                self.head = "random"

        self.engine = self._build_engine()

        # As a training run initializes them, so that a random head scores the same in both.
        module = self.engine.module
        heads.initialize_new_weights(
            self.engine.state_slices,
            new_weights,
            {name: info.shape for name, info in build_model.tensor_infos(module).items()},
            module.model.config,
            config.run.seed,
        )
        build_model.check_packing(run, module, self.engine)

    def use_template(self, template: str) -> None:
        """Use `template`, one of the run's templates, for all further prompts."""
        # The loss holds the tokens of the labels as they are after a template: both are rebuilt.
        # The weights stay loaded.
        self.run = replace(self.run, templates=(template,))
        self.engine = self._build_engine()

    @contextmanager
    def open_loader(self, sources: Sequence[Source]) -> Iterator[Loader]:
        """Yield a loader over the rows of `sources`."""
        # In memory, because the index of these rows is needed for this evaluation only.
        store = Store(f"memory://evaluate-{uuid4().hex}")
        loader = build_held_out_loader(self.run, sources, store, self._world, self._comms)
        try:
            yield loader
        finally:
            loader.store.close()

    def score(self, sources: Sequence[Source]) -> ModelScores:
        """Return the scores on the rows of `sources`."""
        # The collector is created here, because the predictions are needed too, not only the
        # metrics that `evaluate` returns.
        run = self.run
        collector = PredictionCollector(run.task)
        with self.open_loader(sources) as loader:
            outputs = EvaluationOutputs(
                run.task, collector, HeldOutGenerator.from_config(run.config, run.tokenizer)
            )
            evaluation = evaluate(
                self.engine,
                loader,
                run.config.num_lanes,
                self._world,
                self._comms,
                outputs,
            )

        return ModelScores(evaluation.to_json(), *collector.gather_predictions(self._comms))

    def _build_engine(self) -> Any:
        """Return an engine for the current templates; fits prototypes if the run uses them."""
        import torch

        from dist_ft.engine.forward_engine import ForwardEngine

        device = torch.device("cpu")
        if self.run.config.cluster.gpus_per_worker > 0:
            device = torch.device("cuda")

        # After the engine is built, because it moves the model to the device that the examples of
        # prototypes are embedded on.
        engine = ForwardEngine(build_model.add_loss(self._model, self.run), device)
        if self.head == "prototypes":
            prototypes.fit_prototypes(cast("PrototypeModel", engine.module), self.run, device)

        return engine
