"""Export a run as a folder to hand on: weights (int8 if requested), measurements, model card.

The folder appears whole or not at all (`checkpoint.export`). Every number in the table and the card
was measured here or by the run itself. Scores need `evaluation.data`; without it only logits are
compared.
"""

from __future__ import annotations

import json
import logging
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_ft.checkpoint import export, trained_model
from dist_ft.checkpoint.export import ExportOptions
from dist_ft.checkpoint.manifest import Manifest
from dist_ft.config.load import STORED
from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError, DataError
from dist_ft.model.loading import int8
from dist_ft.model.loading.load import probe_outputs
from dist_ft.pretrained import pretrained_model
from dist_ft.pretrained.pretrained_model import Source
from dist_ft.runs import model_card, stored_run
from dist_ft.runs.model_card import BeforeAfter
from dist_ft.storage import filesystem
from dist_ft.storage.documents import read_local_json_object
from dist_ft.storage.filesystem import Store

log = logging.getLogger("dist_ft.run")
LATENCY_TOKENS = 32
"""Length of the text whose latency is measured, in tokens."""
LATENCY_PASSES = 20
"""Timed forward passes."""
WARMUP_PASSES = 3
"""Forward passes before the timed ones, which allocate what later ones reuse."""


def export_model(
    run: RunConfig | str, out: str, options: ExportOptions, *, as_int8: bool = False
) -> dict[str, BeforeAfter] | None:
    """Export a run into the local folder `out`.

    Returns what int8 weights changed, if they were requested.

    Args:
        run: the run's config, or the URL of its folder. A folder does not decide where requests go:
            held-out data that it names in other places than its own are not read, and the model is
            not scored on them.
        out: local folder to write.
        options: which weights to export.
        as_int8: store the weights of linear layers as 8-bit integers.

    Raises:
        CheckpointError, ConfigError, ModelError: nothing was written.
    """
    if as_int8 and options.adapter:
        raise ConfigError(
            ["--int8: cannot be combined with --adapter, which is written in float32. Use one."],
            "export",
        )
    if as_int8:
        # Before the weights are read and merged, which takes minutes for a large model.
        int8.require_torchao()

    named: tuple[str, ...] = ()
    if isinstance(run, RunConfig):
        filesystem.configure(run.storage.options)
        named = stored_run.named_places(run)
        run = run.run_url
    url = run

    store = Store(url)
    changes: dict[str, BeforeAfter] | None = None

    # Runs while the folder has a temporary name, so that a failure here leaves nothing behind.
    def finish(folder: Path, manifest: Manifest) -> None:
        nonlocal changes
        if as_int8:
            changes = _quantize(store, folder, named)

        # After quantization: the card lists what it changed.
        if not options.adapter:
            card = model_card.render(store, manifest, folder, changes)
            (folder / "README.md").write_text(card, "utf-8")

    export.export_run(url, out, options, finish)
    return changes


def _quantize(store: Store, folder: Path, named: Sequence[str]) -> dict[str, BeforeAfter]:
    """Replace the model in `folder` by itself with int8 weights; return what changed."""
    # A sibling, so that the rename below stays within one filesystem.
    quantized = folder.with_name("int8")
    int8.quantize_int8(folder, quantized, trained_model.load_task(store))
    changes = compare(folder, quantized, _config_to_score_by(store, named))

    about = read_local_json_object(quantized / export.INFO_FILE)
    about["int8"] = changes
    (quantized / export.INFO_FILE).write_text(json.dumps(about, indent=1), "utf-8")

    shutil.rmtree(folder)
    quantized.rename(folder)
    return changes


def _config_to_score_by(store: Store, named: Sequence[str]) -> RunConfig | None:
    """Return the run's config if it has held-out data that may be read."""
    if not store.exists(STORED):
        return None

    config = stored_run.config_to_score_by(store)
    if not config.evaluation.data:
        return None

    remedy = "Export by the run's config (dist-ft export CONFIG --int8) to score it."
    try:
        stored_run.require_readable(store, config.evaluation.data, "evaluation.data", named, remedy)
    except DataError as error:
        log.warning("int8 weights are not scored: %s", error)
        return None
    return config


def compare(before: Path, after: Path, config: RunConfig | None) -> dict[str, BeforeAfter]:
    """Return size, latency and scores of two model folders, by measure.

    Args:
        before: folder of the reference model.
        after: folder of the other model. The difference of its logits counts relative to the
            largest logit of the reference.
        config: the run to score on (`evaluate_models`); None: no scores.
    """
    from dist_ft.inference.evaluate import evaluate_models

    model_before = _load(before)
    model_after = _load(after)

    logits_before = probe_outputs(model_before)
    logits_after = probe_outputs(model_after)

    # Relative to the largest logit: next to a single logit near 0 any difference looks large.
    largest_difference = (logits_after - logits_before).abs().max() / logits_before.abs().max()

    latency = BeforeAfter(_latency_ms(model_before), _latency_ms(model_after))
    changes = {
        "MB on disk": BeforeAfter(_megabytes(before), _megabytes(after)),
        f"ms for {LATENCY_TOKENS} tokens": latency,
        "logits, largest relative difference": BeforeAfter(0.0, largest_difference.item()),
    }

    # Evaluation loads the models again; both copies might not fit into memory.
    del model_before, model_after

    if config is not None:
        scores = evaluate_models(config, [str(before), str(after)])
        first, second = scores[str(before)], scores[str(after)]
        for name, value in first.items():
            if isinstance(value, int | float) and name != "num_target_tokens":
                changes[name] = BeforeAfter(float(value), float(second[name]))

    return changes


def _load(folder: Path) -> Any:
    from dist_ft.model import heads
    from dist_ft.model.loading.load import extra_model_kwargs

    source = Source(str(folder), str(folder))
    config = pretrained_model.read_config(source)
    task = export.read_exported_task(folder)
    model: Any = pretrained_model.read_model(
        source, heads.auto_class(task), dtype=config.dtype, **extra_model_kwargs(config, task)
    )
    return model.eval()


def _megabytes(folder: Path) -> float:
    num_bytes = 0
    for item in folder.rglob("*"):
        if item.is_file():
            num_bytes += item.stat().st_size
    return num_bytes / 1e6


def _latency_ms(model: Any) -> float:
    """Return the median time of one forward pass over one text on this machine."""
    import torch

    # Spread over the vocabulary without a random generator: both models get the same tokens.
    vocab_size = model.config.get_text_config().vocab_size
    tokens = (torch.arange(LATENCY_TOKENS) * 7919 + 11)[None] % vocab_size  # (1, T)

    kwargs = {}
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = tokens[:, :1]  # (1, 1)

    times = []
    with torch.inference_mode():
        for _ in range(WARMUP_PASSES + LATENCY_PASSES):
            started = time.perf_counter()
            model(input_ids=tokens, **kwargs)
            times.append(time.perf_counter() - started)

    # The median ignores passes that another process interrupted.
    return statistics.median(times[WARMUP_PASSES:]) * 1000
