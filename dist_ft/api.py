"""The Python API: `from dist_ft import load_config, train`.

    config = load_config("configs/single.yaml", ["schedule.steps=20"])
    result = train(config)
    export(config, "out/")

A thin layer: it only decides where a run happens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError

if TYPE_CHECKING:
    from dist_ft.data.batching.loader import Loader
    from dist_ft.inference.predict_folder import WrittenPredictions
    from dist_ft.runs.model_card import BeforeAfter
    from dist_ft.runs.report import Report
    from dist_ft.training.callbacks import Callback
    from dist_ft.training.result import Result
    from dist_ft.workflows.search_report import SearchReport
    from dist_ft.workflows.stages_report import StagesReport


class WrittenShards(NamedTuple):
    """How many shards a data set has, and how many of them were written by this call."""

    shards: int
    written_now: int


def check(config: RunConfig) -> list[str]:
    """Return one line for each problem that would stop this run and can be found without a GPU."""
    from dist_ft.runtime.preflight import check_run

    return check_run.check(config)


def preview(config: RunConfig, num_samples: int = 3, *, markup: bool = False) -> str:
    """Return the first samples with target tokens marked, and the statistics of an epoch.

    Tokenizes the training data (cached for the run). Writes nothing to the run's storage.

    Args:
        config: the run.
        num_samples: number of samples to show.
        markup: mark target tokens in rich's markup instead of [[ ]].
    """
    from dist_ft.data.tools import preview as previews

    with _opened(config) as loader:
        return previews.preview(loader, num_samples, markup)


def pack_stats(config: RunConfig) -> str:
    """Return a table of how full sequences are at batch.sequence_length, its half, its double."""
    from dist_ft.data.tools import preview as previews

    with _opened(config) as loader:
        return previews.pack_stats(loader)


def write_data(
    config: RunConfig,
    out: str,
    suffix: str = "parquet",
    shard_mib: float = 64,
    tokenize: bool = False,
) -> WrittenShards:
    """Write the training data as new shards into the folder `out`.

    Args:
        config: the run. Its data.train is read; with `tokenize` also its tokenizer, template and
            data fields.
        out: folder or fsspec URL.
        suffix: parquet or jsonl.
        shard_mib: source data in a shard, in MiB.
        tokenize: write `input_ids` and `targets` instead of rows.
    """
    from dist_ft.checkpoint import initial_weights
    from dist_ft.data.tools.rewrite import rewrite_blocks
    from dist_ft.runtime.bootstrap.build_data import build_block_store
    from dist_ft.storage import filesystem

    filesystem.configure(config.storage.options)
    if tokenize and config.task.name != "causal_lm":
        raise ConfigError(
            [
                f"--tokenize: not supported for task.name={config.task.name}, whose rows also hold "
                "labels. Only causal_lm is allowed. Write rows instead."
            ],
            "data write",
        )
    model = initial_weights.resolve_for_inspection(config)
    blocks = build_block_store(config, model, shard_mib)
    try:
        written = rewrite_blocks(blocks, filesystem.Store(out), suffix, tokenize)
        return WrittenShards(len(blocks.blocks), written)
    finally:
        blocks.close()


@contextmanager
def _opened(config: RunConfig) -> Iterator[Loader]:
    """Yield a loader over the training data that writes nothing to the run's storage."""
    from uuid import uuid4

    from dist_ft.checkpoint import initial_weights
    from dist_ft.core.world import World, collectives
    from dist_ft.runtime.bootstrap.build_data import build_training_loader
    from dist_ft.runtime.bootstrap.resolve_run import resolve_data
    from dist_ft.storage import filesystem

    filesystem.configure(config.storage.options)
    store, world = filesystem.Store(f"memory://preview-{uuid4().hex}"), World()
    comms = collectives(world)
    model = initial_weights.resolve_for_inspection(config)
    run = resolve_data(config, model, store, world, comms)
    loader = build_training_loader(run, store, world, comms)
    try:
        yield loader
    finally:
        loader.store.close()


