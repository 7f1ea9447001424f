"""B12: texts made a second: ours, in batches / a loop over rows.

    python tests/benchmarks/b12_generate.py

A Llama of 13 M random weights, prompts of 4 to 96 tokens, 16 new tokens each, float32, one thread. *Ours* is
`dist_ft.model.generation` with 12 rows at once, those of like length together; *rows* is transformers' `generate`, called
for one row after the other, as evaluation scripts do; *mixed* is transformers' `generate` on batches of 12 in the order
of the data, which shows what sorting by length is worth. Greedy, beam search and sampling; of the deterministic ones
the texts are compared.
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
    """What texts need of one."""

    eos_token_id, pad_token_id = END, 0


def main() -> None:
    """Measure, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--rows", type=int, default=12, help="at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="JSON file to write instead of results/b12_generate.json")
    args = parser.parse_args()
    harness.require_one_thread()
    environment = harness.describe_environment()
    model, prompts = make(args.prompts)
    table, result = [], {}
    for name, fields in STRATEGIES.items():
        texts: dict[str, Any] = {}
        sides = {
            side: timed(action, texts, side)
            for side, action in actions(model, prompts, fields, args.rows).items()
        }
        for side in sides.values():
            side()  # what is made once
        speeds = harness.alternate_sides(sides, args.rounds)
        ratios = {
            f"ours_over_{side}": harness.ratio(speeds["ours"], speeds[side])
            for side in ("rows", "mixed")
        }
        control = harness.ratio(speeds["rows_again"], speeds["rows"])
        same = (
            None
            if name == "sample"
            else sum(a == b for a, b in zip(texts["ours"], texts["rows"], strict=True))
        )
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
        "B12 tokens a second",
        (
            "",
            "ours",
            "rows",
            "mixed",
            "ours / rows [95 %]",
            "goal",
            "ours / mixed",
            "control",
            "same texts",
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


def make(count: int) -> tuple[Any, list[Any]]:
    """Return a model and prompts."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
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
    rng = np.random.default_rng(0)
    return model, [rng.integers(3, VOCABULARY, rng.integers(4, 97)) for _ in range(count)]


def actions(model: Any, prompts: list[Any], fields: dict[str, Any], rows: int) -> dict[str, Any]:
    """Return what each side does: a function that returns the texts as tokens."""
    import torch

    from dist_ft.config.sections.decoding import DecodingSection
    from dist_ft.model.generation import GenerationRequest, TextGenerator, pad_rows

    decoder = TextGenerator(
        DecodingSection(max_new_tokens=NEW_TOKENS, batch_size=rows, **fields), Tokenizer()
    )
    given = {
        "max_new_tokens": NEW_TOKENS,
        "pad_token_id": 0,
        "do_sample": fields.get("strategy") == "sample",
        "top_k": 0,
        "num_beams": fields.get("num_beams", 1),
        "top_p": fields.get("top_p", 1.0),
    }

    def plainly(size: int) -> list[list[int]]:
        texts = []
        for start in range(0, len(prompts), size):
            ids, mask = pad_rows(prompts[start : start + size], 0, left=True)
            with torch.no_grad():
                made = model.generate(input_ids=ids, attention_mask=mask, **given)[
                    :, ids.shape[1] :
                ].tolist()
            texts += [row[: row.index(END)] if END in row else row for row in made]
        return texts

    def ours() -> list[list[int]]:
        return [
            texts[0]
            for texts in decoder.generate_all(
                model, [GenerationRequest(ids, number) for number, ids in enumerate(prompts)]
            )
        ]

    return {
        "ours": ours,
        "rows": lambda: plainly(1),
        "mixed": lambda: plainly(rows),
        "rows_again": lambda: plainly(1),
    }


def timed(action: Any, texts: dict[str, Any], side: str) -> Any:
    """Return a function that makes the texts, keeps them and returns tokens a second."""

    def run() -> float:
        start_s = time.perf_counter()
        texts[side] = action()
        return sum(map(len, texts[side])) / (time.perf_counter() - start_s)

    return run


if __name__ == "__main__":
    main()
