"""A run in a few lines of Python: `from dist_ft import load_config, train`.

    config = load_config("configs/single.yaml", ["schedule.steps=20"])
    result = train(config)
    export(config, "out/")

Thin: decides only where a run happens. Everything else is below.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dist_ft.config.schema import EvaluationSection, ModelSection, RunConfig
from dist_ft.core.errors import ConfigError

if TYPE_CHECKING:
    from dist_ft.data.batching.loader import Loader
    from dist_ft.training.callbacks import Callback
    from dist_ft.training.result import Result


def check(config: RunConfig) -> list[str]:
    """Return a line for everything that would stop this run, as far as it can be known without a GPU."""
    from dist_ft.runtime.preflight import check_run

    return check_run.check(config)


def preview(config: RunConfig, num_samples: int = 3, *, markup: bool = False) -> str:
    """Return the first samples as training will see them, what is learned marked, and the numbers of an epoch.

    Tokenises the training data (cached for the run); writes nothing to the run's storage. `markup`: mark in rich's
    markup instead of [[ ]].
    """
    from dist_ft.data.tools import preview as previews

    with _opened(config) as loader:
        return previews.preview(loader, num_samples, markup)


def pack_stats(config: RunConfig) -> str:
    """Return a table of how full sequences are, for batch.sequence_length, its half and its double."""
    from dist_ft.data.tools import preview as previews

    with _opened(config) as loader:
        return previews.pack_stats(loader)


def write_data(
    config: RunConfig,
    out: str,
    suffix: str = "parquet",
    shard_mib: float = 64,
    tokenise: bool = False,
) -> tuple[int, int]:
    """Write the training data as new shards into the folder `out`; return (shards there are, written now).

    Args:
        config: whose data.train is read; with `tokenise` its tokenizer, template and data fields too.
        out: folder or fsspec URL.
        suffix: parquet or jsonl.
        shard_mib: MiB of source data a shard.
        tokenise: write `input_ids` and `targets` in place of rows.
    """
    from dist_ft.checkpoint import initial_weights
    from dist_ft.data.tools.rewrite import rewrite_blocks
    from dist_ft.runtime.bootstrap.build_data import open_blocks
    from dist_ft.storage import filesystem

    filesystem.configure(config.storage.options)
    if tokenise and config.task.name != "causal_lm":
        raise ConfigError(
            [
                f"--tokenise: with task.name={config.task.name} rows hold labels besides tokens; allowed "
                "with causal_lm; write rows"
            ],
            "data write",
        )
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"block_mib": shard_mib})}
    )
    blocks = open_blocks(initial_weights.resolve_for_inspection(config))
    try:
        return len(blocks.blocks), rewrite_blocks(blocks, filesystem.Store(out), suffix, tokenise)
    finally:
        blocks.close()


@contextmanager
def _opened(config: RunConfig) -> Iterator[Loader]:
    """Yield a loader over the training data that leaves nothing in the run's storage."""
    from uuid import uuid4

    from dist_ft.checkpoint import initial_weights
    from dist_ft.core.world import World, collectives
    from dist_ft.runtime.bootstrap.build_data import open_data
    from dist_ft.storage import filesystem

    filesystem.configure(config.storage.options)
    config = initial_weights.resolve_for_inspection(
        config.model_copy(update={"evaluation": EvaluationSection()})
    )
    data = open_data(
        config, filesystem.Store(f"memory://preview-{uuid4().hex}"), World(), collectives(World())
    )
    try:
        yield data.training
    finally:
        data.close()


