"""The runs of a self-test, and what each check concludes from them. Pure: no process, no storage.

All runs train the same small model on the same data. `plain` is one process without Ray and
DeepSpeed; every other run must equal it: every loss within 1e-5, and to the last bit where a worker
was killed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal

from dist_ft.config.schema import RunConfig
from dist_ft.planning.gpus import peak_tflops
from dist_ft.runtime.machine import NodeDescription
from dist_ft.selftest.drill_scenarios import (
    RunOutcome,
    Scenario,
    StepLoss,
    find_problems,
    scenarios,
)
from dist_ft.selftest.materials import ModelSize

CHECKS = ("parity", "collective", "resume", "throughput")
TOLERANCE = 1e-5
"""Maximum difference of two losses in float32 (guarantees 3 and 7 of the design)."""
ZERO_STAGES = (1, 2, 3)
CPU_MODEL = ModelSize(256, 4, 704, 4, 256)
GPU_MODELS = (
    ModelSize(2048, 16, 5632, 16, 1024, dtype="bfloat16"),
    ModelSize(1024, 24, 2816, 16, 1024, dtype="bfloat16"),
    ModelSize(768, 12, 2048, 12, 1024, dtype="bfloat16"),
)
"""0.8, 0.3 and 0.08 billion weights; the first that fits is used."""
STATE_BYTES_PER_WEIGHT = 18
"""Bytes of state per weight in mixed-precision training with AdamW, over all workers."""
ACTIVATION_BYTES = 6 * 2**30
"""Reserved for activations on each worker."""
SPEED_RUN, MICRO_BATCH = "speed", 4

Verdict = Literal["passed", "FAILED", "not run"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: one of `CHECKS`.
        name: the run or the part that was checked.
        verdict: whether it passed.
        result: what was observed.
        figures: numbers by name, with the unit in the name.
        problems: what went wrong, a line each.
    """

    check: str
    name: str
    verdict: Verdict
    result: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def plan_runs(num_workers: int, checks: Sequence[str]) -> list[Scenario]:
    """Return the runs that `checks` need, in order, without the speed run (`speed_scenario`)."""
    plain = _scenario("plain", "one process, plain PyTorch", stage=3, num_workers=0)
    by_stage = []
    for stage in ZERO_STAGES:
        description = f"{num_workers} Ray workers, ZeRO-{stage}"
        by_stage.append(_scenario(f"zero-{stage}", description, stage))
    zero_3 = by_stage[-1]

    # faults of the drill, in the config of the run that their losses are compared with
    drill = {scenario.name: scenario for scenario in scenarios(num_workers)}
    killed = replace(drill["death"], name="killed", overrides=zero_3.overrides)
    if num_workers > 1:
        description = (
            f"{num_workers} workers are stopped (SIGTERM), {resized_workers(num_workers)} resume"
        )
    else:
        description = "1 worker is stopped (SIGTERM), one process without DeepSpeed resumes"
    resized = replace(
        drill["preemption"],
        name="resized",
        overrides=zero_3.overrides,
        description=description,
    )

    runs_of_check = {
        "parity": (plain, *by_stage),
        "collective": (zero_3,),
        "resume": (zero_3, killed, resized),
        "throughput": (zero_3,),
    }
    # in a fixed order, and each once: zero-3 serves several checks, and others are compared with it
    needed = {run.name for check in checks for run in runs_of_check[check]}
    return [run for run in (plain, *by_stage, killed, resized) if run.name in needed]


def resized_workers(num_workers: int) -> int:
    """Return the number of workers that resume a run: one fewer (0: one process)."""
    return num_workers - 1


def resized_scenario(scenario: Scenario, num_workers: int) -> Scenario:
    """Return the scenario of the second command of the run `resized`."""
    # overrides are shared with other scenarios, so they are copied and not changed in place
    cluster = {
        **scenario.overrides.get("cluster", {}),
        "workers": resized_workers(num_workers),
    }
    return replace(scenario, overrides={**scenario.overrides, "cluster": cluster})


