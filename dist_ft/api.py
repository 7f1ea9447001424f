"""The Python API: `from dist_ft import load_config, train`.

    config = load_config("configs/single.yaml", ["schedule.steps=20"])
    result = train(config)
    export(config, "out/")

A thin layer: it checks arguments and chooses where a run trains.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from dist_ft.config.credentials import credential_problems, require_no_credentials
from dist_ft.config.schema import RunConfig
from dist_ft.config.task_facts import task_class
from dist_ft.core.errors import ConfigError

if TYPE_CHECKING:
    from dist_ft.data.batching.loader import Loader
    from dist_ft.inference.predict_folder import WrittenPredictions
    from dist_ft.runs.model_card import BeforeAfter
    from dist_ft.runs.report import Report
    from dist_ft.runtime.bootstrap.build_data import TrainingLoader
    from dist_ft.training.callbacks import Callback
    from dist_ft.training.result import Result
    from dist_ft.workflows.search_report import SearchReport
    from dist_ft.workflows.stages_report import StagesReport


class WrittenShards(NamedTuple):
    """Number of shards of the written data, and how many of them this call wrote."""

    num_shards: int
    num_written: int


def check(config: RunConfig) -> list[str]:
    """Return one line for each problem of the run that can be found before it starts."""
    from dist_ft.runtime.preflight import check_run

    return [*credential_problems(config), *check_run.check(config)]


def preview(config: RunConfig, num_samples: int = 3, *, markup: bool = False) -> str:
    """Return the first samples, with target tokens marked, and the statistics of an epoch.

    Tokenizes the training data; the run reuses the tokens. Writes nothing to the run's storage.

    Args:
        config: the run.
        num_samples: number of samples to show.
        markup: mark target tokens with markup of the `rich` library instead of [[ ]].
    """
    from dist_ft.data.tools.stream_preview import preview_any

    with _open_training_loader(config) as loader:
        return preview_any(loader, num_samples, markup)


def pack_stats(config: RunConfig) -> str:
    """Return a table of packing efficiency at half, once and twice batch.sequence_length."""
    from dist_ft.data.tools import preview as preview_tools

    # Other lengths cut other slices, so the table is of the indexed order.
    data = config.data.model_copy(update={"order": "indexed"})
    with _open_training_loader(config.model_copy(update={"data": data})) as loader:
        return preview_tools.pack_stats(cast("Loader", loader))


def write_data(
    config: RunConfig,
    out: str,
    suffix: str = "parquet",
    shard_mib: float = 64,
    tokenize: bool = False,
) -> WrittenShards:
    """Write the training data as new shards into the folder `out`.

    Args:
        config: the run. Uses its data.train; with `tokenize`, also its tokenizer and data fields.
        out: folder or fsspec URL. Resumes if it has some shards of the same data.
        suffix: parquet or jsonl.
        shard_mib: source data of one shard, in MiB.
        tokenize: write `input_ids` and `targets` instead of rows.

    Raises:
        ConfigError: `tokenize` with another task than causal_lm.
        DataError: `out` has other data.
    """
    from dist_ft.checkpoint import initial_weights
    from dist_ft.data.tools.rewrite import rewrite_blocks
    from dist_ft.runtime.bootstrap.build_data import build_block_store
    from dist_ft.storage import filesystem

    filesystem.configure(config.storage.options)

    # Pre-tokenized rows hold token ids and targets only: labels would be lost.
    if tokenize and not task_class(config.task.name).reads_formats:
        raise ConfigError(
            [
                f"--tokenize: not supported for task.name={config.task.name}, whose rows also hold "
                "labels. Only causal_lm is allowed. Write rows instead."
            ],
            "data write",
        )
    model = initial_weights.resolve_for_inspection(config)
    block_store = build_block_store(config, model, shard_mib)
    try:
        num_written = rewrite_blocks(block_store, filesystem.Store(out), suffix, tokenize)
        return WrittenShards(len(block_store.blocks), num_written)
    finally:
        block_store.close()


@contextmanager
def _open_training_loader(config: RunConfig) -> Iterator[TrainingLoader]:
    """Yield a loader over the training data that writes nothing to the run's storage."""
    from uuid import uuid4

    from dist_ft.checkpoint import initial_weights
    from dist_ft.core.world import World, collectives
    from dist_ft.runtime.bootstrap.build_data import build_training_loader
    from dist_ft.runtime.bootstrap.resolve_run import resolve_data
    from dist_ft.storage import filesystem

    filesystem.configure(config.storage.options)

    # In memory: labels and index must not be written into the run, which may be training now.
    store, world = filesystem.Store(f"memory://preview-{uuid4().hex}"), World()
    comms = collectives(world)
    model = initial_weights.resolve_for_inspection(config)
    run = resolve_data(config, model, store, world, comms)
    loader = build_training_loader(run, store, world, comms)
    try:
        yield loader
    finally:
        loader.close()


