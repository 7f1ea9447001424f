"""B2: the share of this machine's matrix-product speed that a training step reaches.

    python tests/benchmarks/b2_flops.py [--blocks N] [--steps N]

Numerator: model FLOP/s of whole optimizer steps of a real run (`dist_ft.runtime.local.run`, one
process, one thread, float32, model M, 2 x 512), with everything a step does. Denominator: the
FLOP/s of torch for the matrix products of the linear layers (forward and both of backward), at
their shapes, weighted as the model uses them. The products are measured between blocks of steps in
the same process. Of attention only the causal half counts. Backward counts twice forward. Norms,
rotary embeddings, loss and optimizer count as zero.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np
import workload

LENGTH, MICRO_BATCH = 512, 2
WARM_UP = 3
GOAL = 0.85
SHAPE = workload.SHAPES["M"]


def parse_arguments() -> argparse.Namespace:
    """Return the command line arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--blocks", type=int, default=10, help="rounds: --steps steps, then all products"
    )
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps per block")
    parser.add_argument("--no-profile", action="store_true", help="do not profile a step")
    parser.add_argument("--out", help="JSON file to write instead of results/b2_flops.json")
    return parser.parse_args()


@dataclass(frozen=True)
class Product:
    """A matrix product (m, k) x (k, n) of torch's linear layers.

    Attributes:
        kind: "forward", "grad_input" or "grad_weight"; it defines the strides of the operands.
    """

    kind: str
    m: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        """The floating point operations of the product."""
        return 2 * self.m * self.k * self.n


def linear_products() -> Counter[Product]:
    """Return the matrix products of the linear layers in one step, with the number of each."""
    width, inner, tokens = SHAPE["hidden_size"], SHAPE["intermediate_size"], MICRO_BATCH * LENGTH
    layers = Counter({(width, width): 4, (width, inner): 2, (inner, width): 1})
    linears = Counter(
        {shape: count * SHAPE["num_hidden_layers"] for shape, count in layers.items()}
    )
    products: Counter[Product] = Counter()
    for (width_in, width_out), count in linears.items():
        products.update(_layer_products(tokens, width_in, width_out, count))
    products.update(_layer_products(num_target_tokens(), width, SHAPE["vocab_size"], 1))
    return products


def _layer_products(tokens: int, width_in: int, width_out: int, count: int) -> dict[Product, int]:
    """Return the products of `count` linear layers: forward, input gradient, weight gradient."""
    return {
        Product("forward", tokens, width_in, width_out): count,
        Product("grad_input", tokens, width_out, width_in): count,
        Product("grad_weight", width_out, tokens, width_in): count,
    }


def num_target_tokens() -> int:
    """Return the number of positions with a target: the last of each sequence has none."""
    return MICRO_BATCH * (LENGTH - 1)


def attention_flops() -> int:
    """Return the FLOPs of attention in one step: scores and weighted values.

    Only the causal half, forward and backward.
    """
    pairs = MICRO_BATCH * LENGTH * (LENGTH + 1) // 2
    return 3 * SHAPE["num_hidden_layers"] * 2 * 2 * pairs * SHAPE["hidden_size"]


def step_flops() -> int:
    """Return the model FLOPs of an optimizer step."""
    return (
        sum(product.flops * count for product, count in linear_products().items())
        + attention_flops()
    )


class PeakMeter:
    """Times each product a few times a round, with the operand strides of a linear layer."""

    def __init__(self, repeats: int = 3) -> None:
        self.products = linear_products()
        self.repeats = repeats
        self._operands: dict[Product, tuple[Any, Any]] = {}

    def round(self) -> float:
        """Return the seconds of all products of one step, from the median of each product."""
        return sum(self._median_s(product) * count for product, count in self.products.items())

    def _median_s(self, product: Product) -> float:
        import torch

        if product not in self._operands:
            self._operands[product] = _operands(product)
        left, right = self._operands[product]
        seconds = []
        with torch.no_grad():
            for _ in range(self.repeats):
                start_s = time.perf_counter()
                torch.mm(left, right)
                seconds.append(time.perf_counter() - start_s)
        return float(np.median(seconds))


