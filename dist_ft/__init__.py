"""Full fine-tuning of large language models; run state never depends on the number of workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = [
    "IGNORE_INDEX",
    "Callback",
    "LossAndOutputs",
    "RowResult",
    "RunConfig",
    "Sample",
    "Task",
    "TaskScores",
    "__version__",
    "check",
    "evaluate",
    "export",
    "generate",
    "load_config",
    "predict",
    "report",
    "train",
]

if TYPE_CHECKING:
    from dist_ft.api import check, evaluate, export, generate, predict, report, train
    from dist_ft.config.load import load_config
    from dist_ft.config.schema import RunConfig
    from dist_ft.data.batch import IGNORE_INDEX
    from dist_ft.data.encoding.task_rows import Sample
    from dist_ft.metrics.task_scores import TaskScores
    from dist_ft.model.model_task import LossAndOutputs
    from dist_ft.tasks.base import Task
    from dist_ft.tasks.results import RowResult
    from dist_ft.training.callbacks import Callback

_WHERE = {
    "Callback": "dist_ft.training.callbacks",
    "RunConfig": "dist_ft.config.schema",
    "Task": "dist_ft.tasks.base",
    "IGNORE_INDEX": "dist_ft.data.batch",
    "LossAndOutputs": "dist_ft.model.model_task",
    "RowResult": "dist_ft.tasks.results",
    "Sample": "dist_ft.data.encoding.task_rows",
    "TaskScores": "dist_ft.metrics.task_scores",
    "load_config": "dist_ft.config.load",
    "train": "dist_ft.api",
    "check": "dist_ft.api",
    "export": "dist_ft.api",
    "evaluate": "dist_ft.api",
    "predict": "dist_ft.api",
    "generate": "dist_ft.api",
    "report": "dist_ft.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used, so that `import dist_ft` stays light."""
    if name not in _WHERE:
        raise AttributeError(
            f"module 'dist_ft' has no attribute {name!r}; it offers {', '.join(__all__)}"
        )
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)