def train(
    config: RunConfig, *, callbacks: Sequence[Callback] = (), skip_check: bool = False
) -> Result:
    """Train to the end of the run and return its result.

    Resumes the run if run.storage holds one named run.name. Trains in this process if
    `cluster.workers` is 0 or torchrun started it (RANK is set), else on Ray workers.

    Args:
        config: the run.
        callbacks: called in this order (see `dist_ft.Callback`); only for training in this process.
        skip_check: start without `check`.

    Raises:
        ConfigError: `check` found problems (all are listed), or callbacks are not supported.
    """
    from dist_ft.training.callbacks import CallbackList

    require_no_credentials(config, f"run {config.run.name!r}")
    started_by_torchrun = "RANK" in os.environ
    in_this_process = config.max_workers == 0 or started_by_torchrun
    if callbacks and not in_this_process:
        raise ConfigError(
            [
                f"callbacks: not supported with cluster.workers={config.max_workers}, as workers "
                "are other processes, where callbacks of this process cannot run. Use "
                "cluster.workers=0 or torchrun, or remove the callbacks."
            ],
            f"run {config.run.name!r}",
        )

    # Rank 0 only: the others would report the same problems.
    callback_list = CallbackList(callbacks)
    if not skip_check and os.environ.get("RANK", "0") == "0":
        problems = check(config)
        if problems:
            raise ConfigError(problems, f"run {config.run.name!r}")

    if in_this_process:
        from dist_ft.runtime import local
        from dist_ft.training.run_context import RunContext

        return local.run_with_notices(config, RunContext(callbacks=callback_list))
    from dist_ft.runtime.ray_backend import driver

    return driver.run(config)


def stages(
    file: str,
    overrides: Sequence[str] = (),
    *,
    skip_check: bool = False,
    report_line: Callable[[str], None] = print,
) -> StagesReport:
    """Run or resume the stages of a YAML file; return the scores of all tasks after each stage.

    Args:
        file: path or URL of the stages file.
        overrides: section.field=value, applied to the config of every stage.
        skip_check: start each run without `check`.
        report_line: called with each line of progress.
    """
    from dist_ft.config.stages import load_stages
    from dist_ft.workflows import run_stages

    loaded = load_stages(file, overrides)
    return run_stages.run(loaded, lambda config: train(config, skip_check=skip_check), report_line)


def tune(
    config: str,
    search: str,
    overrides: Sequence[str] = (),
    *,
    report_line: Callable[[str], None] = print,
) -> SearchReport:
    """Run or resume a hyper-parameter search; return a report of its trials.

    Args:
        config: path or URL of the base config.
        search: path or URL of the search file.
        overrides: section.field=value, applied to the config of every trial.
        report_line: called with each line of progress.
    """
    from dist_ft.config.search import load_search
    from dist_ft.workflows import search as search_workflow

    return search_workflow.run(load_search(config, search, overrides), report_line)


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
    """Write a checkpoint as a Hugging Face folder with a model card.

    Then reload the folder and compare its logits with those of the checkpoint.

    Args:
        run: the run's config, or the URL of its folder (<run.storage>/<run.name>).
        out: local folder to write.
        step: step of the checkpoint. Default: the latest.
        dtype: type of the exported weights, float32 or bfloat16. Default: as the model was trained.
        adapter: write the adapter alone, for `peft`. Default: merge it into the weights.
        best: export the best checkpoint by checkpoint.best_by.
        int8: quantize linear layers to 8 bits (torchao), and measure what that changes. Scores need
            held-out data in the run's own place, or a config, which names its place.
        average: export the average (tuning.ema_decay). Default: the weights that evaluations used.

    Returns:
        {measure: value before and after quantization}; None without `int8`.
    """
    from dist_ft.checkpoint.export import ExportOptions
    from dist_ft.runs.export_model import export_model

    options = ExportOptions(step, best, dtype, adapter, average)
    return export_model(run, out, options, as_int8=int8)