def _scenario(name: str, description: str, stage: int, num_workers: int | None = None) -> Scenario:
    # "on", as "auto" skips a cluster of one node, and `check_network` needs the figures
    cluster: dict[str, Any] = {"network_check": "on"}
    if num_workers is not None:
        cluster = {"workers": num_workers}
    return Scenario(
        name,
        description,
        overrides={
            # float32, no recomputation, no offload: only the partitioning may change losses
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


def choose_speed_model(machines: Sequence[NodeDescription], num_workers: int) -> ModelSize:
    """Return the model to time: on GPUs the largest that surely fits the smallest one."""
    memory = []
    for machine in machines:
        for gpu in machine.get("gpus", ()):
            memory.append(gpu["memory_gib"] * 2**30)
    if not memory:
        return CPU_MODEL

    # as if ZeRO-3 partitioned all state; a run with a lower stage may need more
    for size in GPU_MODELS:
        state_bytes = STATE_BYTES_PER_WEIGHT * size.num_parameters / max(1, num_workers)
        if state_bytes + ACTIVATION_BYTES < min(memory):
            return size
    return GPU_MODELS[-1]


def speed_scenario(base: RunConfig, folder_url: str, size: ModelSize) -> Scenario:
    """Return the run to time: with the config's own zero section, without checkpoints."""
    micro_batch = MICRO_BATCH if size.dtype == "bfloat16" else 1

    # Two lanes per worker, so that gradient accumulation is measured too. The network was checked
    # in the run zero-3.
    return Scenario(
        SPEED_RUN,
        f"{size.num_parameters / 1e6:,.0f} million weights, {size.dtype}",
        overrides={
            "model": {
                "path": f"{folder_url}/{SPEED_RUN}-model",
                "dtype": size.dtype,
                "attention": "sdpa",
            },
            "data": {
                "train": f"{folder_url}/texts/*.jsonl",
                "format": "text",
                "overlong": "split",
                "block_mib": 1,
            },
            "batch": {
                "global_batch": 2 * base.min_workers * micro_batch,
                "micro_batch": micro_batch,
                "sequence_length": size.sequence_length,
            },
            "checkpoint": {"every_steps": 0, "at_end": False},
            "cluster": {"network_check": "off"},
        },
    )


def check_losses(
    name: str, outcomes: Mapping[str, RunOutcome], planned: Sequence[Scenario]
) -> Finding:
    """Compare a run with the one it must equal.

    Args:
        name: name of one of `planned`, but not plain.
        outcomes: outcomes of the runs so far, by name.
        planned: all runs.
    """
    # Where workers change, the reference is the same run without the change; the others are
    # compared with one process.
    scenario = next(scenario for scenario in planned if scenario.name == name)
    check = "resume" if name in ("killed", "resized") else "parity"
    reference = "zero-3" if check == "resume" else "plain"
    if name not in outcomes or reference not in outcomes:
        return Finding(check, name, "not run", scenario.description)

    losses, expected = outcomes[name].losses, outcomes[reference].losses

    # Another number of workers or ZeRO stage sums gradients in another order, so the last bits may
    # differ. `find_problems` compares bit by bit; where that is too strict, a run is compared with
    # itself there, and only the tolerance below applies.
    must_be_bit_equal = name == "killed"
    problems = find_problems(scenario, outcomes[name], expected if must_be_bit_equal else losses)

    largest = largest_difference(losses, expected)
    # `not <=` also reports infinity and NaN
    if not must_be_bit_equal and not problems and not largest <= TOLERANCE:
        problems.append(
            f"losses differ by up to {largest:.2e} from those of {reference}; at most "
            f"{TOLERANCE:g} is allowed"
        )

    comparison = f"differ by at most {largest:.1e}"
    if largest == 0:
        comparison = "equal to the last bit"

    # JSON has no infinity
    figures = {}
    if math.isfinite(largest):
        figures["largest_difference"] = largest
    return Finding(
        check,
        name,
        "FAILED" if problems else "passed",
        f"{scenario.description}: losses {comparison} ({reference})",
        figures,
        tuple(problems),
    )


def largest_difference(losses: Sequence[StepLoss], expected: Sequence[StepLoss]) -> float:
    """Return the largest difference of losses; infinity if steps differ or one is not finite."""
    if not losses or [step for step, _ in losses] != [step for step, _ in expected]:
        return math.inf

    largest = 0.0
    for (_, loss), (_, expected_loss) in zip(losses, expected, strict=True):
        if loss is None or expected_loss is None:
            return math.inf
        largest = max(largest, abs(loss - expected_loss))
    return largest


def check_network(network: Mapping[str, Any] | None) -> list[Finding]:
    """Return the findings on collectives from network.json of the run zero-3; None: it has none."""
    if network is None:
        problem = (
            "the run zero-3 wrote no network.json: its network check found wrong bytes or did not "
            "end; see its log"
        )
        return [Finding("collective", "all-reduce", "FAILED", problems=(problem,))]

    if not network["sums"]:
        return [
            Finding("collective", "all-reduce", "not run", "one worker has no other to reduce with")
        ]

    figures = {}
    for item in network["sums"]:
        mib = f"{item['num_bytes'] / 2**20:g}_mib"
        figures[f"{mib}_seconds"] = item["seconds"]
        figures[f"{mib}_mb_s"] = item["mb_s"]

    # the largest message: small ones measure latency
    large = network["sums"][-1]
    result = (
        f"{network['backend']}: exact over {network['world_size']} workers; "
        f"{large['num_bytes'] / 2**20:g} MiB in {1000 * large['seconds']:.1f} ms, "
        f"{large['mb_s']:,.0f} MB/s per worker"
    )
    findings = [Finding("collective", "all-reduce", "passed", result, figures)]

    # only between nodes, so a single node has none
    if network["links"]:
        speeds = [link["mb_s"] for link in network["links"]]
        findings.append(
            Finding(
                "collective",
                "pairs of nodes",
                "FAILED" if network["slow"] else "passed",
                f"{len(speeds)} pairs, {min(speeds):,.0f} to {max(speeds):,.0f} MB/s each way",
                {"min_mb_s": min(speeds), "max_mb_s": max(speeds)},
                tuple(network["slow"]),
            )
        )
    return findings


def check_speed(
    scenario: Scenario,
    outcome: RunOutcome,
    lines: Sequence[Mapping[str, Any]],
    size: ModelSize,
    machines: Sequence[NodeDescription],
    num_workers: int,
) -> Finding:
    """Return how fast the run `speed` was: medians over the second half of its steps.

    It saves no checkpoint, so it has no ledger to check; its metrics `lines` prove which steps it
    took.
    """
    steps = [line for line in lines if line.get("kind") == "train"]
    problems = _speed_problems(scenario, outcome, steps)
    if problems:
        return Finding(
            "throughput", SPEED_RUN, "FAILED", scenario.description, problems=tuple(problems)
        )

    figures = _speed_figures(steps[len(steps) // 2 :], size, num_workers)
    gpu_names = []
    for machine in machines:
        for gpu in machine.get("gpus", ()):
            gpu_names.append(gpu["name"])

    # of the first GPU: with different models, a share of the peak means little anyway
    peak = None
    if gpu_names:
        peak = peak_tflops(gpu_names[0])
    result = (
        f"{scenario.description}: {figures['tokens_per_s']:,.0f} tokens/s, "
        f"{figures['step_s']:.3f} s/step, {figures['tflops_per_worker']:.3g} TFLOP/s per worker"
    )

    if peak:
        figures["mfu"] = figures["tflops_per_worker"] / peak
        result += f", MFU {figures['mfu']:.1%}"
    return Finding("throughput", SPEED_RUN, "passed", result, figures)


def _speed_problems(
    scenario: Scenario, outcome: RunOutcome, steps: Sequence[Mapping[str, Any]]
) -> list[str]:
    # Compared with itself: what remains of `find_problems` are exit code and number of steps.
    losses = tuple(StepLoss(line["step"], line["loss"]) for line in steps)
    outcome = replace(outcome, losses=losses, ledger_problem="", damaged_checkpoints=())
    problems = find_problems(scenario, outcome, losses)

    # Speed of a run that does not train would be worth nothing.
    if not problems:
        first, last = losses[0].loss, losses[-1].loss
        if not (first and last and last < first):
            problems.append(f"the loss did not fall: {first} at step 1, {last} at the last step")
    return problems


def _speed_figures(
    steps: Sequence[Mapping[str, Any]], size: ModelSize, num_workers: int
) -> dict[str, float]:
    # the median, as other users of the machine may disturb single steps
    tokens_per_s = median(line["tokens_per_s"] for line in steps)
    figures = {
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_worker": tokens_per_s / num_workers,
        "step_s": median(line["step_s"] for line in steps),
        "data_wait_s": median(line["data_wait_s"] for line in steps),
        "tflops_per_worker": tokens_per_s * size.flops_per_token / num_workers / 1e12,
        "num_parameters": float(size.num_parameters),
    }

    memory_gib = max((line.get("gpu_memory_gib") or 0.0 for line in steps), default=0.0)
    if memory_gib:
        figures["gpu_memory_gib"] = memory_gib
    return figures
