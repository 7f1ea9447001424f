"""B4: peak memory and time of output layer and cross-entropy, forward and backward: ours / torch's own.

    python tests/benchmarks/b4_loss_head.py

A vocabulary of 128,256, width 512, 4,096 tokens, float32, one thread. *Ours* is `dist_ft.model.losses.head_loss`; *torch* a
`linear` and `F.cross_entropy` with sum, as every training script has it. Memory is what the process holds at most
(VmHWM, which Linux lets one reset) beyond what it held before: all that forward and backward make, the gradients of
both operands among it. Each measurement is a process of its own, so that none finds memory that another has touched.
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
    """Measure, print the table, write the JSON; or be a side of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--times", type=int, default=1, help="forward and backward, after one that is not counted"
    )
    parser.add_argument("--out", help="JSON file to write instead of results/b4_loss_head.json")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    harness.require_one_thread()
    if args.side:
        print(json.dumps(side(args)))
        return
    environment, found = (
        harness.describe_environment(),
        {name: [] for name in ("ours", "torch", "torch_again")},
    )
    for number in range(args.rounds):
        for name in harness.side_order(list(found), number):
            found[name].append(measure(args, name.removesuffix("_again")))
            print(
                f"round {number + 1} of {args.rounds}: {name} {found[name][-1]}",
                file=sys.stderr,
                flush=True,
            )

    def over(key: str, above: str, below: str) -> harness.Ratio:
        return harness.ratio([one[key] for one in found[above]], [one[key] for one in found[below]])

    rows, ratios = [], {}
    for key, goal, unit in (("bytes", GOAL_MEMORY, 2**20), ("seconds", GOAL_TIME, 1)):
        middle = {
            name: sorted(one[key] for one in found[name])[args.rounds // 2] / unit for name in found
        }
        ratios[key] = over(key, "ours", "torch")
        rows.append(
            (
                f"{'MiB' if key == 'bytes' else 'seconds'}",
                f"{middle['ours']:.2f}",
                f"{middle['torch']:.2f}",
                str(ratios[key]),
                harness.format_goal(ratios[key], goal, at_least=False),
                str(over(key, "torch_again", "torch")),
            )
        )
    harness.print_table(
        "B4 loss head, forward and backward",
        ("", "dist_ft", "torch", "ours / torch [95 %]", "goal", "control"),
        rows,
    )
    worst = max(
        abs(a["loss"] / b["loss"] - 1) for a, b in zip(found["ours"], found["torch"], strict=True)
    )
    print(f"losses differ by {worst:.1e} at most, relative")
    harness.save_results(
        "b4_loss_head",
        {
            name: getattr(args, name)
            for name in ("vocabulary", "width", "tokens", "rounds", "times")
        },
        environment,
        {**found, "ours_over_torch": ratios, "loss_difference": worst},
        args.out,
    )


def measure(args: argparse.Namespace, name: str) -> dict[str, float]:
    """Return what one side took, in a process of its own."""
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


def side(args: argparse.Namespace) -> dict[str, float]:
    """Return peak bytes of the first forward and backward, seconds of the next ones, and the loss."""
    import torch

    from dist_ft.model.losses.head_loss import head_loss

    def ours() -> Any:
        return head_loss(hidden, weight, targets)

    def plain() -> Any:
        return torch.nn.functional.cross_entropy(
            torch.nn.functional.linear(hidden, weight), targets, reduction="sum"
        )

    loss_of = ours if args.side == "ours" else plain
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.width, requires_grad=True)
    weight = (torch.randn(args.vocabulary, args.width) / args.width**0.5).requires_grad_()
    targets = torch.randint(args.vocabulary, (args.tokens,))
    (torch.ones(64, 64) @ torch.ones(64, 64)).sum()  # what torch makes once
    held = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # the high-water mark starts from what is held now
    loss = loss_of()
    loss.backward()
    peak, value = _memory("VmHWM") - held, loss.item()
    start_s = time.perf_counter()
    for _ in range(args.times):
        hidden.grad = weight.grad = None
        loss_of().backward()
    return {"bytes": peak, "seconds": (time.perf_counter() - start_s) / args.times, "loss": value}


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
