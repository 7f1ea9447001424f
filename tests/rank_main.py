"""One rank of a test: runs each config of a JSON file, one after the other, in this process."""

from __future__ import annotations

import json
import os
import sys


def poison(rank: str, sample: str, factor: str) -> None:
    """On `rank`, multiply the losses of every step in which it holds `sample` by `factor`, and so the gradient."""
    from dist_ft.data.batch import Batch
    from dist_ft.engine.deepspeed_engine import DeepSpeedEngine
    from dist_ft.engine.torch_engine import TorchEngine
    from dist_ft.model.causal_lm import CausalLM

    scale = [1.0]
    forward = CausalLM.forward
    CausalLM.forward = lambda self, *a, **k: forward(self, *a, **k) * scale[0]  # type: ignore[method-assign]
    for engine in (DeepSpeedEngine, TorchEngine):

        def accumulate(self, batches: list[Batch], *rest, real=engine.accumulate):
            held = (
                any(int(sample) in batch.segments[:, 0] for batch in batches)
                and os.environ.get("RANK", "0") == rank
            )
            scale[0] = float(factor) if held else 1.0
            try:
                return real(self, batches, *rest)
            finally:
                scale[0] = 1.0

        engine.accumulate = accumulate  # type: ignore[method-assign]


def main(path: str) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from dist_ft.config.load import load_config
    from dist_ft.runtime import local

    if os.environ.get("POISON"):
        poison(*os.environ["POISON"].split(":"))
    with open(path) as file:
        configs = json.load(file)
    import torch.distributed as dist

    if int(os.environ["WORLD_SIZE"]) > 1 or any(c["cluster"]["workers"] for c in configs):
        dist.init_process_group("gloo")
    for config in configs:
        local.run(load_config(config))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
    from dist_ft.runtime import local

    local.in_group.set()
    local.leave(0)
