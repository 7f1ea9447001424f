"""B10: peak memory of a rank, measured / predicted by `dist-ft plan`.

    python tests/benchmarks/b10_plan.py

Model M, float32, micro-batch 2 x 512, two lanes per rank, ZeRO-1, 2 and 3 on 1, 2 and 4 real ranks
over gloo, with the run's own DeepSpeed config. *Measured* is the bytes of all tensors at the start
of a lane (or of the update), plus the most that torch's allocator allocates beyond that until its
end (torch's memory profiler); the maximum over two steps, on the rank with the largest peak. On a
GPU, `torch.cuda.max_memory_allocated` reports this. (The profiler's own sum is wrong over longer
intervals: it misses the memory that gloo's threads free, 225 MiB per lane here.) *Resident* is the
growth of the process (VmHWM), with its imports, gloo and the profiler. *Predicted* is computed from
the config and the model's config.json alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import numpy as np
import workload

LOW, HIGH = 0.95, 1.05
ROWS, TOKENS, LANES, STEPS = 2, 512, 2, 3
COUNTED = 2
"""Steps at the end that are measured; earlier steps allocate what is allocated once."""


def main() -> None:
    """Measure, print the table, write the JSON file; with --rank: run one rank."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--lanes", type=int, default=LANES, help="lanes per rank")
    parser.add_argument("--shape", default="M", choices=sorted(workload.SHAPES))
    parser.add_argument(
        "--add", action="store_true", help="keep the other cells of an existing results file"
    )
    parser.add_argument("--out", help="JSON file to write instead of results/b10_plan.json")
    parser.add_argument(
        "--predict",
        action="store_true",
        help="predict again for the measurements of an existing results file",
    )
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        return run_rank(args)
    harness.require_one_thread()
    environment = harness.describe_environment()
    cells = read_cells(args) if args.add or args.predict else []
    with tempfile.TemporaryDirectory(prefix="dist_ft-b10-") as name:
        workload.make_model(Path(name) / f"model-{args.shape.lower()}", args.shape)
        for stage, world in itertools.product(args.stages, args.worlds):
            by_key = {(cell["stage"], cell["world"]): cell for cell in cells}
            if args.predict:
                if (stage, world) not in by_key:
                    continue
                ranks = by_key[stage, world]["ranks"]
            else:
                ranks = measure(args, Path(name), stage, world)

            cell = compare(args, Path(name), stage, world, ranks)
            by_key[stage, world] = cell
            cells = [by_key[key] for key in sorted(by_key)]
            harness.save_results(
                "b10_plan",
                {
                    "shape": args.shape,
                    "micro_batch": ROWS,
                    "sequence_length": TOKENS,
                    "lanes": args.lanes,
                    "steps": STEPS,
                    "dtype": "float32",
                },
                environment,
                {"cells": cells},
                args.out,
            )
            print(f"ZeRO-{stage} on {world}: {cell['ratio']:.4f}", file=sys.stderr, flush=True)
    report(cells)


