"""B12: generated tokens per second: ours, in batches / a loop over rows.

    python tests/benchmarks/b12_generate.py

A Llama of 13 M random weights, prompts of 4 to 96 tokens, 16 new tokens each, float32, one thread.
*Ours* is `dist_ft.model.generation` with batches of 12 rows of similar length. *Rows* is
transformers' `generate`, called row by row, as evaluation scripts do. *Mixed* is transformers'
`generate` on batches of 12 in data order, which shows the gain of sorting by length. Greedy, beam
search and sampling; the generated text of the deterministic strategies is compared.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import harness

GOAL = 2.0
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam 4": {"strategy": "beam", "num_beams": 4},
    "sample": {"strategy": "sample", "top_p": 0.9},
}
NEW_TOKENS, VOCABULARY, END = 16, 8192, 2


class Tokenizer:
    """The part of a tokenizer that generation uses."""

    eos_token_id, pad_token_id = END, 0


def main() -> None:
    """Measure, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--rows", type=int, default=12, help="batch size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="JSON file to write instead of results/b12_generate.json")
    args = parser.parse_args()
    harness.require_one_thread()
    environment = harness.describe_environment()
    model, prompts = build_model(), build_prompts(args.prompts)
    table, result = [], {}
    for name, fields in STRATEGIES.items():
        generated: dict[str, Any] = {}
        sides = {
            side: timed(action, generated, side)
            for side, action in actions(model, prompts, fields, args.rows).items()
        }
        for side in sides.values():
            side()  # one-time initialization
        speeds = harness.alternate_sides(sides, args.rounds)
        ratios = {
            f"ours_over_{side}": harness.ratio(speeds["ours"], speeds[side])
            for side in ("rows", "mixed")
        }
        control = harness.ratio(speeds["rows_again"], speeds["rows"])
        same = None
        if name != "sample":
            pairs = zip(generated["ours"], generated["rows"], strict=True)
            same = sum(ours == row for ours, row in pairs)
        middle = {side: sorted(values)[args.rounds // 2] for side, values in speeds.items()}
        table.append(
            (
                name,
                *(f"{middle[side]:.0f}" for side in ("ours", "rows", "mixed")),
                str(ratios["ours_over_rows"]),
                harness.format_goal(ratios["ours_over_rows"], GOAL, at_least=True),
                str(ratios["ours_over_mixed"]),
                str(control),
                "" if same is None else f"{same} of {len(prompts)}",
            )
        )
        result[name] = {"tokens_per_s": speeds, **ratios, "control": control, "same_texts": same}
    harness.print_table(
        "B12 generated tokens per second",
        (
            "",
            "ours",
            "rows",
            "mixed",
            "ours / rows [95 %]",
            "goal",
            "ours / mixed",
            "control",
            "equal generations",
        ),
        table,
    )
    harness.save_results(
        "b12_generate",
        {name: getattr(args, name) for name in ("prompts", "rows", "rounds")},
        environment,
        result,
        args.out,
    )


def build_model() -> Any:
    """Return a Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=320,
            intermediate_size=864,
            num_hidden_layers=6,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=512,
            eos_token_id=END,
            pad_token_id=0,
            initializer_range=0.1,
        )
    ).eval()


def build_prompts(count: int) -> list[Any]:
    """Return `count` prompts of random token ids."""
    import numpy as np

    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCABULARY, rng.integers(4, 97)) for _ in range(count)]


def actions(model: Any, prompts: list[Any], fields: dict[str, Any], rows: int) -> dict[str, Any]:
    """Return the function of each side; it returns the generated token ids by prompt."""
    import torch

    from dist_ft.config.sections.decoding import DecodingSection
    from dist_ft.model.generation import GenerationRequest, TextGenerator, pad_rows

    generator = TextGenerator(
        DecodingSection(max_new_tokens=NEW_TOKENS, batch_size=rows, **fields), Tokenizer()
    )
    arguments = {
        "max_new_tokens": NEW_TOKENS,
        "pad_token_id": 0,
        "do_sample": fields.get("strategy") == "sample",
        "top_k": 0,
        "num_beams": fields.get("num_beams", 1),
        "top_p": fields.get("top_p", 1.0),
    }

    def generate_batches(size: int) -> list[list[int]]:
        generated = []
        for start in range(0, len(prompts), size):
            ids, mask = pad_rows(prompts[start : start + size], 0, left=True)
            with torch.no_grad():
                output_ids = model.generate(input_ids=ids, attention_mask=mask, **arguments)
            new_ids = output_ids[:, ids.shape[1] :].tolist()
            generated += [row[: row.index(END)] if END in row else row for row in new_ids]
        return generated

    def ours() -> list[list[int]]:
        requests = [GenerationRequest(ids, number) for number, ids in enumerate(prompts)]
        return [candidates[0] for candidates in generator.generate_all(model, requests)]

    return {
        "ours": ours,
        "rows": lambda: generate_batches(1),
        "mixed": lambda: generate_batches(rows),
        "rows_again": lambda: generate_batches(1),
    }


def timed(action: Any, generated: dict[str, Any], side: str) -> Any:
    """Return a function that generates, stores the result and returns tokens per second."""

    def run() -> float:
        start_s = time.perf_counter()
        generated[side] = action()
        return sum(map(len, generated[side])) / (time.perf_counter() - start_s)

    return run


if __name__ == "__main__":
    main()
