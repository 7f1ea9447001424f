"""The peer of B9: Ray Train's own restart, as documented: a TorchTrainer with DeepSpeed ZeRO.

    python b9_ray.py MODEL FOLDER STEPS KILL_AT

Prints nothing; rank 0 writes lines "step time" to FOLDER/steps.

Each worker loads its part of the latest reported checkpoint, trains on tokens drawn from the step
number, and reports a checkpoint every 20 steps. At step KILL_AT worker 1 kills itself once;
FOLDER/killed has the time.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time


def loop(config: dict) -> None:
    """Train in one worker."""
    import deepspeed
    import torch
    from ray import train
    from transformers import AutoModelForCausalLM

    rank = train.get_context().get_world_rank()
    model = AutoModelForCausalLM.from_pretrained(config["model"], dtype=torch.float32)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**62,
        },
    )
    first = 0
    latest = train.get_checkpoint()
    if latest:
        with latest.as_directory() as folder:
            engine.load_checkpoint(folder)
            first = engine.global_steps
    for step in range(first, config["steps"]):
        if step == config["kill_at"] and rank == 1:
            try:
                os.close(os.open(config["folder"] + "/killed", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        generator = torch.Generator().manual_seed(step * 2 + rank)
        ids = torch.randint(0, 200, (1, 48), generator=generator)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        if rank == 0:
            with open(config["folder"] + "/steps", "a") as file:
                file.write(f"{step} {time.time()}\n")
        if (step + 1) % config["every"] == 0:
            with tempfile.TemporaryDirectory() as folder:
                engine.save_checkpoint(folder)
                train.report({"step": step}, checkpoint=train.Checkpoint(folder))


def main() -> None:
    """Train with Ray's defaults."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    model, folder, steps, kill_at = sys.argv[1:5]
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    TorchTrainer(
        loop,
        train_loop_config={
            "model": model,
            "folder": folder,
            "steps": int(steps),
            "kill_at": int(kill_at),
            "every": 20,
        },
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(
            name="b9", storage_path=folder, failure_config=FailureConfig(max_failures=3)
        ),
    ).fit()
    ray.shutdown()


if __name__ == "__main__":
    main()
