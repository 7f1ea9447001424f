"""B1: step time of dist_ft / a bare DeepSpeed loop, and of Hugging Face's Trainer / dist_ft.

    python tests/benchmarks/b1_step_time.py [--blocks N] [--steps N]

Model S, micro-batch 4 x 256, two ranks of one thread over gloo, float32, ZeRO-1 and ZeRO-3. The
sides run blocks of steps alternately in the same processes. The bare loop runs twice a round, as
its own control. At the end, one block of dist_ft is profiled: how much of a step is spent outside
DeepSpeed's forward, backward and step.
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


def parse_arguments() -> argparse.Namespace:
    """Return the command line arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--blocks", type=int, default=8, help="rounds of blocks for each ZeRO stage"
    )
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps per block")
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
    """Measure each ZeRO stage, print the tables, write the JSON file."""
    args = parse_arguments()
    if args.rank_folder:
        run_rank(args, Path(args.rank_folder))
        return
    harness.require_one_thread()
    environment = harness.describe_environment()
    results = {}
    with tempfile.TemporaryDirectory(prefix="dist_ft-b1-") as name:
        folder = Path(name)
        workload.make_model(folder / "model-s", "S")
        workload.make_data(
            folder / "texts",
            np.full(EPOCH_STEPS * RANKS * MICRO_BATCH, LENGTH),
            workload.SHAPES["S"]["vocab_size"],
            seed=1,
        )
        for stage in args.stages:
            print(
                f"ZeRO-{stage}: {args.blocks} rounds of {args.steps} steps per side ...", flush=True
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
            results[f"zero-{stage}"] = summarize(folder, stage)
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
    harness.save_results("b1_step_time", config, environment, results, args.out)


def run_rank(args: argparse.Namespace, folder: Path) -> None:
    """Run all sides on one rank and write the measurements to `folder`."""
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
    """Measure all sides on this rank.

    Returns:
        `seconds` by side, block and step; `cpu` seconds by side and block; the first `losses` by
        side; a `profile` of one block of dist_ft.
    """
    import b1_sides as sides
    import torch.distributed as dist

    ours = sides.Ours(config, world)
    loader = ours.trainer.components.loader
    bare = sides.Bare(config, sides.lane_tensors(loader, world.share(RANKS), EPOCH_STEPS))
    blocks = {"ours": ours.block, "bare": bare.block, "bare again": bare.block}
    seconds: dict[str, list[list[float]]] = {name: [] for name in (*SIDES, "hf")}
    cpu: dict[str, list[float]] = {name: [] for name in SIDES}
    losses: dict[str, float] = {}

    def between(step: int) -> None:
        """Run one round of the other sides before each block of Hugging Face's; first warm up."""
        if step == 0:
            ours.block(1)
            bare.block(1)
            losses.update(ours=ours.trainer.loss, bare=sides.mean_over_ranks(float(bare.loss)))
            ours.block(WARM_UP)
            bare.block(WARM_UP)
        elif (step - WARM_UP) % args.steps == 0 and len(seconds["ours"]) < args.blocks:
            for name in harness.side_order(SIDES, len(seconds["ours"])):
                dist.barrier()
                start_s = time.process_time()
                seconds[name].append(blocks[name](args.steps))
                cpu[name].append(time.process_time() - start_s)
            dist.barrier()

    total = WARM_UP + args.blocks * args.steps
    rows = sides.all_rows(loader, RANKS, min(total, EPOCH_STEPS)).repeat(
        -(-total // EPOCH_STEPS), 1
    )
    times = sides.run_hugging_face(
        config, rows, folder / "hf", total, between, args.hf_logging_steps
    )
    losses["hf"] = times.first_loss
    starts = range(WARM_UP, total, args.steps)
    seconds["hf"] = [times.wall_s[start : start + args.steps] for start in starts]
    cpu["hf"] = [sum(times.cpu_s[start : start + args.steps]) for start in starts]
    if not max(losses.values()) - min(losses.values()) <= 2e-3:
        raise SystemExit(f"the sides do not do the same work: first losses {losses}")
    profile = profile_block(ours, args.steps)
    ours.close()
    return {"seconds": seconds, "cpu": cpu, "losses": losses, "profile": profile}


class TimedCalls:
    """Wraps an object and records the seconds of each call of some of its methods.

    Attributes:
        calls: seconds of each call, by method.
    """

    def __init__(self, inner: Any, names: tuple[str, ...]) -> None:
        self._inner, self._names = inner, names
        self.calls: dict[str, list[float]] = {name: [] for name in names}

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._inner, name)
        return self._timed(name, attribute) if name in self._names else attribute

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._timed("forward", self._inner)(*args, **kwargs)

    def _timed(self, name: str, call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            start_s = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.calls[name].append(time.perf_counter() - start_s)

        return run


def profile_block(ours: Any, count: int) -> dict[str, list[float]]:
    """Return the seconds of each call in one block of dist_ft by method, and of the whole block."""
    components = ours.trainer.components
    engine, comms = components.engine._engine, components.collectives
    timed_engine = components.engine._engine = TimedCalls(engine, ("forward", "backward", "step"))
    timed_comms = TimedCalls(comms, ("sum",))
    comms.sum = timed_comms.sum

    block_s = sum(ours.block(count))

    del comms.sum
    components.engine._engine = engine
    return {**timed_engine.calls, "collectives": timed_comms.calls["sum"], "block": [block_s]}


def summarize(folder: Path, stage: int) -> dict[str, Any]:
    """Return the ratios and the overhead of a ZeRO stage from the measurements of its ranks.

    A block ends when its last rank has ended.
    """
    records = [
        json.loads((folder / f"zero-{stage}-rank-{rank}.json").read_text()) for rank in range(RANKS)
    ]
    block_s: dict[str, list[float]] = {}
    cpu_s: dict[str, list[float]] = {}
    median_s: dict[str, list[float]] = {}
    for name, first_rank in records[0]["seconds"].items():
        by_rank = [[sum(block) for block in record["seconds"][name]] for record in records]
        block_s[name] = [max(ranks) for ranks in zip(*by_rank, strict=True)]
        cpu_by_rank = [record["cpu"][name] for record in records]
        cpu_s[name] = [sum(ranks) for ranks in zip(*cpu_by_rank, strict=True)]
        median_s[name] = [float(np.median(block)) for block in first_rank]

    pairs = {
        "ours / bare": ("ours", "bare"),
        "hf / ours": ("hf", "ours"),
        "bare / bare again": ("bare", "bare again"),
    }
    return {
        "step_s": {
            name: float(np.mean(values)) / len(records[0]["seconds"][name][0])
            for name, values in block_s.items()
        },
        "by_block_time": {
            name: harness.ratio(block_s[a], block_s[b]) for name, (a, b) in pairs.items()
        },
        "by_median_step": {
            name: harness.ratio(median_s[a], median_s[b]) for name, (a, b) in pairs.items()
        },
        "by_cpu_time": {name: harness.ratio(cpu_s[a], cpu_s[b]) for name, (a, b) in pairs.items()},
        "block_s": block_s,
        "first_losses": records[0]["losses"],
        "profile": overhead([record["profile"] for record in records]),
    }


def overhead(profiles: list[dict[str, list[float]]]) -> dict[str, float]:
    """Return milliseconds per step outside forward, backward and step, averaged over a block.

    A small all-reduce costs the shorter of the two ranks' times: the rank that arrives last waits
    least. The rest of the longer time is waiting that would otherwise happen in DeepSpeed's next
    collective.
    """
    steps = len(profiles[0]["step"])
    shorter = np.minimum(*(np.array(profile["collectives"]) for profile in profiles))
    reduce_s = float(shorter.sum())
    own_s = []
    for profile in profiles:
        deepspeed_s = sum(sum(profile[name]) for name in ("forward", "backward", "step"))
        own_s.append(profile["block"][0] - deepspeed_s - sum(profile["collectives"]))

    step_s = max(profile["block"][0] for profile in profiles) / steps
    result = {
        "step_ms": step_s * 1e3,
        "all_reduces_ms": reduce_s / steps * 1e3,
        **{f"own_work_rank_{rank}_ms": value / steps * 1e3 for rank, value in enumerate(own_s)},
    }
    result["overhead_share"] = (max(own_s) + reduce_s) / steps / step_s
    return result


def report(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the results."""
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
                    harness.format_goal(measured, goal[0], at_least=goal[1]) if goal else "control",
                )
            )
    harness.print_table(
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
    harness.print_table(
        "milliseconds per step; own work is outside forward, backward and step",
        ("", "ours", "bare", "again", "hf", "own work", "all-reduces", "share"),
        times,
    )


if __name__ == "__main__":
    main()
