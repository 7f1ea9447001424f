"""B7: how long training pauses for a save / one copy of the state into memory already touched.

    python tests/benchmarks/b7_save.py

A Llama of 106 M parameters under the plain engine: with AdamW's moments 1.27 GB of float32 state,
one process, one thread, a local disk. Compared with torch.save, torch DCP (async_save) and
DeepSpeed's save_checkpoint (ZeRO-1, one rank). Each save is completely written before the next side
starts. Then: the time of a step while a save is written in the background, with and without
`checkpoint.background_mb_s`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np

SHAPE = {
    "num_hidden_layers": 8,
    "hidden_size": 768,
    "intermediate_size": 2064,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 32768,
    "tie_word_embeddings": False,
}
TOKENS = 64
GOAL_COPY, GOAL_TORCH = 1.2, 10


def main() -> None:
    """Measure, print the tables, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--steps",
        type=int,
        default=12,
        help="steps during background writes, with and without the limit",
    )
    parser.add_argument("--throttle-mb-s", type=float, default=150)
    parser.add_argument("--out", help="JSON file to write instead of results/b7_save.json")
    args = parser.parse_args()
    harness.require_one_thread()
    environment = harness.describe_environment()
    import torch.distributed as dist

    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29577", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0"
    )
    dist.init_process_group("gloo")
    with tempfile.TemporaryDirectory(prefix="dist_ft-b7-") as name:
        folder = Path(name)
        engine = build_engine()
        state = {f"{part.key}:{part.name}": part.read() for part in engine.state_slices()}
        size = sum(value.numel() * value.element_size() for value in state.values())
        sides = {
            "copy": copy_side(state),
            "ours": ours_side(engine, folder),
            "torch.save": torch_side(state, folder),
            "DCP async": dcp_side(state, folder),
            "DeepSpeed": deepspeed_side(folder),
        }
        for side in sides.values():
            side()  # allocates buffers and creates the files
        stall_s = harness.alternate_sides(sides, args.rounds)
        draining = {
            label: steps_while_draining(engine, folder, args.steps, limit)
            for label, limit in (("throttled", args.throttle_mb_s), ("not throttled", 0.0))
        }
    result: dict[str, Any] = {
        "state_bytes": size,
        "stall_s": stall_s,
        "ours_over_copy": harness.ratio(stall_s["ours"], stall_s["copy"]),
        **{
            f"{peer}_over_ours": harness.ratio(stall_s[peer], stall_s["ours"])
            for peer in stall_s
            if peer not in ("ours", "copy")
        },
        "draining": draining,
    }
    report(result)
    harness.save_results(
        "b7_save",
        {
            "shape": SHAPE,
            "rounds": args.rounds,
            "steps": args.steps,
            "throttle_mb_s": args.throttle_mb_s,
        },
        environment,
        result,
        args.out,
    )
    dist.destroy_process_group()


def build_module() -> Any:
    """Return the model with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dist_ft.model.causal_lm import CausalLM

    torch.manual_seed(0)
    return CausalLM(LlamaForCausalLM(LlamaConfig(**SHAPE)))


def build_engine() -> Any:
    """Return the plain engine with its optimizer state."""
    import torch

    from dist_ft.config.schema import OptimizerSection
    from dist_ft.engine.torch_engine import TorchEngine

    return TorchEngine(build_module(), OptimizerSection(learning_rate=1e-5), torch.device("cpu"))


def copy_side(state: dict[str, Any]) -> Callable[[], float]:
    """Copy the state into buffers that are already touched: the lower bound for a save."""
    import torch

    buffers = {name: torch.zeros_like(value).fill_(1) for name, value in state.items()}

    def run() -> float:
        start_s = time.perf_counter()
        for name, value in state.items():
            buffers[name].copy_(value)
        return time.perf_counter() - start_s

    return run


def build_manager(folder: Path, **section: Any) -> Any:
    """Return a manager of the checkpoints in `folder`; `section`: fields of its config."""
    from dist_ft.checkpoint.manager import CheckpointManager
    from dist_ft.config.schema import CheckpointSection
    from dist_ft.core.world import Collectives, World
    from dist_ft.storage.filesystem import Store

    return CheckpointManager(
        Store(str(folder)), CheckpointSection(keep_last=1, **section), World(), Collectives(), 1
    )


def save_request(step: int) -> Any:
    """Return the request to save the state after `step`."""
    from dist_ft.checkpoint.ledger import LedgerRows
    from dist_ft.checkpoint.manifest import Progress
    from dist_ft.checkpoint.save_status import SaveRequest

    rows = LedgerRows(np.zeros((1, 6), np.int64))
    return SaveRequest(
        "b7", "TorchEngine", Progress(step=step, optimizer_step=step), rows, {}, {}, {}
    )


def ours_side(engine: Any, folder: Path) -> Callable[[], float]:
    """Measure `start_save`; the files are written and committed off the clock."""
    manager = build_manager(folder / "ours")
    steps = iter(range(1, 10**6))
    manager.prepare(engine)

    def run() -> float:
        start_s = time.perf_counter()
        manager.start_save(engine, save_request(next(steps)))
        seconds = time.perf_counter() - start_s
        outcome = manager.finish_save()
        if outcome.problem is not None:
            raise outcome.problem
        return seconds

    return run


def torch_side(state: dict[str, Any], folder: Path) -> Callable[[], float]:
    """Measure torch.save to the same disk."""
    import torch

    def run() -> float:
        start_s = time.perf_counter()
        torch.save(state, folder / "torch.pt")
        seconds = time.perf_counter() - start_s
        sync()
        return seconds

    return run


def dcp_side(state: dict[str, Any], folder: Path) -> Callable[[], float]:
    """Measure the call of DCP's async_save; it reuses its staging buffers."""
    from torch.distributed.checkpoint import async_save
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    writer = FileSystemWriter(str(folder / "dcp"), overwrite=True)
    # pinned memory requires an accelerator
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=True,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
    )

    def run() -> float:
        start_s = time.perf_counter()
        saving = async_save(state, storage_writer=writer, async_stager=stager)
        seconds = time.perf_counter() - start_s
        saving.result()
        sync()
        return seconds

    return run