def train(
    config: RunConfig, *, callbacks: Sequence[Callback] = (), skip_check: bool = False
) -> Result:
    """Train `config` to its end, or resume the run of that name in its storage; return its result.

    Trains in this process if `cluster.workers` is 0 or torchrun started it (RANK is set), else on
    Ray workers.

    Args:
        config: the run.
        callbacks: called in this order during training (see `dist_ft.Callback`). Only where
            training runs in this process.
        skip_check: start without `check`.

    Raises:
        ConfigError: with all problems that `check` finds, before anything starts.
    """
    from dist_ft.training.callbacks import CallbackList

    by_torchrun = "RANK" in os.environ
    in_this_process = config.max_workers == 0 or by_torchrun
    if callbacks and not in_this_process:
        raise ConfigError(
            [
                f"callbacks: not supported with cluster.workers={config.max_workers}, as workers "
                "are other processes and callbacks cannot be named by import path yet. Use "
                "cluster.workers=0 or torchrun, or leave callbacks out."
            ],
            f"run {config.run.name!r}",
        )
    callback_list = CallbackList(callbacks)
    if not skip_check and os.environ.get("RANK", "0") == "0":
        problems = check(config)
        if problems:
            raise ConfigError(problems, f"run {config.run.name!r}")
    if in_this_process:
        from dist_ft.runtime import local
        from dist_ft.training.run_context import RunContext

        return local.run(config, RunContext(callbacks=callback_list))
    from dist_ft.runtime.ray_backend import driver

    return driver.run(config)


def stages(
    file: str,
    overrides: Sequence[str] = (),
    *,
    skip_check: bool = False,
    say: Callable[[str], None] = print,
) -> StagesReport:
    """Run or resume the stages in a YAML file; return the matrix of what the model retains.

    Args:
        file: path or URL of the stages file.
        overrides: section.field=value, set in every stage's config.
        skip_check: start each run without `check`.
        say: receives progress lines.
    """
    from dist_ft.config.stages import load_stages
    from dist_ft.workflows import run_stages

    return run_stages.run(
        load_stages(file, overrides), lambda config: train(config, skip_check=skip_check), say
    )


def tune(
    config: str, search: str, overrides: Sequence[str] = (), *, say: Callable[[str], None] = print
) -> SearchReport:
    """Run or resume the search in `search` over the config file `config`; return its trials.

    Args:
        config: path or URL of the config.
        search: path or URL of the search file.
        overrides: section.field=value, set in every trial's config.
        say: receives progress lines.
    """
    from dist_ft.config.search import load_search
    from dist_ft.workflows import search as searches

    return searches.run(load_search(config, search, overrides), say)


def export(
    run: RunConfig | str,
    out: str,
    *,
    step: int | None = None,
    dtype: str | None = None,
    adapter: bool = False,
    best: bool = False,
    int8: bool = False,
    average: bool | None = None,
) -> dict[str, BeforeAfter] | None:
    """Write a checkpoint as a Hugging Face folder with a model card, reload it, compare its logits.

    Returns what int8 weights changed, {measure: (before, after)}, or None without `int8`.

    Args:
        run: the run's config, or the URL of its folder (<run.storage>/<run.name>).
        out: local folder to write.
        step: step of the checkpoint. Default: the latest.
        dtype: float32 or bfloat16 of the exported weights. Default: as the model was trained.
        adapter: write the adapter alone, for `peft`. Default: merge it into the weights.
        best: export the best checkpoint by checkpoint.best_by.
        int8: 8-bit weights of linear layers (torchao); size, latency and scores are measured.
        average: export the moving average of the weights (tuning.ema_decay). Default: if that is
            what evaluations used.
    """
    from dist_ft.runs.export_model import export_model
    from dist_ft.storage import filesystem

    if isinstance(run, RunConfig):
        filesystem.configure(run.storage.options)
        run = run.run_url
    return export_model(
        run, out, step=step, dtype=dtype, adapter=adapter, best=best, as_int8=int8, average=average
    )


