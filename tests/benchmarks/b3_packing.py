"""B3: real tokens/s of packed sequences / padding to the longest of a batch (4, 8) / padding to full / TRL.

    tests/benchmarks/peers.sh             # once: an environment for TRL
    python tests/benchmarks/b3_packing.py

Model S, sequences of 2,048, lognormal lengths. How full sequences are is told of 20,000 samples; how fast they
train of some samples in a subset all sides share, one process, one thread, plain engine, sides in turn. Every
side computes the same loss over the same tokens (checked). TRL's layout is what its `pack_dataset` (best fit) makes.
The engine under all is ours; attention of the padded sides is causal over whole rows, without a mask, that of TRL's
side is what transformers does by itself with packed rows (sdpa).
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
from typing import Any

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
"""Samples of each row."""


def main() -> None:
    """Measure, print the tables, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--samples", type=int, default=96, help="trained on by each side, each round"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers-python", default=str(HERE / ".peers" / "bin" / "python"))
    parser.add_argument("--out", help="JSON file to write instead of results/b3_packing.json")
    args = parser.parse_args()
    harness.require_one_thread()
    environment = harness.describe_environment()
    lengths = workload.lognormal_lengths(POOL, seed=0)
    fill = {name: told for name, (told, _) in layouts(lengths, args.peers_python).items()}
    subset = lengths[: args.samples]
    result = {
        "fill": fill,
        **speed(
            subset,
            {name: rows for name, (_, rows) in layouts(subset, args.peers_python).items()},
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


def layouts(lengths: np.ndarray, peers_python: str) -> dict[str, tuple[float, list[Layout]]]:
    """Return (share of real tokens, micro-batches of rows of samples) of every side."""
    from dist_ft.data.sampling.packing import group_into_sequences

    members, offsets = group_into_sequences(lengths, LENGTH, True, 0)
    ours = [members[a:b].tolist() for a, b in pairwise(offsets)]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(lengths.tolist(), file)
        file.flush()
        done = subprocess.run(
            [peers_python, "-c", TRL, file.name, str(LENGTH)],
            check=True,
            capture_output=True,
            text=True,
        )
    trl = json.loads(done.stdout.splitlines()[-1])
    order = np.random.default_rng(1).permutation(len(lengths)).tolist()
    single = [[sample] for sample in order]
    return {
        "ours": batched(lengths, ours, 2, None),
        "trl": batched(lengths, trl, 2, None),
        "pad 4": batched(lengths, single, 4, None),
        "pad 8": batched(lengths, single, 8, None),
        "pad full": batched(lengths, single, 4, LENGTH),
    }


def batched(
    lengths: np.ndarray, rows: Layout, size: int, width: int | None
) -> tuple[float, list[Layout]]:
    """Return (real tokens / positions, rows in micro-batches of `size`), each as wide as its longest row or `width`."""
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    positions = sum(
        len(batch) * (width or max(int(lengths[row].sum()) for row in batch)) for batch in batches
    )
    return float(lengths.sum() / positions), batches


def speed(lengths: np.ndarray, sides: dict[str, list[Layout]], rounds: int) -> dict[str, Any]:
    """Return real tokens/s of every side by round, ratios, and the loss each saw."""
    import torch

    from dist_ft.config.schema import ModelSection, OptimizerSection
    from dist_ft.engine.torch_engine import TorchEngine
    from dist_ft.model.causal_lm import CausalLM
    from dist_ft.model.loading.load import load_causal_lm

    rng = np.random.default_rng(2)
    texts = [rng.integers(1, workload.SHAPES["S"]["vocab_size"], length) for length in lengths]
    with tempfile.TemporaryDirectory() as folder:
        path = workload.make_model(Path(folder) / "model-s", "S")
        module = CausalLM(load_causal_lm(ModelSection(path=path, dtype="float32"), folder))
    engine = TorchEngine(module, OptimizerSection(learning_rate=1e-9), torch.device("cpu"))
    losses = {}
    for name, batches in sides.items():
        attend(module, name)
        losses[name] = total_loss(engine, texts, batches, name)
    if max(losses.values()) / min(losses.values()) - 1 > 1e-5:
        raise SystemExit(f"the sides do not learn the same: {losses}")

    def timed(name: str) -> Callable[[], float]:
        def run() -> float:
            attend(module, name)
            start_s = time.perf_counter()
            for rows in sides[name]:
                batch = batch_of(texts, rows, name)
                engine.train_step([batch], [0], max(1, batch.num_target_tokens), 1e-9)
            return float(lengths.sum()) / (time.perf_counter() - start_s)

        return run

    found = harness.alternate_sides({name: timed(name) for name in sides}, rounds)
    return {
        "tokens_per_s": found,
        "loss_sums": losses,
        **{
            f"ours_over_{name}": harness.ratio(found["ours"], found[name])
            for name in sides
            if name != "ours"
        },
    }


def attend(module: Any, name: str) -> None:
    """Let the side attend in its way."""
    from dist_ft.model.packed_attention import enable_packed_attention

    module.model.set_attn_implementation("sdpa")
    module._packed_samples = enable_packed_attention(module.model) if name == "ours" else None


def total_loss(engine: Any, texts: Sequence[np.ndarray], batches: list[Layout], name: str) -> float:
    """Return the summed loss of all samples in a layout."""
    return sum(engine.loss_sum(batch_of(texts, rows, name)) for rows in batches)


def batch_of(texts: Sequence[np.ndarray], rows: Layout, name: str) -> Any:
    """Return a micro-batch; positions of the padded sides run on through the padding: plain causal rows."""
    from dataclasses import replace

    from dist_ft.data.batch import IGNORE_INDEX
    from dist_ft.data.batching.loader import assemble_batch

    samples = [sample for row in rows for sample in row]
    segments = np.array([[sample, 0, len(texts[sample]), 0] for sample in samples], dtype=np.int64)
    tokens = np.concatenate([texts[sample] for sample in samples])
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
        rows.append(
            (
                name,
                f"{result['fill'][name]:.1%}",
                f"{np.mean(values):,.0f}",
                str(ratio or ""),
                harness.format_goal(ratio, GOALS[name], at_least=True)
                if ratio
                else "fill ≥ 98 %: " + ("reached" if result["fill"][name] >= 0.98 else "missed"),
            )
        )
    harness.print_table(
        f"B3 packing, fill of {POOL:,} samples, speed of {args.samples}",
        ("layout", "real tokens", "real tokens/s", "ours / it [95 %]", "goal"),
        rows,
    )


if __name__ == "__main__":
    main()