def deepspeed_side(folder: Path) -> Callable[[], float]:
    """Measure DeepSpeed's own checkpoint of the same model and optimizer, ZeRO-1 on one rank."""
    from dist_ft.config.schema import OptimizerSection
    from dist_ft.core.world import World
    from dist_ft.engine import deepspeed_engine as sharded

    sharded.attach_to_process_group(False)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine = sharded.DeepSpeedEngine(
        build_module(), OptimizerSection(learning_rate=1e-5), settings, World()
    )

    def run() -> float:
        shutil.rmtree(folder / "deepspeed", ignore_errors=True)
        start_s = time.perf_counter()
        engine._engine.save_checkpoint(str(folder / "deepspeed"), tag="t")
        seconds = time.perf_counter() - start_s
        sync()
        return seconds

    return run


def sync() -> None:
    """Wait until the disk has written everything."""
    os.sync()


def steps_while_draining(engine: Any, folder: Path, count: int, limit: float) -> dict[str, Any]:
    """Return step times without a save, and while a save is written.

    A new save starts when the last has ended.

    Args:
        engine: the engine.
        folder: on the disk to write to.
        count: the number of steps to measure during saves.
        limit: `checkpoint.background_mb_s`; 0: no limit.
    """
    manager = build_manager(folder / f"drain-{limit:g}", background_mb_s=limit)
    steps = iter(range(1, 10**6))
    manager.prepare(engine)
    free, busy = [], []
    while len(busy) < count:
        free.append(timed_step(engine))
        manager.start_save(engine, save_request(next(steps)))
        while manager.advance(*manager.save_flags()) is None:
            seconds = timed_step(engine)
            if not manager.save_flags().files_written:  # it was written during the whole step
                busy.append(seconds)
    return {
        "free_s": free,
        "busy_s": busy,
        "busy_over_free": statistics.median(busy) / statistics.median(free),
    }


def timed_step(engine: Any) -> float:
    """Train one small batch and return its seconds."""
    from dist_ft.data.batching.assemble import assemble_batch

    tokens = np.random.default_rng(0).integers(1, SHAPE["vocab_size"], TOKENS)
    batch = assemble_batch(
        tokens, np.ones(TOKENS, np.uint8), np.array([[0, 0, TOKENS, 0]]), np.zeros(1, np.int64), 0
    )
    start_s = time.perf_counter()
    engine.train_step([batch], [0], TOKENS, 1e-9)
    return time.perf_counter() - start_s


def report(result: dict[str, Any]) -> None:
    """Print the results."""
    rows = []
    for side, values in result["stall_s"].items():
        ratio = result["ours_over_copy"] if side == "ours" else result.get(f"{side}_over_ours")
        goal = ""
        if side == "ours":
            goal = harness.format_goal(ratio, GOAL_COPY, at_least=False)
        elif side == "torch.save":
            goal = harness.format_goal(ratio, GOAL_TORCH, at_least=True)
        rows.append((side, f"{statistics.median(values):.3f}", str(ratio or ""), goal))
    harness.print_table(
        f"B7 pause for a save of {result['state_bytes'] / 1e9:.2f} GB "
        "(ours: over a copy; peers: over ours)",
        ("side", "s", "ratio [95 %]", "goal"),
        rows,
    )
    for label, times in result["draining"].items():
        print(
            f"a step while a save is written, {label}: {statistics.median(times['busy_s']):.2f} s, "
            f"without a save {statistics.median(times['free_s']):.2f} s, "
            f"ratio {times['busy_over_free']:.3f} ({len(times['busy_s'])} steps)"
        )


if __name__ == "__main__":
    main()
