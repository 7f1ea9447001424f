"""The prototypes of labels: mean vectors of examples of the training data, made once before a model is asked."""

from __future__ import annotations

import numpy as np
import torch

from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import DataError
from dist_ft.data.batch import Batch
from dist_ft.data.batching.loader import assemble_batch
from dist_ft.data.encoding.make_encoder import (
    make_encoder,
)
from dist_ft.data.encoding.prompt_templates import ALL_EXAMPLES
from dist_ft.model.prototypes import PrototypeModel
from dist_ft.runtime.bootstrap.few_shot_examples import (
    examples,
)

ROWS = 32
"""Examples at once."""


def learn(
    module: PrototypeModel, config: RunConfig, tokenizer: object, device: torch.device
) -> None:
    """Give `module`, which lies on `device`, the prototypes of prompting.shots examples a label.

    Raises DataError if the training data have no example of a label.
    """
    task = config.task
    drawn = examples(config, config.prompting.shots or ALL_EXAMPLES)
    absent = sorted(set(range(len(task.labels))) - {sample.label for sample in drawn})
    if absent:
        raise DataError(
            f"data.train: has no row with the label {task.labels[absent[0]]}, so no prototype can be made; "
            "rows of each label are needed; add some, or take it from task.labels"
        )
    names = task.columns
    rows = [
        {
            names.text: one.first,
            **({names.pair: one.second} if names.pair else {}),
            names.label: task.labels[one.label],
        }
        for one in drawn
    ]
    section = config.reading.model_copy(update={"overlong": "truncate"})
    encoded = make_encoder(tokenizer, section, task, config.batch.sequence_length).encode(
        rows, "data.train"
    )
    sizes = np.diff(encoded.offsets)
    order = np.argsort(sizes, kind="stable")
    vectors = torch.empty(0)
    with torch.inference_mode():
        found = []
        for start in range(0, len(order), ROWS):
            given = module.prepare_inputs(
                _batch(
                    encoded.tokens, encoded.targets, encoded.offsets, order[start : start + ROWS]
                ),
                device,
            )
            found.append(module.embed(given["ids"], given["mask"]).cpu())
        vectors = torch.cat(found)
    module.fit_prototypes(
        vectors.clone(), torch.tensor([drawn[place].label for place in order]), len(task.labels)
    )


def _batch(tokens: np.ndarray, labels: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> Batch:
    """Return some rows as one padded batch."""
    ranges = [slice(offsets[row], offsets[row + 1]) for row in rows]
    segments = np.array(
        [(row, 0, own.stop - own.start, 0) for row, own in zip(rows, ranges, strict=True)], np.int64
    )
    return assemble_batch(
        np.concatenate([tokens[own] for own in ranges]),
        np.concatenate([labels[own] for own in ranges]),
        segments,
        np.arange(len(rows)),
        0,
    )