def read_cells(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the cells of an existing results file; none without a file."""
    file = Path(args.out) if args.out else harness.RESULTS / "b10_plan.json"
    if not file.exists():
        return []
    return json.loads(file.read_text())["result"]["cells"]


def load_run_config(args: argparse.Namespace, folder: Path, stage: int, world: int) -> Any:
    """Return the run's config."""
    from dist_ft.config.load import load_config

    return load_config(
        workload.run_config(
            folder,
            args.shape,
            name="b10",
            train="unused.jsonl",
            sequence_length=TOKENS,
            micro_batch=ROWS,
            lanes=args.lanes * world,
            steps=STEPS,
            workers=world,
            stage=stage,
        )
    )


def measure(args: argparse.Namespace, folder: Path, stage: int, world: int) -> list[dict[str, int]]:
    """Return the peaks of all ranks."""
    part = folder / f"part-{stage}-{world}"
    options = [
        "--rank",
        str(folder),
        "--stages",
        str(stage),
        "--worlds",
        str(world),
        "--lanes",
        str(args.lanes),
        "--shape",
        args.shape,
    ]
    harness.run_ranks(__file__, options, world, part, 280)
    return [json.loads((part / f"{rank}.json").read_text()) for rank in range(world)]


def compare(
    args: argparse.Namespace, folder: Path, stage: int, world: int, ranks: list[dict[str, int]]
) -> dict[str, Any]:
    """Return a cell: the peaks of all ranks and the prediction."""
    from dist_ft.planning import worker_memory
    from dist_ft.runtime.preflight import run_plan

    config = load_run_config(args, folder, stage, world)
    plan = run_plan.plan(config)
    row = next(row for row in plan["memory"] if row["chosen"])
    measured = max(rank["allocated"] for rank in ranks)
    assert worker_memory.worker_setup(config, {}, world).lanes == args.lanes
    return {
        "stage": stage,
        "world": world,
        "predicted": row["total"],
        "kinds": row["gpu"],
        "when": row["when"],
        "measured": measured,
        "ranks": ranks,
        "ratio": measured / row["total"],
    }


def run_rank(args: argparse.Namespace) -> None:
    """Train a few steps and write the peaks of the last ones."""
    import torch
    import torch.distributed as dist

    from dist_ft.config.resolved_run import ResolvedRun
    from dist_ft.core.world import World
    from dist_ft.engine import deepspeed_config
    from dist_ft.engine import deepspeed_engine as sharded
    from dist_ft.runtime.bootstrap.build_model import build_engine

    dist.init_process_group("gloo")
    sharded.attach_to_process_group(False)
    world = World.from_environment()
    folder, stage = Path(args.rank), args.stages[0]
    config = load_run_config(args, folder, stage, world.num_ranks)
    assert deepspeed_config.build_deepspeed_config(config)["zero_optimization"]["stage"] == stage
    random = np.random.default_rng(world.rank)
    (torch.ones(64, 64) @ torch.ones(64, 64)).sum()
    before = process_memory("VmRSS")
    spans = Spans()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        built = build_engine(ResolvedRun.from_config(config), world, resumed=False)
        module, engine = built.module, built.engine
        module.register_forward_pre_hook(lambda *_: spans.start())
        for step in range(STEPS):
            if step == STEPS - COUNTED:
                # reset the peak to the current memory
                Path("/proc/self/clear_refs").write_text("5")
                spans.is_counting = True
            lanes = [
                batch(random, workload.SHAPES[args.shape]["vocab_size"]) for _ in range(args.lanes)
            ]
            engine.accumulate(
                lanes, list(range(args.lanes)), args.lanes * world.num_ranks * ROWS * TOKENS
            )
            spans.start()
            engine.update(1e-4)
        spans.end()
    growth = max_growth(profile)
    peaks = [held + grown for held, grown in zip(spans.held, growth, strict=True)]
    result = {
        "spans": peaks,
        "allocated": max(peaks),
        "resident": process_memory("VmHWM") - before,
    }
    (folder / f"part-{stage}-{world.num_ranks}" / f"{world.rank}.json").write_text(
        json.dumps(result)
    )
    dist.barrier()


def batch(random: np.random.Generator, vocabulary: int) -> Any:
    """Return a full micro-batch; each row is one sample."""
    from dist_ft.data.batch import Batch

    ids = random.integers(1, vocabulary, (ROWS, TOKENS))
    return Batch(
        ids, ids, np.tile(np.arange(TOKENS), (ROWS, 1)), np.zeros((0, 4), dtype=np.int64), 0
    )


class Spans:
    """Marks lanes and updates in the profile.

    Attributes:
        is_counting: whether spans are recorded.
        held: bytes of all tensors at the start of each span.
    """

    def __init__(self) -> None:
        self.is_counting = False
        self.held: list[int] = []
        self._open: Any = None

    def start(self) -> None:
        """End the current span and start the next."""
        import torch

        self.end()
        if self.is_counting:
            self.held.append(held_bytes())
            self._open = torch.profiler.record_function("counted")
            self._open.__enter__()

    def end(self) -> None:
        """End the current span, if there is one."""
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None


def held_bytes() -> int:
    """Return the bytes of all tensors of this process; each storage counts once."""
    import gc

    import torch

    gc.collect()
    tensors = [
        item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)
    ]
    # a gradient may have no Python object yet
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor.device.type == "cpu"
    }
    return sum(storages.values())


def max_growth(profile: Any) -> list[int]:
    """Return the largest growth of allocated bytes during each span, from its start."""
    events = profile.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.name() == "counted"
    )
    at, held = np.array([time for time, _ in changes]), np.cumsum([size for _, size in changes])
    growth = []
    for start, end in spans:
        first, last = np.searchsorted(at, start), np.searchsorted(at, end)
        growth.append(int(held[first - 1 : last].max() - held[first - 1]))
    return growth


def process_memory(field: str) -> int:
    """Return a field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def report(cells: list[dict[str, Any]]) -> None:
    """Print the results."""

    def mib(size: float) -> str:
        return f"{size / 2**20:,.0f}"

    rows = [
        (
            f"ZeRO-{cell['stage']}, {cell['world']} rank{'s' if cell['world'] > 1 else ''}",
            mib(cell["predicted"]),
            cell["when"],
            mib(cell["measured"]),
            mib(max(rank["resident"] for rank in cell["ranks"])),
            f"{cell['ratio']:.3f}",
            "reached" if LOW <= cell["ratio"] <= HIGH else "missed",
        )
        for cell in cells
    ]
    harness.print_table(
        "B10 peak memory of a rank, MiB",
        ("", "predicted", "at", "measured", "resident", "measured / predicted", f"{LOW} to {HIGH}"),
        rows,
    )


if __name__ == "__main__":
    main()
