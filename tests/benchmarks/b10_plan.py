"""B10: peak memory of a rank, measured / what `dist-ft plan` predicted.

    python tests/benchmarks/b10_plan.py

Model M, float32, micro-batch 2 x 512, two lanes a rank, ZeRO-1, 2 and 3 on 1, 2 and 4 real ranks over gloo, the run's own
DeepSpeed config. *Measured* is the bytes of all tensors there are when a lane (or the update) begins and what torch's
allocator gives out at most beyond that until it ends (torch's memory profiler), over two steps, on the busiest rank: what
`torch.cuda.max_memory_allocated` tells on a GPU. (The profiler's own sum is no measure over longer stretches: it misses what
gloo's threads free, 225 MiB a lane here.) *Resident* is how far the process itself grew (VmHWM), with its imports, gloo and
the profiler. *Predicted* is made from the config and the model's config.json alone.
"""

from __future__ import annotations

import argparse
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
"""Steps at the end that are measured; the ones before make what is made once."""


def main() -> None:
    """Measure, print the table, write the JSON; or be a rank of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--lanes", type=int, default=LANES, help="a rank")
    parser.add_argument("--shape", default="M", choices=sorted(workload.SHAPES))
    parser.add_argument(
        "--add", action="store_true", help="keep the cells a file of results has already"
    )
    parser.add_argument("--out", help="JSON file to write instead of results/b10_plan.json")
    parser.add_argument(
        "--predict", action="store_true", help="predict anew beside what a file of results measured"
    )
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        return be_rank(args)
    harness.require_one_thread()
    environment, cells = (
        harness.describe_environment(),
        earlier(args) if args.add or args.predict else [],
    )
    with tempfile.TemporaryDirectory(prefix="dist_ft-b10-") as name:
        workload.make_model(Path(name) / f"model-{args.shape.lower()}", args.shape)
        for stage, world in ((stage, world) for stage in args.stages for world in args.worlds):
            old = next(
                (
                    cell["ranks"]
                    for cell in cells
                    if (cell["stage"], cell["world"]) == (stage, world)
                ),
                None,
            )
            if args.predict and old is None:
                continue
            found = beside(
                args,
                Path(name),
                stage,
                world,
                old if args.predict else measure(args, Path(name), stage, world),
            )
            cells = [cell for cell in cells if (cell["stage"], cell["world"]) != (stage, world)] + [
                found
            ]
            cells.sort(key=lambda cell: (cell["stage"], cell["world"]))
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
            print(f"ZeRO-{stage} on {world}: {found['ratio']:.4f}", file=sys.stderr, flush=True)
    report(cells)


def earlier(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the cells of a file that is there."""
    file = Path(args.out) if args.out else harness.RESULTS / "b10_plan.json"
    return json.loads(file.read_text())["result"]["cells"] if file.exists() else []


def config_of(args: argparse.Namespace, folder: Path, stage: int, world: int) -> Any:
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
    given = [
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
    harness.run_ranks(__file__, given, world, part, 280)
    return [json.loads((part / f"{rank}.json").read_text()) for rank in range(world)]


def beside(
    args: argparse.Namespace, folder: Path, stage: int, world: int, ranks: list[dict[str, int]]
) -> dict[str, Any]:
    """Return the peaks of all ranks beside what was predicted."""
    from dist_ft.planning import worker_memory
    from dist_ft.runtime.preflight import run_plan

    config = config_of(args, folder, stage, world)
    plan = run_plan.plan(config)
    row = next(row for row in plan["memory"] if row["chosen"])
    busiest = max(rank["allocated"] for rank in ranks)
    assert worker_memory.worker_setup(config, {}, world).lanes == args.lanes
    return {
        "stage": stage,
        "world": world,
        "predicted": row["total"],
        "kinds": row["gpu"],
        "when": row["when"],
        "measured": busiest,
        "ranks": ranks,
        "ratio": busiest / row["total"],
    }


def be_rank(args: argparse.Namespace) -> None:
    """Train a few steps and write down the peaks of the last ones."""
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
    config = config_of(args, folder, stage, world.num_ranks)
    assert deepspeed_config.build_deepspeed_config(config)["zero_optimization"]["stage"] == stage
    random = np.random.default_rng(world.rank)
    (torch.ones(64, 64) @ torch.ones(64, 64)).sum()
    before = memory("VmRSS")
    spans = Spans()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        built = build_engine(ResolvedRun.from_config(config), world, resumed=False)
        module, engine = built.module, built.engine
        module.register_forward_pre_hook(lambda *_: spans.begin())
        for step in range(STEPS):
            if step == STEPS - COUNTED:
                Path("/proc/self/clear_refs").write_text(
                    "5"
                )  # the high-water mark starts from what is held now
                spans.counts = True
            lanes = [
                batch(random, workload.SHAPES[args.shape]["vocab_size"]) for _ in range(args.lanes)
            ]
            engine.accumulate(
                lanes, list(range(args.lanes)), args.lanes * world.num_ranks * ROWS * TOKENS
            )
            spans.begin()
            engine.update(1e-4)
        spans.end()
    found = {
        "spans": [held + more for held, more in zip(spans.held, most_beyond(profile), strict=True)]
    }
    found |= {"allocated": max(found["spans"]), "resident": memory("VmHWM") - before}
    (folder / f"part-{stage}-{world.num_ranks}" / f"{world.rank}.json").write_text(
        json.dumps(found)
    )
    dist.barrier()


def batch(random: np.random.Generator, vocabulary: int) -> Any:
    """Return a full micro-batch, each row one sample."""
    from dist_ft.data.batch import Batch

    ids = random.integers(1, vocabulary, (ROWS, TOKENS))
    return Batch(
        ids, ids, np.tile(np.arange(TOKENS), (ROWS, 1)), np.zeros((0, 4), dtype=np.int64), 0
    )


class Spans:
    """Lanes and updates, each from what all tensors hold when it begins."""

    def __init__(self) -> None:
        self.counts = False
        self.held: list[int] = []
        self._open: Any = None

    def begin(self) -> None:
        """Begin the next one."""
        import torch

        self.end()
        if self.counts:
            self.held.append(held_bytes())
            self._open = torch.profiler.record_function("counted")
            self._open.__enter__()

    def end(self) -> None:
        """End the one under way."""
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None


def held_bytes() -> int:
    """Return the bytes of all tensors there are, each storage once."""
    import gc

    import torch

    gc.collect()
    found = [
        thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)
    ]
    found += [
        one.grad for one in found if one.is_leaf and one.grad is not None
    ]  # which Python may not know yet
    storages = {
        one.untyped_storage()._cdata: one.untyped_storage().nbytes()
        for one in found
        if one.device.type == "cpu"
    }
    return sum(storages.values())


def most_beyond(profile: Any) -> list[int]:
    """Return the most bytes torch's allocator gave out during each span beyond what it had before it."""
    events = profile.kineto_results.events()
    moves = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.name() == "counted"
    )
    at, held = np.array([time for time, _ in moves]), np.cumsum([size for _, size in moves])
    most = []
    for start, end in spans:
        first, last = np.searchsorted(at, start), np.searchsorted(at, end)
        most.append(int(held[first - 1 : last].max() - held[first - 1]))
    return most


def memory(field: str) -> int:
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
