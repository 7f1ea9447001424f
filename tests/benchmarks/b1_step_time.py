"""B1: the time of a step. dist_ft / the bare DeepSpeed loop, and Hugging Face's Trainer / dist_ft.

    python tests/benchmarks/b1_step_time.py [--blocks N] [--steps N]

Model S, micro-batch 4 x 256, two ranks of one thread over gloo, float32, ZeRO-1 and ZeRO-3. Sides run
blocks of steps in turn in the same processes; the bare loop runs twice a round, as its own control. Last,
one block of dist_ft is profiled: how much of a step is spent outside DeepSpeed's forward, backward and
step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np
import workload

LENGTH, MICRO_BATCH, RANKS = 256, 4, 2
WARM_UP = 10
EPOCH_STEPS = 128
GOAL_BARE, GOAL_HF = 1.005, 1.10
SIDES = ("ours", "bare", "bare again")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--blocks", type=int, default=8, help="rounds of blocks for each ZeRO stage"
    )
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps a block")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3], help="ZeRO stages")
    parser.add_argument(
        "--hf-logging-steps",
        type=int,
        default=500,
        help="steps between log entries of Hugging Face's Trainer (dist_ft logs every step)",
    )
    parser.add_argument("--out", help="JSON file to write instead of results/b1_step_time.json")
    parser.add_argument("--rank-folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run both stages, print the table, write the JSON."""
    args = arguments()
    if args.rank_folder:
        rank_main(args, Path(args.rank_folder))
        return
    harness.one_thread()
    environment = harness.environment()
    results = {}
    with tempfile.TemporaryDirectory(prefix="dist_ft-b1-") as name:
        folder = Path(name)
        workload.make_model(folder / "model-s", "S")
        workload.make_texts(
            folder / "texts",
            np.full(EPOCH_STEPS * RANKS * MICRO_BATCH, LENGTH),
            workload.SHAPES["S"]["vocab_size"],
            seed=1,
        )
        for stage in args.stages:
            print(
                f"ZeRO-{stage}: {args.blocks} rounds of {args.steps} steps a side ...", flush=True
            )
            harness.run_ranks(
                __file__,
                [
                    "--blocks",
                    str(args.blocks),
                    "--steps",
                    str(args.steps),
                    "--stages",
                    str(stage),
                    "--hf-logging-steps",
                    str(args.hf_logging_steps),
                    "--rank-folder",
                    name,
                ],
                RANKS,
                folder / f"logs-{stage}",
                timeout_s=3600,
            )
            results[f"zero-{stage}"] = summarise(folder, stage)
    report(results, args)
    config = {
        "model": workload.SHAPES["S"],
        "micro_batch": MICRO_BATCH,
        "sequence_length": LENGTH,
        "ranks": RANKS,
        "threads_a_rank": 1,
        "dtype": "float32",
        "blocks": args.blocks,
        "steps": args.steps,
        "warm_up_steps": WARM_UP,
        "hf_logging_steps": args.hf_logging_steps,
    }
    harness.save("b1_step_time", config, environment, results, args.out)


def rank_main(args: argparse.Namespace, folder: Path) -> None:
    """Be one rank: run all sides in turn and write what was measured to `folder`."""
    import torch
    import torch.distributed as dist

    from dist_ft.config.load import load_config
    from dist_ft.core.world import World

    (stage,) = args.stages
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = World.from_environment()
    config = load_config(
        workload.run_config(
            folder,
            "S",
            name=f"zero-{stage}",
            train=str(folder / "texts" / "*.jsonl"),
            sequence_length=LENGTH,
            micro_batch=MICRO_BATCH,
            lanes=RANKS,
            steps=10**6,
            workers=RANKS,
            stage=stage,
        )
    )
    record = measure(args, config, world, folder)
    (folder / f"zero-{stage}-rank-{world.rank}.json").write_text(json.dumps(record))
    dist.destroy_process_group()


