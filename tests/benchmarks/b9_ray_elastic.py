"""The peer of B9's lost node: Ray Train's own elastic range: a TorchTrainer with DDP.

    python b9_ray_elastic.py MODEL FOLDER ADDRESS

Trains until it is killed; rank 0 writes lines "world step time" to FOLDER/steps.

One or two workers of one CPU, as documented, all settings at Ray's defaults. DeepSpeed's
checkpoints cannot be loaded on another number of workers, so this peer uses plain DDP; rank 0
reports model and optimizer every 20 steps.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time


def loop(config: dict) -> None:
    """Train in one worker."""
    import torch
    from ray import train
    from ray.train.torch import prepare_model
    from transformers import AutoModelForCausalLM

    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    model = AutoModelForCausalLM.from_pretrained(config["model"], dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    first = 0
    latest = train.get_checkpoint()
    if latest:
        with latest.as_directory() as folder:
            state = torch.load(os.path.join(folder, "state.pt"))
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    ddp_model = prepare_model(model)
    for step in range(first, 10**9):
        generator = torch.Generator().manual_seed(step * 2 + rank)
        ids = torch.randint(0, 200, (1, 48), generator=generator)
        optimizer.zero_grad()
        ddp_model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if rank == 0:
            with open(config["folder"] + "/steps", "a") as file:
                file.write(f"{world} {step} {time.time()}\n")
        if (step + 1) % config["every"] == 0:
            with tempfile.TemporaryDirectory() as folder:
                if rank == 0:
                    torch.save(
                        {
                            "model": model.state_dict(),
                            "optimizer": optimizer.state_dict(),
                            "step": step + 1,
                        },
                        os.path.join(folder, "state.pt"),
                    )
                train.report(
                    {"step": step}, checkpoint=train.Checkpoint(folder) if rank == 0 else None
                )


def main() -> None:
    """Train with Ray's defaults."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    model, folder, address = sys.argv[1:4]
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    TorchTrainer(
        loop,
        train_loop_config={"model": model, "folder": folder, "every": 20},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=(1, 2), resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name="b9", storage_path=folder, failure_config=FailureConfig(max_failures=3)
        ),
    ).fit()


if __name__ == "__main__":
    main()
