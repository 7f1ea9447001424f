"""Three kinds of fine-tuning with 8, 32 and 128 examples a class.

Six fields of requests to an assistant (intents of CLINC150, grouped). MiniLM with a new head, all
weights and the last two layers; SmolLM2 prompted for the name of the field, with only its output
matrix trained. Score, trainable parameters, memory and time of each.
"""

from __future__ import annotations

import json
import random
from typing import Any

import lab
import small_models

FIELDS = {
    "bank": "transfer transactions balance freeze_account pay_bill bill_balance interest_rate "
    "routing pin_change",
    "travel": "plug_type travel_notification flight_status timezone exchange_rate lost_luggage "
    "book_flight book_hotel carry_on",
    "food": "recipe calories nutrition_info restaurant_suggestion ingredients_list cook_time "
    "food_last meal_suggestion restaurant_reservation",
    "home": "shopping_list next_song play_music update_playlist todo_list calendar reminder "
    "smart_home order",
    "car": "traffic directions gas gas_type distance mpg oil_change_when jump_start tire_pressure",
    "work": "pto_request pto_used payday taxes insurance income rollover_401k "
    "meeting_schedule direct_deposit",
}
"""Names of fields, and some of the intents that belong to each."""
SIZES = (8, 32, 128)
HELD_OUT = 20
ENCODER_STEPS, PROMPT_STEPS = 60, 24


def guide(here: lab.Lab) -> list[str]:
    """Run the guide in one engine; return what it missed: it promises only the table."""
    encoder, causal = small_models.minilm(), small_models.smollm2(lab.say)
    training, held_out = rows(here, "train"), rows(here, "test")
    held_out_rows = [
        row
        for field in FIELDS
        for row in [one for one in held_out if one["label"] == field][:HELD_OUT]
    ]
    given = [
        f"evaluation.data={here.rows('held-out.jsonl', held_out_rows)}",
        "evaluation.every_steps=0",
        "checkpoint.every_steps=0",
        "schedule.epochs=null",
        "data.overlong=truncate",
    ]
    found = []
    for size in SIZES:
        few = [
            row
            for field in FIELDS
            for row in [one for one in training if one["label"] == field][:size]
        ]
        data = [f"data.train={here.rows(f'{size}.jsonl', few)}", *given]
        on_encoder = [
            f"model.path={encoder}",
            "task.columns.label=label",
            "batch.sequence_length=48",
            f"schedule.steps={ENCODER_STEPS}",
            *data,
        ]
        kinds = {
            "MiniLM, all weights": here.train(
                f"all-{size}",
                "intents.yaml",
                "tuning.method=full",
                "tuning.last_layers=0",
                *on_encoder,
            ),
            "MiniLM, last two layers": here.train(f"last-{size}", "intents.yaml", *on_encoder),
            "SmolLM2, prompt, output matrix": here.train(
                f"prompt-{size}",
                "prompted.yaml",
                f"model.path={causal}",
                "optimizer.learning_rate=2e-3",
                f"schedule.steps={PROMPT_STEPS}",
                *data,
            ),
        }
        for name, run in kinds.items():
            before, after = run["evaluations"][0], run["evaluations"][-1]
            found.append(
                [
                    name,
                    str(size),
                    run["trainable"],
                    before["accuracy"],
                    after["accuracy"],
                    after["f1_macro"],
                    run["seconds"],
                    run["MB"],
                ]
            )
    here.table(
        "Three kinds of fine-tuning",
        [
            "",
            "examples a class",
            "trainable parameters",
            "accuracy before",
            "accuracy after",
            "macro F1",
            "seconds",
            "MB",
        ],
        sorted(found),
    )
    return []


def rows(here: lab.Lab, part: str) -> list[dict[str, Any]]:
    """Return the rows of the fields in a part of the data, in an order drawn once."""
    field_of = {intent: field for field, intents in FIELDS.items() for intent in intents.split()}
    found = json.loads((here.data / "data" / "clinc150" / "data_small.json").read_text("utf-8"))[
        part
    ]
    mine = [
        {"text": text, "label": field_of[intent]} for text, intent in found if intent in field_of
    ]
    return random.Random(0).sample(mine, len(mine))