def _operands(product: Product) -> tuple[Any, Any]:
    """Return random operands with the strides of `y = x W^T`, `dx = dy W` and `dW = dy^T x`."""
    import torch

    random = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Any:
        return torch.randn(rows, columns, generator=random)

    if product.kind == "forward":
        return matrix(product.m, product.k), matrix(product.n, product.k).t()
    if product.kind == "grad_weight":
        return matrix(product.k, product.m).t(), matrix(product.k, product.n)
    return matrix(product.m, product.k), matrix(product.k, product.n)


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train, and time the products between blocks of steps.

    Returns:
        Seconds of the steps and of the products by round, and the profile of a step.
    """
    import os

    from dist_ft.config.load import load_config
    from dist_ft.runtime import local
    from dist_ft.training.console import Console
    from dist_ft.training.run_context import RunContext

    # two more: a step ends when the next starts, and one step is profiled
    total = WARM_UP + args.blocks * args.steps + 2
    config = load_config(
        workload.run_config(
            folder,
            "M",
            name="b2",
            train=str(folder / "texts" / "*.jsonl"),
            sequence_length=LENGTH,
            micro_batch=MICRO_BATCH,
            lanes=1,
            steps=total,
            workers=0,
        )
    )
    meter = Meter(args)
    with open(os.devnull, "w") as no_output:
        local.run(config, RunContext(console=Console(no_output), should_stop=meter.on_step))
    return {"step_s": meter.steps, "products_s": meter.peaks, "profile": meter.profile()}


class Meter:
    """Records the time of each step, and measures the products between blocks."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.peak = PeakMeter()
        self.steps: list[list[float]] = []
        self.peaks: list[float] = []
        self._num_calls = 0
        self._step_start_s = 0.0
        self._profiler: Any = None

    def on_step(self) -> bool:
        """Measure; called once a step, as `RunContext.should_stop`. Return False."""
        now = time.perf_counter()
        after_warm_up = self._num_calls - WARM_UP
        total = self.args.blocks * self.args.steps
        if 0 < after_warm_up <= total:
            self.steps[-1].append(now - self._step_start_s)
        if 0 <= after_warm_up <= total and after_warm_up % self.args.steps == 0:
            # one more than blocks: before and after each block
            self.peaks.append(self.peak.round())
            if after_warm_up < total:
                self.steps.append([])
        if after_warm_up == total and not self.args.no_profile:
            self._start_profiler()
        self._num_calls += 1
        self._step_start_s = time.perf_counter()
        return False

    def _start_profiler(self) -> None:
        import torch

        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self._profiler.__enter__()

    def profile(self) -> dict[str, float]:
        """Return the share of time by operation after the last block, largest first."""
        if self._profiler is None:
            return {}
        self._profiler.__exit__(None, None, None)
        events = {event.key: event.self_cpu_time_total for event in self._profiler.key_averages()}
        total = sum(events.values())
        largest = sorted(events, key=lambda key: -events[key])[:15]
        return {key: events[key] / total for key in largest}


def main() -> None:
    """Measure, print the table, write the JSON file."""
    harness.require_one_thread()
    args = parse_arguments()
    environment = harness.describe_environment()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="dist_ft-b2-") as name:
        folder = Path(name)
        workload.make_model(folder / "model-m", "M")
        workload.make_data(
            folder / "texts", np.full(64 * MICRO_BATCH, LENGTH), SHAPE["vocab_size"], seed=2
        )
        measured = run(args, folder)
    result = summarize(measured)
    report(result, args)
    config = {
        "model": SHAPE,
        "micro_batch": MICRO_BATCH,
        "sequence_length": LENGTH,
        "threads": 1,
        "dtype": "float32",
        "blocks": args.blocks,
        "steps": args.steps,
        "warm_up_steps": WARM_UP,
    }
    harness.save_results("b2_flops", config, environment, result, args.out)


def summarize(measured: dict[str, Any]) -> dict[str, Any]:
    """Return the ratio of rates, a control (products before / after a block), and both rates."""
    before, after = measured["products_s"][:-1], measured["products_s"][1:]
    steps = [float(np.mean(block)) for block in measured["step_s"]]
    linear = sum(product.flops * count for product, count in linear_products().items())
    peaks = [linear / ((a + b) / 2) for a, b in zip(before, after, strict=True)]
    rates = [step_flops() / seconds for seconds in steps]
    return {
        "ratio": harness.ratio(rates, peaks),
        "control": harness.ratio(before, after),
        "model_gflops_a_step": step_flops() / 1e9,
        "attention_share_of_flops": attention_flops() / step_flops(),
        "model_gflops_per_s": float(np.median(rates)) / 1e9,
        "peak_gflops_per_s": float(np.median(peaks)) / 1e9,
        "step_s": float(np.median(steps)),
        "profile_share": measured["profile"],
    }


def report(result: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the results."""
    harness.print_table(
        f"B2 model FLOP/s over matrix-product FLOP/s, {args.blocks} blocks of {args.steps} steps",
        ("", "value [95 % interval]", "goal"),
        [
            (
                "model / products",
                str(result["ratio"]),
                harness.format_goal(result["ratio"], GOAL, at_least=True),
            ),
            ("products before / after a block", str(result["control"]), "control"),
            ("model GFLOP/s", f"{result['model_gflops_per_s']:.1f}", ""),
            ("products GFLOP/s", f"{result['peak_gflops_per_s']:.1f}", ""),
            ("s per step", f"{result['step_s']:.3f}", ""),
        ],
    )
    if result["profile_share"]:
        harness.print_table(
            "time of a step by operation (a step of its own, profiled)",
            ("operation", "share"),
            [(name, f"{share:.1%}") for name, share in result["profile_share"].items()],
        )


if __name__ == "__main__":
    main()
