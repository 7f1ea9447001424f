"""Checks before a run takes a GPU: model, data, storage, an older run, the machine.

Each check is independent and yields a line for each problem; none stops another. Guarantees:
nothing is left behind in storage, and no weights are read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from uuid import uuid4

from dist_ft.checkpoint.attempts import NOT_EXCLUSIVE
from dist_ft.config.load import STORED, check_resume, read_stored_config
from dist_ft.config.schema import ModelSection, RunConfig, Source
from dist_ft.core.errors import ConfigError, DistFtError
from dist_ft.core.logs import redact
from dist_ft.runtime.preflight import machine_checks, model_checks
from dist_ft.storage import filesystem
from dist_ft.storage.retry import retry_limit
from dist_ft.training import trackers

TRIES, TIMEOUT_S = 2, 20.0
"""Limits of every storage call here: a person waits for the answer."""


def check(config: RunConfig, *, write_storage: bool = True, is_complete: bool = True) -> list[str]:
    """Return a line for everything that would stop this run, as far as it can be known here.

    Args:
        config: the run.
        write_storage: also write (and remove) a small file in the run's storage and look for an
            older run there.
        is_complete: False if `config` may lack fields (`inspect_config`); checks that read those
            are skipped.
    """
    with contextlib.ExitStack() as stack:
        # A config that lacks `storage` still gets all checks that do not need it.
        if not is_complete:
            stack.enter_context(contextlib.suppress(AttributeError))
        filesystem.configure(config.storage.options)

    with retry_limit(TRIES, TIMEOUT_S):
        # The model goes into a list, because a check returns lines only.
        found: list[ModelSection] = []
        problems = _lines(lambda: _resolve_model(config, found), is_complete)

        model = found[0] if found else None
        if model is None and not problems:  # fields are missing, but perhaps not the model
            model = getattr(config, "model", None)

        for check_one in _checks(config, model, write_storage):
            # Two checks may find the same problem, such as a cache that cannot be used.
            lines = _lines(check_one, is_complete)
            problems += [line for line in lines if line not in problems]
        return problems


def _checks(
    config: RunConfig, model: ModelSection | None, write_storage: bool
) -> Iterator[Callable[[], Iterator[str]]]:
    """Yield the checks in the order of their lines; those of the model only if it was found."""
    # Not called here: `_lines` calls each one, so that an error in it does not stop the others.
    if model is not None:
        yield partial(model_checks.check_model, config, model)
        yield partial(model_checks.check_model_files, config, model)
        yield partial(model_checks.check_tuning, config, model)
    yield partial(model_checks.check_prompting, config)
    if model is not None:
        yield partial(model_checks.check_tokenizer, config, model)

    yield partial(_check_training_data, config)
    yield partial(_check_held_out_data, config)
    yield partial(_check_synonyms, config)

    yield partial(machine_checks.check_cpus, config)
    yield partial(machine_checks.check_gpus, config)
    yield partial(machine_checks.check_folders, config)

    # A job sends notices from the cluster, whose variables and programs are not known here.
    if write_storage:
        yield partial(machine_checks.check_notifications, config)
        yield partial(_check_writable, config)
        yield partial(_check_older_run, config)
    yield partial(trackers.missing_trackers, config)


def _lines(check_one: Callable[[], Iterator[str]], is_complete: bool) -> list[str]:
    """Return the lines of one check; an error of ours becomes a line, or several."""
    try:
        return [redact(line) for line in check_one()]
    except ConfigError as error:
        return [redact(line) for line in error.problems]
    except DistFtError as error:
        return [redact(str(error))]
    except AttributeError:
        # Of a complete config this is a bug; else a field that the check reads is missing.
        if is_complete:
            raise
        return []


def _resolve_model(config: RunConfig, found: list[ModelSection]) -> Iterator[str]:
    """Append to `found` the model section with a local folder, where model.path names a run."""
    from dist_ft.checkpoint import initial_weights

    found.append(initial_weights.resolve_for_inspection(config))
    yield from ()  # a generator like all checks, without lines of its own


def _check_training_data(config: RunConfig) -> Iterator[str]:
    yield from _check_sources(config.data.train, "data.train")


def _check_held_out_data(config: RunConfig) -> Iterator[str]:
    yield from _check_sources(config.evaluation.data, "evaluation.data")
    if config.tuning.anchor.data:
        yield from _check_sources(config.tuning.anchor.data, "tuning.anchor.data")


def _check_synonyms(config: RunConfig) -> Iterator[str]:
    from dist_ft.data.batching import augmentation

    if config.data.augment.synonyms is not None:
        augmentation.read_synonym_file(config.data.augment.synonyms)
    yield from ()


def _check_sources(sources: tuple[Source, ...], field: str) -> Iterator[str]:
    """List each source alone, so that all problems are reported; then all sources together."""
    from dist_ft.data.sources.discovery import discover_shards

    has_problem = False
    for source in sources:
        try:
            discover_shards((source,), field)
        except DistFtError as error:
            has_problem = True
            yield str(error)

    # Together they may still share a shard; with a source missing that error would only repeat.
    if not has_problem and len(sources) > 1:
        try:
            discover_shards(sources, field)
        except DistFtError as error:
            yield str(error)


def _check_writable(config: RunConfig) -> Iterator[str]:
    """Yield a line if the run's storage cannot be written, or lets two starts create one file."""
    store = filesystem.Store(config.run_url)
    probe = f".probe-{uuid4().hex[:8]}"
    new_folders = _absent_folders(store.url)  # before the write, which creates them
    try:
        store.create(probe, b"probe")

        # Attempt numbers rely on it: of two starts only one may create the file of a number.
        if store.create(probe, b"again"):
            yield f"run.storage={config.run.storage}: {NOT_EXCLUSIVE}"
        store.remove(probe)
    except DistFtError as error:
        yield f"run.storage={config.run.storage}: {error}"

    with contextlib.suppress(OSError):  # not empty: another process uses it by now
        for folder in new_folders:
            os.rmdir(folder)


def _absent_folders(url: str) -> list[str]:
    """Return the local folders that writing to `url` would create, innermost first."""
    absent = []
    while filesystem.is_local(url) and not os.path.exists(url):
        absent.append(url)
        url = os.path.dirname(url)
    return absent


def _check_older_run(config: RunConfig) -> Iterator[str]:
    """Raise if storage holds a run of this name with another identity."""
    store = filesystem.Store(config.run_url)
    try:
        if not store.exists(STORED):
            return
        stored = read_stored_config(store)
    except DistFtError:
        return  # `_check_writable` reports it
    check_resume(stored, config)
    yield from ()