def predict(
    model: str,
    paths: str | Sequence[str],
    out: str,
    *,
    workers: int = 0,
    form: str = "jsonl",
    batch: int = 32,
    max_new_tokens: int = 128,
    strategy: str = "greedy",
) -> WrittenPredictions:
    """Write a prediction for every row of files into a file or a folder of shards.

    Args:
        model: folder, URL or hub name.
        paths: files, folders, globs or URLs of rows; `dist-ft predict --help` lists their columns.
        out: local file (.jsonl), or folder or URL for shards. Output of the same rows is resumed.
        workers: Ray workers, each with the model, that write shards; 0: this process.
        form: format of shards, jsonl or parquet.
        batch: rows in a batch.
        max_new_tokens: maximum length of generated text, in tokens.
        strategy: decoding strategy: greedy, beam:4, sample:0.7, ...
            (`config.sections.decoding.parse_strategy`).

    Raises:
        ConfigError, DataError, ModelError: with one clear line.
    """
    from dist_ft.config.schema import Source
    from dist_ft.data.sources import readers
    from dist_ft.data.sources.discovery import discover_shards
    from dist_ft.inference.model_folder import PredictionOptions
    from dist_ft.inference.predict import Predictor
    from dist_ft.inference.predict_folder import WrittenPredictions, predict_folder
    from dist_ft.inference.prediction_file import predict_file
    from dist_ft.inference.prediction_shards import ENCODERS

    if form not in ENCODERS:
        raise ConfigError(
            [f"--format={form}: unknown format. Allowed: {', '.join(ENCODERS)}."],
            "predict",
        )
    if out.endswith(".jsonl") and (workers or form != "jsonl"):
        raise ConfigError(
            [
                f"--out={out}: a single file is written by one process as JSON Lines. Use a folder "
                "for --workers or --format."
            ],
            "predict",
        )
    names = [paths] if isinstance(paths, str) else list(paths)
    shards = [
        shard
        for found in discover_shards([Source(path=path) for path in names], "PATH")
        for shard in found
    ]
    options = PredictionOptions(batch, max_new_tokens, strategy)
    if out.endswith(".jsonl"):
        rows = (row for shard in shards for row in readers.iter_rows(shard))
        return WrittenPredictions(1, predict_file(Predictor(model, options), rows, out))
    return predict_folder(model, shards, out, options, suffix=form, workers=workers)


def evaluate(
    config: RunConfig, models: str | Sequence[str] = (), *, random_head: bool = False
) -> dict[str, dict[str, Any]]:
    """Return {model: metrics} on the config's held-out data, without training.

    Args:
        config: its task, evaluation.data and batch are used.
        models: folders, URLs or hub names. Default: model.path.
        random_head: also score a head that was never trained; otherwise that is an error.
    """
    from dist_ft.inference.evaluate import evaluate_models

    paths = [models] if isinstance(models, str) else list(models)
    return evaluate_models(config, paths or [config.model.path], random_head)


def report(run: RunConfig | str) -> Report:
    """Return a run's report as JSON values: curves, tables, most confident errors, config."""
    from dist_ft.runs.report import gather
    from dist_ft.storage import filesystem

    if isinstance(run, RunConfig):
        filesystem.configure(run.storage.options)
        run = run.run_url
    return gather(run)


def next_step(folder: str) -> str:
    """Return the command that tries an exported folder, chosen by its model's task."""
    import json
    from pathlib import Path

    from dist_ft.checkpoint.export import INFO_FILE

    task = json.loads((Path(folder).expanduser() / INFO_FILE).read_text("utf-8"))["task"]["name"]
    if task == "causal_lm":
        return f'dist-ft generate {folder} --prompt "..."'
    if task == "masked_lm":
        return f"train it for a task with model.path={folder}"
    return f"dist-ft predict {folder} ROWS.jsonl --out predictions.jsonl"


def generate(
    model: str,
    prompt: str,
    *,
    system: str | None = None,
    max_new_tokens: int = 128,
    strategy: str = "greedy",
) -> str:
    """Return a model folder's answer to `prompt`, through its chat template if it has one.

    Several answers (num_samples) are separated by ---.

    Args:
        model: folder, URL or hub name.
        prompt: the prompt, as a user turn if the model has a chat template.
        system: system prompt.
        max_new_tokens: maximum length of the answer, in tokens.
        strategy: decoding strategy: greedy, beam:4, sample:0.7, ...
            (`config.sections.decoding.parse_strategy`).
    """
    from dist_ft.config.sections.decoding import DecodingSection, parse_strategy
    from dist_ft.inference.generate import answer

    decoding = parse_strategy(strategy, DecodingSection(max_new_tokens=max_new_tokens))
    return "\n---\n".join(answer(model, prompt, system, decoding))
