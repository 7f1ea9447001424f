"""One rank of a test: runs each config of a JSON file, one after the other, in this process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any


def poison(rank: str, sample: str, factor: str) -> None:
    """On `rank`, scale the losses and gradients of each step in which it has `sample` by `factor`."""
    from dist_ft.data.batch import Batch
    from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
    from dist_ft.engine.torch_engine import TorchEngine
    from dist_ft.model.causal_lm import CausalLM

    scale = [1.0]
    forward = CausalLM.forward
    CausalLM.forward = lambda self, *a, **k: forward(self, *a, **k) * scale[0]  # type: ignore[method-assign]
    for engine in (DeepSpeedEngine, TorchEngine):

        def accumulate(self, batches: list[Batch], *rest, real=engine.accumulate):
            has_sample = (
                any(int(sample) in batch.segments[:, 0] for batch in batches)
                and os.environ.get("RANK", "0") == rank
            )
            scale[0] = float(factor) if has_sample else 1.0
            try:
                return real(self, batches, *rest)
            finally:
                scale[0] = 1.0

        engine.accumulate = accumulate  # type: ignore[method-assign]


def printing_callback() -> Any:
    """Return a callback that prints the events of training as lines `callback [name, step, ...]`."""
    from dist_ft.training.callbacks import Callback

    def print_event(*event: Any) -> None:
        print("callback", json.dumps(event), flush=True)

    class Printer(Callback):
        def on_step_end(self, step: int, loss: float) -> None:
            print_event("on_step_end", step)

        def on_metrics(self, step: int, kind: str, values: Mapping[str, float]) -> None:
            print_event("on_metrics", step, kind)

        def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
            print_event("on_evaluation", step)

        def on_checkpoint_committed(self, url: str, metrics: Mapping[str, float]) -> None:
            print_event("on_checkpoint_committed", metrics["step"])

    return Printer()


def main(path: str) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from dist_ft.config.load import load_config
    from dist_ft.runtime import local
    from dist_ft.training.callbacks import CallbackList
    from dist_ft.training.run_context import RunContext

    if os.environ.get("POISON"):
        poison(*os.environ["POISON"].split(":"))
    with open(path) as file:
        configs = json.load(file)
    import torch.distributed as dist

    if int(os.environ["WORLD_SIZE"]) > 1 or any(c["cluster"]["workers"] for c in configs):
        dist.init_process_group("gloo")
    callbacks = [printing_callback()] if os.environ.get("PRINT_CALLBACKS") else []
    for config in configs:
        local.run(load_config(config), RunContext(callbacks=CallbackList(callbacks)))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
    from dist_ft.runtime import local

    local.joined_process_group.set()
    local.exit_process(0)
