"""Prototypes of labels: mean vectors of training examples, computed before a model is scored.

Dimensions: E examples, with L tokens in all; B rows of a batch, T tokens of the longest, H hidden
size.
"""

from __future__ import annotations

import numpy as np
import torch

from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.core.errors import DataError
from dist_ft.data.batch import Batch
from dist_ft.data.batching.assemble import assemble_batch
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
    found = {sample.label for sample in samples}
    absent = sorted(set(range(len(task.labels))) - found)
    if absent:
        raise DataError(
            f"data.train: has no row with the label {task.labels[absent[0]]}, so it can have no "
            "prototype. Rows of each label are needed. Add some, or remove the label from "
            "task.labels."
        )

    # Encoded as training rows would be, but truncated: an example that is dropped would leave its
    # label with fewer of them, or with none.
    section = config.effective_data.model_copy(update={"overlong": "truncate"})
    encoder = make_encoder(run.tokenizer, section, task, config.batch.sequence_length)
    rows = [_as_row(sample, run) for sample in samples]
    encoded = encoder.encode(rows, "data.train")

    # Rows of similar length share a batch, which saves padding; a mean does not depend on order.
    by_length = np.argsort(np.diff(encoded.offsets), kind="stable")  # (E,)
    vectors = []
    with torch.inference_mode():
        for start in range(0, len(by_length), BATCH_ROWS):
            numbers = by_length[start : start + BATCH_ROWS]
            batch = _batch(encoded.tokens, encoded.targets, encoded.offsets, numbers)
            inputs = module.prepare_inputs(batch, device)
            vectors.append(module.embed(inputs["ids"], inputs["mask"]).cpu())  # (B, H)

    labels = torch.tensor([samples[number].label for number in by_length])  # (E,)

    # A clone outside of inference mode, so that autograd accepts it.
    module.fit_prototypes(torch.cat(vectors).clone(), labels, len(task.labels))


def _as_row(sample: Sample, run: ResolvedRun) -> Row:
    """Return the row a sample was read from, as far as the encoder reads it."""
    columns = run.task.columns
    row = {columns.text: sample.first, columns.label: run.task.labels[sample.label]}
    if columns.pair:
        row[columns.pair] = sample.second
    return row


def _batch(tokens: np.ndarray, labels: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> Batch:
    """Return some rows as one padded batch (B, T).

    Args:
        tokens, labels: (L,) of all rows.
        offsets: (E + 1,) start of each row in them, and the end.
        rows: (B,) numbers of the rows.
    """
    token_parts, label_parts = [], []
    segments = np.zeros((len(rows), 4), np.int64)
    for number, row in enumerate(rows):
        own = slice(offsets[row], offsets[row + 1])
        token_parts.append(tokens[own])
        label_parts.append(labels[own])
        segments[number] = (row, 0, own.stop - own.start, 0)  # each row is one whole segment

    return assemble_batch(
        np.concatenate(token_parts),
        np.concatenate(label_parts),
        segments,
        np.arange(len(rows)),
        lane=0,
    )
