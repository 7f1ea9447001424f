"""What a selftest runs, and what it makes of it. Pure: no process, no storage.

All runs learn the same small model from the same data. `plain` is one process without Ray and DeepSpeed; what every
other run must equal. Held means: within 1e-5 of it in every loss, and to the last bit where workers were killed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal

from dist_ft.config.schema import RunConfig
from dist_ft.planning.gpus import peak_tflops
from dist_ft.selftest.drill_scenarios import Evidence, Scenario, problems, scenarios
from dist_ft.selftest.materials import Size

CHECKS = ("parity", "collective", "resume", "throughput")
TOLERANCE = 1e-5
"""Of a loss, in float32 (promises 3 and 7 of the design)."""
STAGES = (1, 2, 3)
CPU_SIZE = Size(256, 4, 704, 4, 256)
GPU_SIZES = (
    Size(2048, 16, 5632, 16, 1024, dtype="bfloat16"),
    Size(1024, 24, 2816, 16, 1024, dtype="bfloat16"),
    Size(768, 12, 2048, 12, 1024, dtype="bfloat16"),
)
"""0.8, 0.3 and 0.08 billion weights; the first that fits is taken."""
STATE_BYTES, ROOM_BYTES = 18, 6 * 2**30
"""Bytes a weight of mixed-precision training with AdamW, over all workers; and for activations on each."""
SPEED, MICRO_BATCH = "speed", 4

Verdict = Literal["held", "FAILED", "not run"]


@dataclass(frozen=True)
class Finding:
    """What came of one check: `figures` are numbers by name (units in the names), `problems` lines for people."""

    check: str
    name: str
    verdict: Verdict
    seen: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def plan(workers: int, checks: Sequence[str]) -> list[Scenario]:
    """Return the runs that `checks` need, in order; the speed run is not among them (`speed`)."""
    found = {"plain": _run("plain", "one process, plain PyTorch", workers=0)}
    found |= {
        f"zero-{stage}": _run(f"zero-{stage}", f"{workers} Ray workers, ZeRO-{stage}", stage)
        for stage in STAGES
    }
    named = {one.name: one for one in scenarios(workers)}
    found["killed"] = replace(named["death"], name="killed", changes=found["zero-3"].changes)
    found["resized"] = replace(
        named["preemption"],
        name="resized",
        changes=found["zero-3"].changes,
        what=f"{workers} workers are stopped (SIGTERM), {other_number(workers)} go on"
        if workers > 1
        else "1 worker is stopped (SIGTERM), one process without DeepSpeed goes on",
    )
    needed = {
        "parity": tuple(found)[:4],
        "collective": ("zero-3",),
        "resume": ("zero-3", "killed", "resized"),
        "throughput": ("zero-3",),
    }
    return [one for name, one in found.items() if any(name in needed[check] for check in checks)]


def other_number(workers: int) -> int:
    """Return the number of workers that a run of `workers` goes on with: one fewer (0: one process)."""
    return workers - 1


def resized(scenario: Scenario, workers: int) -> Scenario:
    """Return what the second command of the run `resized` is."""
    cluster = {**scenario.changes.get("cluster", {}), "workers": other_number(workers)}
    return replace(scenario, changes={**scenario.changes, "cluster": cluster})


def _run(name: str, what: str, stage: int = 3, workers: int | None = None) -> Scenario:
    cluster = {"network_check": "on"} if workers is None else {"workers": workers}
    return Scenario(
        name,
        what,
        changes={
            "model": {"dtype": "float32", "activation_checkpointing": False},
            "cluster": cluster,
            "zero": {
                "stage": stage,
                "offload_optimizer": "none",
                "offload_param": "none",
                "nvme_path": None,
            },
        },
    )


def size_for(machines: Sequence[Mapping[str, Any]], workers: int) -> Size:
    """Return the model whose speed is measured: on GPUs the largest that surely fits the smallest of them."""
    memory = [gpu["memory_gib"] * 2**30 for machine in machines for gpu in machine.get("gpus", ())]
    if not memory:
        return CPU_SIZE
    return next(
        (
            size
            for size in GPU_SIZES
            if STATE_BYTES * size.num_parameters / max(1, workers) + ROOM_BYTES < min(memory)
        ),
        GPU_SIZES[-1],
    )


def speed(base: RunConfig, place: str, size: Size) -> Scenario:
    """Return the run whose speed is measured: by the config's own zero section, without checkpoints."""
    micro = MICRO_BATCH if size.dtype == "bfloat16" else 1
    return Scenario(
        SPEED,
        f"{size.num_parameters / 1e6:,.0f} million weights, {size.dtype}",
        changes={
            "model": {"path": f"{place}/{SPEED}-model", "dtype": size.dtype, "attention": "sdpa"},
            "data": {
                "train": f"{place}/texts/*.jsonl",
                "format": "text",
                "overlong": "split",
                "block_mib": 1,
            },
            "batch": {
                "global_batch": 2 * base.min_workers * micro,
                "micro_batch": micro,
                "sequence_length": size.length,
            },
            "checkpoint": {"every_steps": 0, "at_end": False},
            "cluster": {"network_check": "off"},
        },
    )