def measure(args: argparse.Namespace, config: Any, world: Any, folder: Path) -> dict[str, Any]:
    """Return seconds by side, block and step, CPU seconds by side and block, first losses, a profile."""
    import b1_sides as sides
    import torch.distributed as dist

    ours = sides.Ours(config, world)
    loader = ours.trainer.parts.loader
    bare = sides.Bare(config, sides.lane_tensors(loader, world.share(RANKS), EPOCH_STEPS))
    blocks = {"ours": ours.block, "bare": bare.block, "bare again": bare.block}
    seconds: dict[str, list[list[float]]] = {name: [] for name in (*SIDES, "hf")}
    cpu: dict[str, list[float]] = {name: [] for name in SIDES}
    losses: dict[str, float] = {}

    def between(step: int) -> None:
        """Warm up first; then make one round of the other sides before each block of Hugging Face's."""
        if step == 0:
            ours.block(1)
            bare.block(1)
            losses.update(ours=ours.trainer.loss, bare=sides.mean_over_ranks(float(bare.loss)))
            ours.block(WARM_UP)
            bare.block(WARM_UP)
        elif (step - WARM_UP) % args.steps == 0 and len(seconds["ours"]) < args.blocks:
            for name in harness.turns(SIDES, len(seconds["ours"])):
                dist.barrier()
                begun = time.process_time()
                seconds[name].append(blocks[name](args.steps))
                cpu[name].append(time.process_time() - begun)
            dist.barrier()

    total = WARM_UP + args.blocks * args.steps
    rows = sides.all_rows(loader, RANKS, min(total, EPOCH_STEPS)).repeat(
        -(-total // EPOCH_STEPS), 1
    )
    wall, used, losses["hf"] = sides.run_hugging_face(
        config, rows, folder / "hf", total, between, args.hf_logging_steps
    )
    starts = range(WARM_UP, total, args.steps)
    seconds["hf"] = [wall[start : start + args.steps] for start in starts]
    cpu["hf"] = [sum(used[start : start + args.steps]) for start in starts]
    if not max(losses.values()) - min(losses.values()) <= 2e-3:
        raise SystemExit(f"the sides do not do the same work: first losses {losses}")
    profile = profiled(ours, args.steps)
    ours.close()
    return {"seconds": seconds, "cpu": cpu, "losses": losses, "profile": profile}


class Timed:
    """Stands before an object and adds up the seconds some of its calls take."""

    def __init__(self, inner: Any, names: tuple[str, ...]) -> None:
        self._inner, self._names = inner, names
        self.calls: dict[str, list[float]] = {name: [] for name in names}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return self._clocked(name, found) if name in self._names else found

    def __call__(self, *values: Any, **named: Any) -> Any:
        return self._clocked("forward", self._inner)(*values, **named)

    def _clocked(self, name: str, call: Any) -> Any:
        def run(*values: Any, **named: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*values, **named)
            finally:
                self.calls[name].append(time.perf_counter() - begun)

        return run


def profiled(ours: Any, count: int) -> dict[str, list[float]]:
    """Return seconds of each call inside one block of ours, and of the block, by what was called."""
    parts = ours.trainer.parts
    engine, comms = parts.engine._engine, parts.collectives
    timed = parts.engine._engine = Timed(engine, ("forward", "backward", "step"))
    sums = Timed(comms, ("sum",))
    comms.sum = sums.sum
    total = sum(ours.block(count))
    del comms.sum
    parts.engine._engine = engine
    return {**timed.calls, "collectives": sums.calls["sum"], "block": [total]}


def summarise(folder: Path, stage: int) -> dict[str, Any]:
    """Return ratios and the overhead of a stage from what its ranks wrote.

    A block is over when its last rank is.
    """
    records = [
        json.loads((folder / f"zero-{stage}-rank-{rank}.json").read_text()) for rank in range(RANKS)
    ]
    total = {
        name: [
            max(blocks)
            for blocks in zip(
                *([sum(block) for block in record["seconds"][name]] for record in records),
                strict=True,
            )
        ]
        for name in records[0]["seconds"]
    }
    cpu = {
        name: [sum(both) for both in zip(*(record["cpu"][name] for record in records), strict=True)]
        for name in total
    }
    middle = {
        name: [float(np.median(block)) for block in records[0]["seconds"][name]] for name in total
    }
    pairs = {
        "ours / bare": ("ours", "bare"),
        "hf / ours": ("hf", "ours"),
        "bare / bare again": ("bare", "bare again"),
    }
    return {
        "step_s": {
            name: float(np.mean(values)) / len(records[0]["seconds"][name][0])
            for name, values in total.items()
        },
        "by_block_time": {
            name: harness.ratio(total[a], total[b]) for name, (a, b) in pairs.items()
        },
        "by_median_step": {
            name: harness.ratio(middle[a], middle[b]) for name, (a, b) in pairs.items()
        },
        "by_cpu_time": {name: harness.ratio(cpu[a], cpu[b]) for name, (a, b) in pairs.items()},
        "block_s": total,
        "first_losses": records[0]["losses"],
        "profile": overhead([record["profile"] for record in records]),
    }


def overhead(profiles: list[dict[str, list[float]]]) -> dict[str, float]:
    """Return milliseconds a step outside forward, backward and step, as the median over a block's steps.

    Of a small all-reduce the rank that comes last waits least: the shorter of both times is what it costs;
    the longer is waiting, which DeepSpeed's next collective would do otherwise.
    """
    steps = len(profiles[0]["step"])
    inside = [
        sum(sum(profile[name]) for name in ("forward", "backward", "step")) for profile in profiles
    ]
    reduce_s = float(np.minimum(*(np.array(profile["collectives"]) for profile in profiles)).sum())
    own = [
        profile["block"][0] - within - sum(profile["collectives"])
        for profile, within in zip(profiles, inside, strict=True)
    ]
    step_s = max(profile["block"][0] for profile in profiles) / steps
    result = {
        "step_ms": step_s * 1e3,
        "all_reduces_ms": reduce_s / steps * 1e3,
        **{f"own_work_rank_{rank}_ms": value / steps * 1e3 for rank, value in enumerate(own)},
    }
    result["overhead_share"] = (max(own) + reduce_s) / steps / step_s
    return result


def report(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Print what was measured."""
    rows: list[tuple[str, ...]] = []
    goals = {"ours / bare": (GOAL_BARE, False), "hf / ours": (GOAL_HF, True)}
    for stage, result in results.items():
        for name, measured in result["by_block_time"].items():
            goal = goals.get(name)
            rows.append(
                (
                    f"{stage}: {name}",
                    str(measured),
                    str(result["by_median_step"][name]),
                    str(result["by_cpu_time"][name]),
                    harness.reached(measured, goal[0], at_least=goal[1]) if goal else "control",
                )
            )
    harness.show(
        f"B1 step time, {args.blocks} rounds of {args.steps} steps: ratio [95 % interval]",
        ("ratio", "time of blocks", "median steps", "CPU time", "goal (time of blocks)"),
        rows,
    )
    times = [
        (
            stage,
            *(f"{result['step_s'][name] * 1e3:.1f}" for name in (*SIDES, "hf")),
            f"{max(v for k, v in result['profile'].items() if k.startswith('own')):.2f}",
            f"{result['profile']['all_reduces_ms']:.2f}",
            f"{result['profile']['overhead_share']:.2%}",
        )
        for stage, result in results.items()
    ]
    harness.show(
        "milliseconds a step, and what of ours is outside forward, backward and step",
        ("", "ours", "bare", "again", "hf", "own work", "all-reduces", "share"),
        times,
    )


if __name__ == "__main__":
    main()
