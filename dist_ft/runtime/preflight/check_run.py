"""What can be known before a GPU is taken, beyond the config itself: model, data, storage, an older run, the machine.

Each probe is independent and says what it finds; none stops another. Guarantees: nothing is left behind in storage,
and no weights are read. Where the run goes to another cluster, this machine's CPUs and GPUs are not judged.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from uuid import uuid4

from dist_ft.config.document import parse_yaml
from dist_ft.config.load import STORED, check_resume
from dist_ft.config.schema import RunConfig, Source, TaskSection
from dist_ft.config.sections.prompting import untrainable
from dist_ft.config.sections.task import LABELLED
from dist_ft.config.sections.tuning import PROMPTS
from dist_ft.core.errors import ConfigError, DistFtError
from dist_ft.core.logs import redact
from dist_ft.core.world import World
from dist_ft.storage import filesystem
from dist_ft.storage.retry import retry_limit
from dist_ft.training import trackers

TRIES, PATIENCE_S = 2, 20.0
"""Of every storage call here: someone waits for the answer."""


def check(config: RunConfig, *, write_storage: bool = True, whole: bool = True) -> list[str]:
    """Return a line for everything that would stop this run, as far as it can be known here.

    Args:
        config: the run.
        write_storage: also write (and remove) a small file in the run's storage and look for an older run there.
        whole: False if fields may be absent from `config` (`inspect_config`); probes that read those are skipped.
    """
    probes: list[Callable[[RunConfig], Iterator[str]]] = [
        _model,
        _tuning,
        _method,
        _tokenizer,
        _training_data,
        _held_out_data,
        _synonyms,
        _cpus,
        _gpus,
    ]
    if write_storage:
        probes += [_writable, _older_run]
    probes.append(trackers.problems)
    with contextlib.ExitStack() as stack:
        if not whole:
            stack.enter_context(contextlib.suppress(AttributeError))
        filesystem.configure(config.storage.options)
    with retry_limit(TRIES, PATIENCE_S):
        problems, seen = _seen(config, whole)
        return problems + [
            line
            for probe in probes
            if seen or probe not in OF_MODEL
            for line in _lines(probe, seen if seen and probe in OF_MODEL else config, whole)
        ]


def _lines(
    probe: Callable[[RunConfig], Iterator[str]], config: RunConfig, whole: bool
) -> list[str]:
    """Return what one probe says, an error of ours being a line (or several) like the others."""
    try:
        return [redact(line) for line in probe(config)]
    except ConfigError as error:
        return [redact(line) for line in error.problems]
    except DistFtError as error:
        return [redact(str(error))]
    except AttributeError:
        if whole:
            raise
        return []


def _seen(config: RunConfig, whole: bool) -> tuple[list[str], RunConfig | None]:
    """Return the config with a model folder, where model.path names a run's; or why there is none."""
    found: list[RunConfig] = []

    def probe(config: RunConfig) -> Iterator[str]:
        from dist_ft.checkpoint import initial_weights

        found.append(initial_weights.resolve_for_inspection(config))
        yield from ()

    problems = _lines(probe, config, whole)
    return problems, found[0] if found else (None if problems else config)


def _model(config: RunConfig) -> Iterator[str]:
    from dist_ft.model.heads import length_error
    from dist_ft.model.loading.load import read_config

    model = read_config(config.model, config.data.cache_dir, known_task(config))
    if getattr(model, "quantization_config", None):
        yield (
            f"model.path={config.model.path}: has int8 weights, which can not be fine-tuned; a model with float "
            "weights is needed; export the run without --int8"
        )
    virtual = config.tuning.prompt.tokens if config.tuning.method in PROMPTS else 0
    if line := length_error(model, config.batch.sequence_length, config.model.path, virtual):
        yield line


def known_task(config: RunConfig) -> TaskSection:
    """Return the task with labels, without a look at the data: where none are named, two that fit any model."""
    task = config.model_task
    if task.name not in LABELLED or (task.labels and not task.grow_head):
        return task
    return task.model_copy(update={"labels": ("0", "1"), "new_head": True, "grow_head": False})


def _tuning(config: RunConfig) -> Iterator[str]:
    """Try on a model without weights whether what `tuning` and `optimizer` name is there."""
    if config.tuning == type(config.tuning)() and not config.optimizer.decay_exempt:
        return
    import torch

    from dist_ft.core.errors import ModelError
    from dist_ft.engine import optimizers
    from dist_ft.model.adapters import tuning
    from dist_ft.model.loading.load import build_uninitialized_model, read_config

    try:
        read_config(config.model, config.data.cache_dir, known_task(config))
    except ModelError:
        return  # `_model` says so
    with torch.device("meta"):
        model = build_uninitialized_model(config.model, config.data.cache_dir, known_task(config))
        tuning.apply_tuning(model, config.tuning, config.run.seed, config.model_task)
        learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizers.param_groups(learned, 0.0, exempt=config.optimizer.decay_exempt)
    yield from ()