def train(
    config: RunConfig, *, callbacks: Sequence[Callback] = (), skip_check: bool = False
) -> Result:
    """Run `config` to its end (or go on with it, if its storage holds a run of that name) and return how it stands.

    In this process if `cluster.workers` is 0 or torchrun started it (RANK is set), else on Ray workers. Raises
    `ConfigError` with all of `check`'s lines first, unless `skip_check`.

    Args:
        config: the run.
        callbacks: called in this order when something happens in training (see `dist_ft.Callback`); only where
            training runs in this process.
        skip_check: start without the checks.
    """
    from dist_ft.training.callbacks import CallbackList

    by_torchrun = "RANK" in os.environ
    in_this_process = config.max_workers == 0 or by_torchrun
    if callbacks and not in_this_process:
        raise ConfigError(
            [
                f"callbacks: the {config.max_workers} workers (cluster.workers) are other processes, which do not get "
                "Python objects of this one; naming a callback by its import path is not supported yet. Use "
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
) -> dict[str, Any]:
    """Run the stages in a YAML file, one after the other, or go on with them; return the matrix of what is kept.

    Args:
        file: path or URL of the stages' file.
        overrides: section.field=value, set in every stage's config.
        skip_check: start each run without the probes of `check`.
        say: where a person is told.
    """
    from dist_ft.config.stages import load_stages
    from dist_ft.workflows import run_stages

    return run_stages.run(
        load_stages(file, overrides), lambda config: train(config, skip_check=skip_check), say
    )


def tune(
    config: str, search: str, overrides: Sequence[str] = (), *, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run the search in the YAML file `search` over the config file `config`, or go on with it; return its trials.

    Args:
        config: path or URL of the config.
        search: path or URL of the search's file.
        overrides: section.field=value, set in every trial's config.
        say: where a person is told.
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
) -> dict[str, tuple[float, float]] | None:
    """Write a run's newest commit (or that of `step`) as a Hugging Face folder `out`, reloaded and compared.

    With it goes a model card, README.md. Returns what int8 weights changed, {measure: (before, after)}, or None.

    Args:
        run: the run's config, or the URL of its folder (<run.storage>/<run.name>).
        out: local folder to write.
        step: the committed step; none: the newest.
        dtype: float32 or bfloat16 of the weights written; none: as the model was trained.
        adapter: write the adapter alone, for `peft`; else it is merged into the weights.
        best: that of the checkpoints there are which is best by checkpoint.best_by.
        int8: weights of linear layers as 8-bit integers (torchao); size, latency and scores are measured.
        average: the moving average of the weights (tuning.ema_decay); none: if that is what was evaluated.
    """
    from dist_ft.runs.export_model import ship
    from dist_ft.storage import filesystem

    if isinstance(run, RunConfig):
        filesystem.configure(run.storage.options)
        run = run.run_url
    return ship(
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
) -> tuple[int, int]:
    """Write what a model says of every row of files into a file or a folder of shards; return (files, rows).

    Args:
        model: folder, URL or hub name.
        paths: files, folders, globs or URLs of rows; see `dist-ft predict --help` for their columns.
        out: local file (.jsonl), or folder or URL for shards; what is there of the same rows is gone on with.
        workers: Ray workers, each with the model, that write shards; 0: this process.
        form: of shards, jsonl or parquet.
        batch: rows at once.
        max_new_tokens: longest text to make, in tokens.
        strategy: how texts are made: greedy, beam:4, sample:0.7, ... (`config.decoding.parse`).

    Raises ConfigError, DataError, ModelError with one clear line.
    """
    from dist_ft.config.schema import Source
    from dist_ft.data.sources import readers
    from dist_ft.data.sources.discovery import discover_shards
    from dist_ft.inference.predict import Predictor
    from dist_ft.inference.predict_folder import (
        predict_folder,
    )
    from dist_ft.inference.prediction_file import predict_file
    from dist_ft.inference.prediction_shards import (
        ENCODERS,
    )

    if form not in ENCODERS:
        raise ConfigError(
            [f"--format={form}: no such choice; allowed: {', '.join(ENCODERS)}; correct it"],
            "predict",
        )
    if out.endswith(".jsonl") and (workers or form != "jsonl"):
        raise ConfigError(
            [
                f"--out={out}: is one file, which one process writes as JSON lines; a folder is allowed "
                "with --workers and --format; name one"
            ],
            "predict",
        )
    names = [paths] if isinstance(paths, str) else list(paths)
    shards = [
        shard
        for found in discover_shards([Source(path=path) for path in names], "PATH")
        for shard in found
    ]
    if out.endswith(".jsonl"):
        return 1, predict_file(
            Predictor(model, batch, max_new_tokens, strategy),
            (row for shard in shards for row in readers.iter_rows(shard)),
            out,
        )
    return predict_folder(
        model,
        shards,
        out,
        suffix=form,
        workers=workers,
        batch=batch,
        max_new_tokens=max_new_tokens,
        strategy=strategy,
    )


def evaluate(
    config: RunConfig, models: str | Sequence[str] = (), *, random_head: bool = False
) -> dict[str, dict[str, Any]]:
    """Return {model: metrics} of models as they are on the config's held-out data, without training.

    Args:
        config: its task, evaluation.data and batch are used.
        models: folders, URLs or hub names; none: model.path.
        random_head: score a head that was never trained too; else that is an error.
    """
    from dist_ft.inference.evaluate import evaluate_models

    paths = [models] if isinstance(models, str) else list(models)
    return evaluate_models(config, paths or [config.model.path], random_head)


def report(run: RunConfig | str) -> dict[str, Any]:
    """Return a run's report as JSON values: curves, tables, the most confident errors, what was run."""
    from dist_ft.runs.report import gather
    from dist_ft.storage import filesystem

    if isinstance(run, RunConfig):
        filesystem.configure(run.storage.options)
        run = run.run_url
    return gather(run)


def next_step(folder: str) -> str:
    """Return the command that tries an exported folder, by what its model does."""
    import json
    from pathlib import Path

    from dist_ft.checkpoint.export import INFO_FILE

    task = json.loads((Path(folder).expanduser() / INFO_FILE).read_text("utf-8"))["task"]["name"]
    if task == "causal_lm":
        return f'dist-ft generate {folder} --prompt "..."'
    if task == "masked_lm":
        return f"train it for a task with model.path={folder}"
    return f"dist-ft predict {folder} ROWS.jsonl --out said.jsonl"


def generate(
    model: str,
    prompt: str,
    *,
    system: str | None = None,
    max_new_tokens: int = 128,
    strategy: str = "greedy",
) -> str:
    """Return a model folder's answer to `prompt`, through its chat template if it has one.

    `strategy`: greedy, beam:4, sample:0.7 (`config.decoding.parse`); several answers (num_samples) stand between ---.
    """
    import numpy as np
    import torch
    from transformers.utils import logging as transformers_logging

    from dist_ft.checkpoint import initial_weights
    from dist_ft.config.sections.decoding import DecodingSection, parse
    from dist_ft.model.generation import GenerationRequest, TextGenerator
    from dist_ft.model.loading.load import load_causal_lm, load_tokenizer

    section = parse(strategy, DecodingSection(max_new_tokens=max_new_tokens))
    transformers_logging.disable_progress_bar()
    on_gpu = torch.cuda.is_available()
    files = initial_weights.resolve_model_section(
        ModelSection(path=model, dtype="bfloat16" if on_gpu else "float32")
    )
    tokenizer, network = load_tokenizer(files), load_causal_lm(files).eval()
    if on_gpu:
        network.cuda()
    if tokenizer.chat_template:
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": prompt})
        text = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(f"{system}\n{prompt}" if system else prompt)["input_ids"]
    decoder = TextGenerator(section, tokenizer)
    (texts,) = decoder.generate_all(network, [GenerationRequest(np.array(ids))])
    return "\n---\n".join(decoder.decode_text(made) for made in texts)
