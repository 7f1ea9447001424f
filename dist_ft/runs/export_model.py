"""Export a run as a folder to hand on: weights (int8 if requested), measurements, model card.

The folder appears whole or not at all (`checkpoint.export`). Every number in the table and the card
was measured here or by the run itself. Scores need `evaluation.data`; without it only logits are
compared.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from dist_ft.checkpoint import export, trained_model
from dist_ft.checkpoint.export import ExportOptions
from dist_ft.checkpoint.manifest import Manifest
from dist_ft.config.load import STORED, load_stored_config
from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError
from dist_ft.model.loading import int8
from dist_ft.model.loading.load import probe_outputs
from dist_ft.runs import model_card
from dist_ft.runs.model_card import BeforeAfter
from dist_ft.storage.filesystem import Store

LATENCY_TOKENS = 32
"""Length of the text whose latency is measured, in tokens."""
LATENCY_PASSES = 20
"""Timed forward passes."""
WARMUP_PASSES = 3
"""Forward passes before the timed ones, which allocate what later ones reuse."""


def export_model(
    url: str, out: str, options: ExportOptions, *, as_int8: bool = False
) -> dict[str, BeforeAfter] | None:
    """Export the run at `url` into the local folder `out`.

    Returns what int8 weights changed, if they were requested.

    Args:
        url: folder of the run.
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
        int8.require_torchao()

    store = Store(url)
    changes: dict[str, BeforeAfter] | None = None

    def finish(folder: Path, manifest: Manifest) -> None:
        nonlocal changes
        if as_int8:
            changes = _quantize(store, folder)
        if not options.adapter:
            card = model_card.render(store, manifest, folder, changes)
            (folder / "README.md").write_text(card, "utf-8")

    export.export_run(url, out, options, finish)
    return changes


def _quantize(store: Store, folder: Path) -> dict[str, BeforeAfter]:
    """Replace the model in `folder` by itself with int8 weights; return what changed."""
    quantized = folder.with_name("int8")
    int8.quantize_int8(folder, quantized, trained_model.load_task(store))
    changes = compare(folder, quantized, _config_with_data(store))

    about = json.loads((quantized / export.INFO_FILE).read_text("utf-8"))
    about["int8"] = changes
    (quantized / export.INFO_FILE).write_text(json.dumps(about, indent=1), "utf-8")
    shutil.rmtree(folder)
    quantized.rename(folder)
    return changes


def _config_with_data(store: Store) -> RunConfig | None:
    """Return the run's config if it has held-out data."""
    if not store.exists(STORED):
        return None
    config = load_stored_config(store)
    return config if config.evaluation.data else None


def compare(before: Path, after: Path, config: RunConfig | None) -> dict[str, BeforeAfter]:
    """Return size, latency and scores of two model folders, by measure.

    Args:
        before: folder of the reference model.
        after: folder of the other model. The difference of its logits counts relative to the
            largest logit of the reference.
        config: the run to score on (`evaluate_models`); None: no scores.
    """
    from dist_ft.inference.evaluate import evaluate_models

    models = [_load(folder) for folder in (before, after)]
    logits_before, logits_after = [probe_outputs(model) for model in models]
    largest_difference = (logits_after - logits_before).abs().max() / logits_before.abs().max()
    changes = {
        "MB on disk": BeforeAfter(_megabytes(before), _megabytes(after)),
        f"ms for {LATENCY_TOKENS} tokens": BeforeAfter(*[_latency_ms(model) for model in models]),
        "logits, largest relative difference": BeforeAfter(0.0, largest_difference.item()),
    }
    del models  # evaluation loads them again

    if config is not None:
        in_process = config.cluster.model_copy(update={"workers": 0})
        scores = evaluate_models(
            config.model_copy(update={"cluster": in_process}), [str(before), str(after)]
        )
        first, second = scores[str(before)], scores[str(after)]
        for name, value in first.items():
            if isinstance(value, int | float) and name != "num_target_tokens":
                changes[name] = BeforeAfter(float(value), float(second[name]))
    return changes


def _load(folder: Path) -> Any:
    from transformers import AutoConfig

    from dist_ft.model import heads
    from dist_ft.model.loading.load import extra_model_kwargs

    config = AutoConfig.from_pretrained(folder)
    task = export.read_exported_task(folder)
    model: Any = heads.auto_class(task).from_pretrained(
        folder, dtype=config.dtype, **extra_model_kwargs(config, task)
    )
    return model.eval()


def _megabytes(folder: Path) -> float:
    return sum(item.stat().st_size for item in folder.rglob("*") if item.is_file()) / 1e6


def _latency_ms(model: Any) -> float:
    """Return the median time of one forward pass over one text on this machine."""
    import torch

    vocab_size = model.config.get_text_config().vocab_size
    tokens = (torch.arange(LATENCY_TOKENS) * 7919 + 11)[None] % vocab_size  # (1, T)
    kwargs = {"decoder_input_ids": tokens[:, :1]} if model.config.is_encoder_decoder else {}
    times = []
    with torch.inference_mode():
        for _ in range(WARMUP_PASSES + LATENCY_PASSES):
            started = time.perf_counter()
            model(input_ids=tokens, **kwargs)
            times.append(time.perf_counter() - started)
    return statistics.median(times[WARMUP_PASSES:]) * 1000
