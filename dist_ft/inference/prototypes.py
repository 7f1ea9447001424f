"""Prototypes of labels: mean vectors of training examples, computed before a model is scored."""

from __future__ import annotations

import numpy as np
import torch

from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.core.errors import DataError
from dist_ft.data.batch import Batch
from dist_ft.data.batching.loader import assemble_batch
from dist_ft.data.encoding.make_encoder import make_encoder
from dist_ft.data.encoding.prompt_templates import ALL_EXAMPLES
from dist_ft.data.encoding.task_rows import Sample
from dist_ft.data.sources.discovery import Row
from dist_ft.model.prototypes import PrototypeModel
from dist_ft.runtime.bootstrap.few_shot_examples import draw_examples

BATCH_ROWS = 32
"""Examples in a forward pass."""


def fit_prototypes(module: PrototypeModel, run: ResolvedRun, device: torch.device) -> None:
    """Set the prototypes of `module`, on `device`, from prompting.shots examples per label.

    Raises DataError if the training data has no example of a label.
    """
    task, config = run.task, run.config
    samples = draw_examples(run, config.prompting.shots or ALL_EXAMPLES)
    absent = sorted(set(range(len(task.labels))) - {sample.label for sample in samples})
    if absent:
        raise DataError(
            f"data.train: has no row with the label {task.labels[absent[0]]}, so it can have no "
            "prototype. Rows of each label are needed. Add some, or remove the label from "
            "task.labels."
        )

    section = config.effective_data.model_copy(update={"overlong": "truncate"})
    encoder = make_encoder(run.tokenizer, section, task, config.batch.sequence_length)
    encoded = encoder.encode([_as_row(sample, run) for sample in samples], "data.train")
    by_length = np.argsort(np.diff(encoded.offsets), kind="stable")
    vectors = []
    with torch.inference_mode():
        for start in range(0, len(by_length), BATCH_ROWS):
            rows = by_length[start : start + BATCH_ROWS]
            batch = _batch(encoded.tokens, encoded.targets, encoded.offsets, rows)
            inputs = module.prepare_inputs(batch, device)
            vectors.append(module.embed(inputs["ids"], inputs["mask"]).cpu())  # (B, H)
    labels = torch.tensor([samples[row].label for row in by_length])
    # a clone outside of inference mode, so that autograd accepts it
    module.fit_prototypes(torch.cat(vectors).clone(), labels, len(task.labels))


def _as_row(sample: Sample, run: ResolvedRun) -> Row:
    """Return the row a sample was read from, as far as the encoder reads it."""
    columns = run.task.columns
    row = {columns.text: sample.first, columns.label: run.task.labels[sample.label]}
    if columns.pair:
        row[columns.pair] = sample.second
    return row


def _batch(tokens: np.ndarray, labels: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> Batch:
    """Return some rows as one padded batch (B, T)."""
    ranges = [slice(offsets[row], offsets[row + 1]) for row in rows]
    segments = np.array(
        [(row, 0, own.stop - own.start, 0) for row, own in zip(rows, ranges, strict=True)],
        np.int64,
    )
    return assemble_batch(
        np.concatenate([tokens[own] for own in ranges]),
        np.concatenate([labels[own] for own in ranges]),
        segments,
        np.arange(len(rows)),
        0,
    )