def _method(config: RunConfig) -> Iterator[str]:
    """Try whether what is asked can be learned, and whether labels that are named have words of their own."""
    yield from untrainable(config.prompting)
    named = config.task.labels or tuple(config.prompting.verbalisers)
    if config.prompting.method == "likelihood" and named:
        from dist_ft.core.errors import ModelError
        from dist_ft.model.loading.load import load_tokenizer
        from dist_ft.runtime.bootstrap.build_model import prompt_encoder

        try:
            tokenizer = load_tokenizer(config.model, config.data.cache_dir)
        except ModelError:
            return  # `_tokenizer` says so
        task = config.task.model_copy(update={"labels": named})
        prompt_encoder(config.model_copy(update={"task": task}), tokenizer).words()


def _tokenizer(config: RunConfig) -> Iterator[str]:
    from dist_ft.core.errors import ModelError
    from dist_ft.model.loading.load import load_tokenizer, read_config

    try:
        load_tokenizer(config.model, config.data.cache_dir)
    except ModelError:
        if config.model.tokenizer is None:
            try:
                read_config(config.model, config.data.cache_dir, known_task(config))
            except ModelError:
                return  # the model itself is not there: `_model` says so once
        raise
    yield from ()


def _training_data(config: RunConfig) -> Iterator[str]:
    yield from _data(config.data.train, "data.train")


def _held_out_data(config: RunConfig) -> Iterator[str]:
    yield from _data(config.evaluation.data, "evaluation.data")
    if config.tuning.anchor.data:
        yield from _data(config.tuning.anchor.data, "tuning.anchor.data")


def _synonyms(config: RunConfig) -> Iterator[str]:
    from dist_ft.data.batching import augmentation

    if config.data.augment.synonyms is not None:
        augmentation.read_file(config.data.augment.synonyms)
    yield from ()


def _data(sources: tuple[Source, ...], field: str) -> Iterator[str]:
    """Resolve each source by itself, so that all that name nothing are told; then, if each is well, together."""
    from dist_ft.data.sources.discovery import discover_shards

    all_well = True
    for group in [*((source,) for source in sources), sources]:
        try:
            if group is not sources or (all_well and len(sources) > 1):
                discover_shards(group, field)
        except DistFtError as error:
            all_well = False
            yield str(error)


def _writable(config: RunConfig) -> Iterator[str]:
    store = filesystem.Store(config.run_url)
    probe, made = f".probe-{uuid4().hex[:8]}", _absent_folders(store.url)
    try:
        store.create(probe, b"probe")
        if store.create(probe, b"again"):
            yield (
                f"run.storage={config.run.storage}: a file that is there was made once more, so two starts of a "
                f"run could not be told apart; storage with conditional writes (If-None-Match) is needed; use "
                f"another endpoint or file system"
            )
        store.remove(probe)
    except DistFtError as error:
        yield f"run.storage={config.run.storage}: {error}"
    with contextlib.suppress(OSError):  # not empty: someone else uses it by now
        for folder in made:
            os.rmdir(folder)


def _absent_folders(url: str) -> list[str]:
    """Return the local folders that writing to `url` would make, innermost first."""
    absent = []
    while filesystem.is_local(url) and not os.path.exists(url):
        absent.append(url)
        url = os.path.dirname(url)
    return absent


def _older_run(config: RunConfig) -> Iterator[str]:
    store = filesystem.Store(config.run_url)
    try:
        if not store.exists(STORED):
            return
        stored, _ = parse_yaml(store.read(STORED).decode())
    except DistFtError:
        return  # `_writable` says so
    check_resume(stored if isinstance(stored, dict) else {}, config)
    yield from ()


def _by_torchrun() -> bool:
    """Tell whether torchrun (or the like) started this process as one of its ranks."""
    return "RANK" in os.environ


def _workers_here(config: RunConfig) -> int:
    """Return how many workers need a place on this machine (if the run `_is_here`)."""
    return World.from_environment().ranks_per_node if _by_torchrun() else config.min_workers


def _is_here(config: RunConfig) -> bool:
    """Tell whether the run happens on this machine: one process, torchrun's ranks, or a local Ray of its own."""
    own_ray = config.cluster.address is None and not os.environ.get("RAY_ADDRESS")
    return _by_torchrun() or config.max_workers == 0 or own_ray


def _cpus(config: RunConfig) -> Iterator[str]:
    if not _is_here(config):
        return
    available, workers = os.cpu_count() or 1, _workers_here(config)
    if workers * config.cluster.cpus_per_worker > available:
        yield (
            f"cluster.workers={config.min_workers}: needs {workers} × {config.cluster.cpus_per_worker:g} "
            f"CPUs (cluster.cpus_per_worker), and this machine has {available}; use fewer workers or CPUs a worker, "
            f"or set cluster.address to a larger Ray cluster"
        )


def _gpus(config: RunConfig) -> Iterator[str]:
    if not config.cluster.gpus_per_worker or not _is_here(config):
        return
    import torch

    available, needed = torch.cuda.device_count(), max(1, _workers_here(config))
    if available < needed:
        yield (
            f"cluster.gpus_per_worker={config.cluster.gpus_per_worker}: {needed} GPUs are needed, and this machine "
            f"has {available} that torch can use; set it to 0 to run on CPUs, or set cluster.address to a Ray "
            f"cluster with GPUs"
        )


OF_MODEL = (_model, _tuning, _tokenizer)
"""Probes that look at the model's folder."""
