"""From a run to a folder that is handed on: exported, with int8 weights if asked, measured, and with a model card.

Guarantees: the folder appears whole or not at all (`checkpoint.export`); every number of the table and the card was
measured here or by the run itself. Scores need `evaluation.data`; without it only logits are compared.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from dist_ft.checkpoint import export
from dist_ft.checkpoint.manifest import Manifest
from dist_ft.config.load import STORED, load_config
from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError
from dist_ft.model.loading import int8
from dist_ft.model.loading.load import told
from dist_ft.runs import model_card
from dist_ft.storage.filesystem import Store

Table = dict[str, tuple[float, float]]
"""Of each measure, its value before and after."""
TOKENS, PASSES = 32, 20
"""Of the text whose latency is measured; times it is asked."""


def ship(
    url: str,
    out: str,
    *,
    step: int | None = None,
    dtype: str | None = None,
    adapter: bool = False,
    best: bool = False,
    as_int8: bool = False,
    average: bool | None = None,
) -> Table | None:
    """Export the run at `url` into the local folder `out`; return what int8 weights changed, if they were asked for.

    See `export_run` for the arguments. Raises CheckpointError, ConfigError, ModelError; then there is no folder.
    """
    if as_int8 and adapter:
        raise ConfigError(
            [
                "--int8: with --adapter only an adapter is written, in float32; one of them is allowed; "
                "leave one out"
            ],
            "export",
        )
    if as_int8:
        int8.require()
    store = Store(url)
    found: list[Table] = []

    def finish(folder: Path, manifest: Manifest) -> None:
        if as_int8:
            found.append(_shrink(store, folder))
        if not adapter:
            table = found[0] if found else None
            (folder / "README.md").write_text(
                model_card.render(store, manifest, folder, table), "utf-8"
            )

    export.export_run(
        url, out, step=step, dtype=dtype, adapter=adapter, best=best, finish=finish, average=average
    )
    return found[0] if found else None


def _shrink(store: Store, folder: Path) -> Table:
    """Replace the model in `folder` by itself with int8 weights; return measures before and after."""
    small = folder.with_name("int8")
    task = export.stored_task(store)
    int8.quantise(folder, small, task)
    table = compare(folder, small, _with_data(store))
    about = json.loads((small / export.ABOUT).read_text("utf-8"))
    (small / export.ABOUT).write_text(json.dumps({**about, "int8": table}, indent=1), "utf-8")
    shutil.rmtree(folder)
    small.rename(folder)
    return table


def _with_data(store: Store) -> RunConfig | None:
    """Return the run's config if it has held-out data."""
    config = load_config(store.full(STORED)) if store.exists(STORED) else None
    return config if config is not None and config.evaluation.data else None


def compare(before: Path, after: Path, config: RunConfig | None) -> Table:
    """Return size, latency and scores of two model folders: {measure: (before, after)}.

    Args:
        before: folder.
        after: folder; the difference of its logits from those of `before` counts relative to the largest.
        config: what to score on (`evaluate_models`); None: no scores.
    """
    from dist_ft.inference.evaluate import evaluate_models

    models = [_loaded(folder) for folder in (before, after)]
    logits = [told(model) for model in models]
    table: Table = {
        "MB on disk": (_megabytes(before), _megabytes(after)),
        f"ms for {TOKENS} tokens": (_latency_ms(models[0]), _latency_ms(models[1])),
        "logits, largest relative difference": (
            0.0,
            ((logits[1] - logits[0]).abs().max() / logits[0].abs().max()).item(),
        ),
    }
    del models
    if config is not None:
        here = config.model_copy(
            update={"cluster": config.cluster.model_copy(update={"workers": 0})}
        )
        scores = evaluate_models(here, [str(before), str(after)])
        first, second = scores[str(before)], scores[str(after)]
        table |= {
            name: (float(first[name]), float(second[name]))
            for name in first
            if isinstance(first[name], int | float) and name != "num_target_tokens"
        }
    return table


def _loaded(folder: Path) -> Any:
    from transformers import AutoConfig

    from dist_ft.model import heads
    from dist_ft.model.loading.load import options

    config = AutoConfig.from_pretrained(folder)
    task = export.about_task(folder)
    model: Any = heads.auto_class(task).from_pretrained(
        folder, dtype=config.dtype, **options(config, task)
    )
    return model.eval()


def _megabytes(folder: Path) -> float:
    return sum(item.stat().st_size for item in folder.rglob("*") if item.is_file()) / 1e6


def _latency_ms(model: Any) -> float:
    """Return the median time of one forward of one text on this machine."""
    import torch

    tokens = (torch.arange(TOKENS) * 7919 + 11)[None] % model.config.get_text_config().vocab_size
    given = {"decoder_input_ids": tokens[:, :1]} if model.config.is_encoder_decoder else {}
    times = []
    with torch.inference_mode():
        for number in range(PASSES + 3):
            begun = time.perf_counter()
            model(input_ids=tokens, **given)
            if number >= 3:  # the first ones make what later ones find made
                times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1000