def predict(
    model: str,
    paths: str | Sequence[str],
    out: str,
    *,
    workers: int = 0,
    suffix: str = "jsonl",
    batch: int = 32,
    max_new_tokens: int = 128,
    strategy: str = "greedy",
) -> WrittenPredictions:
    """Write a prediction for every row of the input into a file or a folder of shards.

    Args:
        model: folder, URL or hub name.
        paths: files, folders, globs or URLs of rows; `dist-ft predict --help` lists their columns.
        out: local .jsonl file, or folder or URL for shards. Resumes if it has some of these rows.
        workers: number of Ray workers that write shards, each with the model; 0: this process.
        suffix: format of shards, jsonl or parquet.
        batch: number of rows in a batch.
        max_new_tokens: maximum length of generated text, in tokens.
        strategy: decoding strategy in short form (`config.sections.decoding.parse_strategy`).

    Raises:
        ConfigError: an argument is not allowed.
        DataError: a row cannot be read, or `out` has predictions of other rows or another model.
        ModelError: the model cannot be loaded.
    """
    from dist_ft.config.schema import Source
    from dist_ft.data.sources import readers
    from dist_ft.data.sources.discovery import discover_shards
    from dist_ft.inference.model_folder import PredictionOptions
    from dist_ft.inference.predict import Predictor
    from dist_ft.inference.predict_folder import WrittenPredictions, predict_folder
    from dist_ft.inference.prediction_file import predict_file
    from dist_ft.inference.prediction_shards import ENCODERS

    if suffix not in ENCODERS:
        allowed = ", ".join(ENCODERS)
        raise ConfigError(
            [f"--format={suffix}: unknown format. Allowed: {allowed}. Use one of these."],
            "predict",
        )

    if out.endswith(".jsonl") and (workers or suffix != "jsonl"):
        raise ConfigError(
            [
                f"--out={out}: a single file is written by one process as JSON Lines. Use a folder "
                "for --workers or --format."
            ],
            "predict",
        )

    inputs = [paths] if isinstance(paths, str) else list(paths)
    shards_by_source = discover_shards([Source(path=path) for path in inputs], "PATH")
    shards = list(chain.from_iterable(shards_by_source))
    options = PredictionOptions(batch, max_new_tokens, strategy)
    if out.endswith(".jsonl"):
        rows = (row for shard in shards for row in readers.iter_rows(shard))
        return WrittenPredictions(1, predict_file(Predictor(model, options), rows, out))
    return predict_folder(model, shards, out, options, suffix=suffix, workers=workers)


def evaluate(
    config: RunConfig, models: str | Sequence[str] = (), *, random_head: bool = False
) -> dict[str, dict[str, Any]]:
    """Return {model: metrics} on the config's held-out data, without training.

    Args:
        config: the run. Uses its task, evaluation.data and batch.
        models: folders, URLs or hub names. Default: model.path.
        random_head: also score a head that was never trained; otherwise such a head is an error.
    """
    from dist_ft.inference.evaluate import evaluate_models

    paths = [models] if isinstance(models, str) else list(models)
    return evaluate_models(config, paths or [config.model.path], random_head)


def report(run: RunConfig | str) -> Report:
    """Return a run's report as JSON values: curves, tables, most confident errors and config."""
    from dist_ft.runs.report import gather
    from dist_ft.storage import filesystem

    if isinstance(run, RunConfig):
        filesystem.configure(run.storage.options)
        run = run.run_url
    return gather(run)


def next_step(folder: str) -> str:
    """Return what to do next with an exported folder: a command or a hint, by its task."""
    from pathlib import Path

    from dist_ft.checkpoint.export import INFO_FILE
    from dist_ft.storage.documents import read_local_json_object

    task = read_local_json_object(Path(folder).expanduser() / INFO_FILE)["task"]["name"]
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
    """Return the model's answer to `prompt`, with its chat template if it has one.

    A line of --- separates several answers (num_samples).

    Args:
        model: folder, URL or hub name.
        prompt: the prompt; a user turn if the model has a chat template.
        system: system prompt.
        max_new_tokens: maximum length of the answer, in tokens.
        strategy: decoding strategy in short form (`config.sections.decoding.parse_strategy`).
    """
    from dist_ft.config.sections.decoding import DecodingSection, parse_strategy
    from dist_ft.inference.generate import answer

    decoding = parse_strategy(strategy, DecodingSection(max_new_tokens=max_new_tokens))
    return "\n---\n".join(answer(model, prompt, system, decoding))
