"""B3: real tokens/s of packed sequences / padding to the longest of 4 or 8, to full length / TRL.

    tests/benchmarks/peers.sh             # once: an environment for TRL
    python tests/benchmarks/b3_packing.py

Model S, sequences of 2,048, lognormal lengths. The fill (real tokens / positions) is computed over
20,000 samples. The speed is measured on a subset that all sides share: one process, one thread,
plain engine, alternating sides. Every side computes the same loss over the same tokens (checked).
TRL's layout comes from its `pack_dataset` (best fit). All sides use our engine. Attention of the
padded sides is causal over whole rows, without a mask; TRL's side uses the masks of transformers
for packed rows (sdpa).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
import workload

LENGTH, POOL = 2048, 20_000
GOALS = {"pad 4": 1.35, "pad 8": 1.9, "pad full": 3.0, "trl": 1.0}
HERE = Path(__file__).resolve().parent
TRL = """
import json, sys
from datasets import Dataset
from trl import pack_dataset
lengths = json.load(open(sys.argv[1]))
rows = [{"input_ids": [i] * n} for i, n in enumerate(lengths)]
packed = pack_dataset(Dataset.from_list(rows), seq_length=int(sys.argv[2]), strategy="bfd")
print()
print(json.dumps([list(dict.fromkeys(row["input_ids"])) for row in packed]))
"""
Layout = list[list[int]]
"""The indices of the samples in each row."""


def main() -> None:
    """Measure, print the tables, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--samples", type=int, default=96, help="samples that each side trains on in each round"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers-python", default=str(HERE / ".peers" / "bin" / "python"))
    parser.add_argument("--out", help="JSON file to write instead of results/b3_packing.json")
    args = parser.parse_args()
    harness.require_one_thread()
    environment = harness.describe_environment()
    lengths = workload.lognormal_lengths(POOL, seed=0)
    fill = {name: side.fill for name, side in layouts(lengths, args.peers_python).items()}
    subset = lengths[: args.samples]
    result = {
        "fill": fill,
        **speed(
            subset,
            {name: side.batches for name, side in layouts(subset, args.peers_python).items()},
            args.rounds,
        ),
    }
    report(result, args)
    config = {
        "model": workload.SHAPES["S"],
        "sequence_length": LENGTH,
        "samples": args.samples,
        "rounds": args.rounds,
    }
    harness.save_results("b3_packing", config, environment, result, args.out)


class BatchedLayout(NamedTuple):
    """The micro-batches of a side.

    Attributes:
        fill: real tokens / positions.
        batches: the rows of each micro-batch.
    """

    fill: float
    batches: list[Layout]


def layouts(lengths: np.ndarray, peers_python: str) -> dict[str, BatchedLayout]:
    """Return the layout of every side; `lengths` (N,): tokens of each sample."""
    from dist_ft.data.sampling.packing import group_into_sequences

    members, offsets = group_into_sequences(lengths, LENGTH, True, 0)
    ours = [members[a:b].tolist() for a, b in pairwise(offsets)]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(lengths.tolist(), file)
        file.flush()
        process = subprocess.run(
            [peers_python, "-c", TRL, file.name, str(LENGTH)],
            check=True,
            capture_output=True,
            text=True,
        )
    trl = json.loads(process.stdout.splitlines()[-1])
    order = np.random.default_rng(1).permutation(len(lengths)).tolist()
    single = [[sample] for sample in order]
    return {
        "ours": batch_rows(lengths, ours, 2, None),
        "trl": batch_rows(lengths, trl, 2, None),
        "pad 4": batch_rows(lengths, single, 4, None),
        "pad 8": batch_rows(lengths, single, 8, None),
        "pad full": batch_rows(lengths, single, 4, LENGTH),
    }


def batch_rows(lengths: np.ndarray, rows: Layout, size: int, width: int | None) -> BatchedLayout:
    """Return rows in micro-batches of `size`, each as wide as its longest row, or as `width`."""
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    num_positions = 0
    for batch in batches:
        longest = max(int(lengths[row].sum()) for row in batch)
        num_positions += len(batch) * (width or longest)
    return BatchedLayout(float(lengths.sum() / num_positions), batches)


