"""B4: peak memory and time of output layer and cross-entropy, forward and backward: ours / torch.

    python tests/benchmarks/b4_loss_head.py

A vocabulary of 128,256, width 512, 4,096 tokens, float32, one thread. *Ours* is
`dist_ft.model.losses.head_loss`; *torch* is `linear` and `F.cross_entropy` with sum, as in most
training scripts. Memory is the peak resident memory of the process (VmHWM, reset before) minus its
memory
before: everything that forward and backward allocate, with the gradients of both operands. Each
measurement runs in its own process, so none reuses memory that another has touched.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness

GOAL_MEMORY, GOAL_TIME = 0.1, 1.0


def main() -> None:
    """Measure, print the table, write the JSON file; with --side: run one side."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--times",
        type=int,
        default=1,
        help="timed forward and backward passes, after an untimed one",
    )
    parser.add_argument("--out", help="JSON file to write instead of results/b4_loss_head.json")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    harness.require_one_thread()
    if args.side:
        print(json.dumps(run_side(args)))
        return
    environment = harness.describe_environment()
    measured: dict[str, list[dict[str, float]]] = {
        name: [] for name in ("ours", "torch", "torch_again")
    }
    for number in range(args.rounds):
        for name in harness.side_order(list(measured), number):
            measured[name].append(measure(args, name.removesuffix("_again")))
            print(
                f"round {number + 1} of {args.rounds}: {name} {measured[name][-1]}",
                file=sys.stderr,
                flush=True,
            )

    def ratio(key: str, above: str, below: str) -> harness.Ratio:
        return harness.ratio(
            [values[key] for values in measured[above]], [values[key] for values in measured[below]]
        )

    rows, ratios = [], {}
    for key, goal, unit in (("bytes", GOAL_MEMORY, 2**20), ("seconds", GOAL_TIME, 1)):
        middle = {}
        for name, rounds in measured.items():
            middle[name] = sorted(values[key] for values in rounds)[args.rounds // 2] / unit
        ratios[key] = ratio(key, "ours", "torch")
        rows.append(
            (
                "MiB" if key == "bytes" else "seconds",
                f"{middle['ours']:.2f}",
                f"{middle['torch']:.2f}",
                str(ratios[key]),
                harness.format_goal(ratios[key], goal, at_least=False),
                str(ratio(key, "torch_again", "torch")),
            )
        )
    harness.print_table(
        "B4 loss head, forward and backward",
        ("", "dist_ft", "torch", "ours / torch [95 %]", "goal", "control"),
        rows,
    )
    largest_difference = max(
        abs(ours["loss"] / torch["loss"] - 1)
        for ours, torch in zip(measured["ours"], measured["torch"], strict=True)
    )
    print(f"largest relative difference of losses: {largest_difference:.1e}")
    harness.save_results(
        "b4_loss_head",
        {
            name: getattr(args, name)
            for name in ("vocabulary", "width", "tokens", "rounds", "times")
        },
        environment,
        {**measured, "ours_over_torch": ratios, "loss_difference": largest_difference},
        args.out,
    )


def measure(args: argparse.Namespace, name: str) -> dict[str, float]:
    """Run one side in its own process; return its bytes, seconds and loss."""
    command = [
        sys.executable,
        __file__,
        "--side",
        name,
        *(
            f"--{field}={getattr(args, field)}"
            for field in ("vocabulary", "width", "tokens", "times")
        ),
    ]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run_side(args: argparse.Namespace) -> dict[str, float]:
    """Return peak bytes of the first forward and backward, seconds of the next, and the loss."""
    import torch

    from dist_ft.model.losses.head_loss import head_loss

    def ours() -> Any:
        return head_loss(hidden, weight, targets)

    def torch_loss() -> Any:
        return torch.nn.functional.cross_entropy(
            torch.nn.functional.linear(hidden, weight), targets, reduction="sum"
        )

    loss_function = ours if args.side == "ours" else torch_loss
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.width, requires_grad=True)
    weight = (torch.randn(args.vocabulary, args.width) / args.width**0.5).requires_grad_()
    targets = torch.randint(args.vocabulary, (args.tokens,))
    (torch.ones(64, 64) @ torch.ones(64, 64)).sum()  # torch initializes its thread pool
    held = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current memory
    loss = loss_function()
    loss.backward()
    peak, value = _memory("VmHWM") - held, loss.item()
    start_s = time.perf_counter()
    for _ in range(args.times):
        hidden.grad = weight.grad = None
        loss_function().backward()
    return {"bytes": peak, "seconds": (time.perf_counter() - start_s) / args.times, "loss": value}


def _memory(field: str) -> int:
    """Return a field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