def judge(
    name: str, workers: int, ran: Mapping[str, Evidence], planned: Sequence[Scenario]
) -> Finding:
    """Return what a run shows (`name`: of one of `planned` but plain and speed), held against the run it must equal."""
    scenario = next(one for one in planned if one.name == name)
    check = "resume" if name in ("killed", "resized") else "parity"
    against = "zero-3" if check == "resume" else "plain"
    if name not in ran or against not in ran:
        return Finding(check, name, "not run", scenario.what)
    found, wanted = ran[name].losses, ran[against].losses
    wrong = problems(scenario, ran[name], wanted if name == "killed" else found)
    most = difference(found, wanted)
    if name != "killed" and not wrong and not most <= TOLERANCE:
        wrong.append(
            f"losses differ by up to {most:.2e} from those of {against}; at most {TOLERANCE:g} is right"
        )
    seen = f"losses {'equal to the last bit' if most == 0 else f'differ by at most {most:.1e}'} ({against})"
    figures = {"largest_difference": most} if math.isfinite(most) else {}
    return Finding(
        check,
        name,
        "FAILED" if wrong else "held",
        f"{scenario.what}: {seen}",
        figures,
        tuple(wrong),
    )


def difference(
    found: Sequence[tuple[int, float | None]], wanted: Sequence[tuple[int, float | None]]
) -> float:
    """Return the largest difference of two runs' losses; infinity if their steps differ or one is no number."""
    if [step for step, _ in found] != [step for step, _ in wanted] or not found:
        return math.inf
    pairs = [(one, other) for (_, one), (_, other) in zip(found, wanted, strict=True)]
    return max(
        math.inf if one is None or other is None else abs(one - other) for one, other in pairs
    )


def judge_network(network: Mapping[str, Any] | None) -> list[Finding]:
    """Return what the network check of the run zero-3 found."""
    if network is None:
        return [
            Finding(
                "collective",
                "all-reduce",
                "FAILED",
                problems=(
                    "the run zero-3 kept no network.json: the check found wrong bytes, or did not end; see its log",
                ),
            )
        ]
    if not network["sums"]:
        return [
            Finding("collective", "all-reduce", "not run", "one worker has nobody to add up with")
        ]
    figures = {
        f"{one['num_bytes'] / 2**20:g}_mib_{what}": one[what]
        for one in network["sums"]
        for what in ("seconds", "mb_s")
    }
    large = network["sums"][-1]
    findings = [
        Finding(
            "collective",
            "all-reduce",
            "held",
            (
                f"{network['backend']}: exact over {network['world_size']} workers; {large['num_bytes'] / 2**20:g} MiB in "
                f"{1000 * large['seconds']:.1f} ms, {large['mb_s']:,.0f} MB/s a worker"
            ),
            figures,
        )
    ]
    if network["links"]:
        speeds = [link["mb_s"] for link in network["links"]]
        findings.append(
            Finding(
                "collective",
                "pairs of nodes",
                "FAILED" if network["slow"] else "held",
                (f"{len(speeds)} pairs, {min(speeds):,.0f} to {max(speeds):,.0f} MB/s each way"),
                {"least_mb_s": min(speeds), "most_mb_s": max(speeds)},
                tuple(network["slow"]),
            )
        )
    return findings


def judge_speed(
    scenario: Scenario,
    evidence: Evidence,
    lines: Sequence[Mapping[str, Any]],
    size: Size,
    machines: Sequence[Mapping[str, Any]],
    workers: int,
) -> Finding:
    """Return how fast the run `speed` was: medians of the second half of its steps.

    It commits nothing, so there is no ledger to be held against; its `lines` of metrics say which steps it took.
    """
    steps = [line for line in lines if line.get("kind") == "train"]
    losses, late = tuple((line["step"], line["loss"]) for line in steps), steps[len(steps) // 2 :]
    wrong = problems(scenario, replace(evidence, losses=losses, ledger="", damaged=()), losses)
    if not wrong and not (
        steps[0]["loss"] and steps[-1]["loss"] and steps[-1]["loss"] < steps[0]["loss"]
    ):
        wrong.append(
            f"the loss did not fall: {steps[0]['loss']} at step 1, {steps[-1]['loss']} at the last"
        )
    if wrong:
        return Finding("throughput", SPEED, "FAILED", scenario.what, problems=tuple(wrong))
    tokens_per_s = median(line["tokens_per_s"] for line in late)
    figures = {
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_a_worker": tokens_per_s / workers,
        "step_s": median(line["step_s"] for line in late),
        "data_wait_s": median(line["data_wait_s"] for line in late),
        "tflops_a_worker": tokens_per_s * size.flops_a_token / workers / 1e12,
        "num_parameters": float(size.num_parameters),
    }
    memory = max((line.get("gpu_memory_gib") or 0.0 for line in late), default=0.0)
    peak = next((peak_tflops(gpu["name"]) for one in machines for gpu in one.get("gpus", ())), None)
    if memory:
        figures["gpu_memory_gib"] = memory
    if peak:
        figures["mfu"] = figures["tflops_a_worker"] / peak
    seen = (
        f"{scenario.what}: {tokens_per_s:,.0f} tokens/s, {figures['step_s']:.3f} s a step, "
        f"{figures['tflops_a_worker']:.3g} TFLOP/s a worker"
        + (f", MFU {figures['mfu']:.1%}" if peak else "")
    )
    return Finding("throughput", SPEED, "held", seen, figures)