def speed(lengths: np.ndarray, sides: dict[str, list[Layout]], rounds: int) -> dict[str, Any]:
    """Return real tokens/s of every side by round, ratios, and the summed loss of each side."""
    import torch

    from dist_ft.config.schema import ModelSection, OptimizerSection
    from dist_ft.engine.torch_engine import TorchEngine
    from dist_ft.model.causal_lm import CausalLM
    from dist_ft.model.loading.load import load_causal_lm

    rng = np.random.default_rng(2)
    samples = [rng.integers(1, workload.SHAPES["S"]["vocab_size"], length) for length in lengths]
    with tempfile.TemporaryDirectory() as folder:
        path = workload.make_model(Path(folder) / "model-s", "S")
        module = CausalLM(load_causal_lm(ModelSection(path=path, dtype="float32"), folder))
    engine = TorchEngine(module, OptimizerSection(learning_rate=1e-9), torch.device("cpu"))
    losses = {}
    for name, batches in sides.items():
        set_attention(module, name)
        losses[name] = total_loss(engine, samples, batches, name)
    if max(losses.values()) / min(losses.values()) - 1 > 1e-5:
        raise SystemExit(f"the losses of the sides differ: {losses}")

    def timed(name: str) -> Callable[[], float]:
        def run() -> float:
            set_attention(module, name)
            start_s = time.perf_counter()
            for rows in sides[name]:
                batch = assemble(samples, rows, name)
                engine.train_step([batch], [0], max(1, batch.num_target_tokens), 1e-9)
            return float(lengths.sum()) / (time.perf_counter() - start_s)

        return run

    tokens_per_s = harness.alternate_sides({name: timed(name) for name in sides}, rounds)
    return {
        "tokens_per_s": tokens_per_s,
        "loss_sums": losses,
        **{
            f"ours_over_{name}": harness.ratio(tokens_per_s["ours"], tokens_per_s[name])
            for name in sides
            if name != "ours"
        },
    }


def set_attention(module: Any, name: str) -> None:
    """Set the attention of a side: per sample (ours), or that of transformers."""
    from dist_ft.model.packed_attention import enable_packed_attention

    module.model.set_attn_implementation("sdpa")
    module._packed_samples = enable_packed_attention(module.model) if name == "ours" else None


def total_loss(
    engine: Any, samples: Sequence[np.ndarray], batches: list[Layout], name: str
) -> float:
    """Return the summed loss of all samples in a layout."""
    return sum(engine.loss_sum(assemble(samples, rows, name)) for rows in batches)


def assemble(samples: Sequence[np.ndarray], rows: Layout, name: str) -> Any:
    """Return the micro-batch of `rows`.

    The positions of the padded sides count through the padding, so that their rows are plain
    causal.
    """
    from dataclasses import replace

    from dist_ft.data.batch import IGNORE_INDEX
    from dist_ft.data.batching.assemble import assemble_batch

    order = [sample for row in rows for sample in row]
    segments = np.array([[i, 0, len(samples[i]), 0] for i in order], dtype=np.int64)
    tokens = np.concatenate([samples[i] for i in order])
    batch = assemble_batch(
        tokens,
        np.ones(len(tokens), np.uint8),
        segments,
        np.repeat(np.arange(len(rows)), list(map(len, rows))),
        0,
    )
    if not name.startswith("pad"):
        return batch
    missing = LENGTH - batch.input_ids.shape[1] if name == "pad full" else 0
    width = batch.input_ids.shape[1] + missing
    return replace(
        batch,
        input_ids=np.pad(batch.input_ids, ((0, 0), (0, missing))),
        target_ids=np.pad(batch.target_ids, ((0, 0), (0, missing)), constant_values=IGNORE_INDEX),
        position_ids=np.tile(np.arange(width), (len(rows), 1)),
    )


def report(result: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the results."""
    rows = []
    for name, values in result["tokens_per_s"].items():
        ratio = result.get(f"ours_over_{name}")
        if ratio:
            goal = harness.format_goal(ratio, GOALS[name], at_least=True)
        else:
            goal = f"fill ≥ 98 %: {'reached' if result['fill'][name] >= 0.98 else 'missed'}"
        rows.append(
            (
                name,
                f"{result['fill'][name]:.1%}",
                f"{np.mean(values):,.0f}",
                str(ratio or ""),
                goal,
            )
        )
    harness.print_table(
        f"B3 packing: fill of {POOL:,} samples, speed of {args.samples}",
        ("layout", "real tokens", "real tokens/s", "ours / layout [95 %]", "goal"),
        rows,
    )


if __name__ == "__main__":
    main()
