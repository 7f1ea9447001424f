"""The evaluations of a training run: when they run, and what follows from their results."""

from __future__ import annotations

from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.core.errors import ConfigError
from dist_ft.core.world import on_rank0
from dist_ft.metrics import best
from dist_ft.training.components import Components
from dist_ft.training.console import format_evaluation
from dist_ft.training.evaluation import EvaluationOutputs, evaluate, store_evaluation
from dist_ft.training.metrics_log import log_metrics
from dist_ft.training.run_context import RunContext


class Evaluator:
    """Runs evaluations and remembers their results.

    Attributes:
        summary: held-out losses "before" and "after" the run, as far as they are known.
    """

    def __init__(
        self,
        run: ResolvedRun,
        components: Components,
        context: RunContext,
        step: int,
        summary: dict[str, float],
    ) -> None:
        """Continue after `step`; `summary`: the evaluation stored with its checkpoint."""
        self._config = run.config
        self._task = run.task
        self._components = components
        self._context = context

        # A checkpoint stores the summary and the metrics of its own step in one mapping.
        self.summary: dict[str, float] = {}
        for label, loss in summary.items():
            if label in ("before", "after"):
                self.summary[label] = loss

        self._latest_step = -1
        self._latest_metrics: dict[str, float] = {}

        # In place, because the list of `components` outlives this evaluator, which a rollback
        # replaces. Evaluations of steps that are repeated must not count twice.
        history = components.evaluations
        history[:] = [point for point in history if point[0] <= step]

    def is_due(self, step: int) -> bool:
        """Return whether an evaluation is due after `step` steps, other than at start and end."""
        section = self._config.evaluation
        if section.every_steps and step % section.every_steps == 0:
            return True

        if not section.every_epochs:
            return False

        epoch, step_of_epoch = self._components.loader.plan.epoch_and_step(step)
        return step_of_epoch == 0 and epoch % section.every_epochs == 0

    def evaluate(self, step: int, label: str = "") -> None:
        """Evaluate after `step` steps if there is held-out data; a collective call.

        `label` (before, after): store the loss in the summary too.
        """
        components = self._components
        if components.evaluation is None:
            return

        components.time_ledger.enter("evaluation")

        # A swap, not a copy, because a copy would need memory for one more set of weights.
        uses_average = self._config.evaluation.weights == "ema"
        if uses_average:
            components.engine.swap_average()

        evaluation = evaluate(
            components.engine,
            components.evaluation,
            self._config.num_lanes,
            components.world,
            components.collectives,
            EvaluationOutputs(self._task, generator=components.held_out_generator),
            self._context.callbacks.on_progress,
        )
        if uses_average:
            components.engine.swap_average()

        # Before anything is stored, because an unknown checkpoint.best_by ends the run here.
        metrics = evaluation.metrics
        self._remember(step, metrics, label)

        # All ranks wait, and all raise if storage fails, so that no rank trains on alone.
        on_rank0(
            components.world,
            components.collectives,
            lambda: store_evaluation(components.store, step, evaluation),
        )

        callbacks = self._context.callbacks
        log_metrics(components.metrics, callbacks, step, "evaluation", metrics)
        if components.world.rank == 0:
            self._context.console.print(
                f"held-out loss at step {step}: {format_evaluation(metrics)}"
            )
            callbacks.on_evaluation(step, metrics)

    def _remember(self, step: int, metrics: dict[str, float], label: str) -> None:
        """Remember an evaluation for the summary, its checkpoint and early stopping.

        Raises:
            ConfigError: the metric that checkpoints are compared by is missing.
        """
        metric, history = self._config.checkpoint.best_by, self._components.evaluations
        if metric not in metrics:
            raise ConfigError(
                [
                    f"checkpoint.best_by={metric}: evaluations have no such metric. Allowed: "
                    f"{', '.join(metrics)}. Choose one of them."
                ],
                "evaluation",
            )

        # The number of target tokens is the same at every step: it compares no checkpoints.
        self._latest_step = step
        self._latest_metrics = dict(metrics)
        self._latest_metrics.pop("num_target_tokens", None)

        if not history or history[-1][0] < step:
            history.append((step, metrics[metric]))

        if label:
            self.summary[label] = metrics["loss"]

    def should_stop_early(self, step: int) -> bool:
        """Return whether the run ends after `step` steps because evaluations stopped improving.

        The same on all ranks.
        """
        metric, history = self._config.checkpoint.best_by, self._components.evaluations
        patience = self._config.evaluation.patience

        # Only right after an evaluation: at other steps nothing new is known.
        if self._latest_step != step or not best.should_stop_early(metric, history, patience):
            return False

        # The run ends here, so this evaluation is also the one after its last step.
        self.summary["after"] = self._latest_metrics["loss"]
        if self._components.world.rank == 0:
            best_step, value = best.find_best(metric, history)
            self._context.console.print(
                f"early stopping at step {step}: {metric} has not improved on {value:.4f} of step "
                f"{best_step} in {patience} evaluations"
            )

        return True

    def metrics_for_checkpoint(self, step: int) -> dict[str, float]:
        """Return what is stored with a checkpoint: the summary, and the metrics at this step."""
        if self._latest_step != step:
            return dict(self.summary)
        return self.summary | self._latest_metrics
