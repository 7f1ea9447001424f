"""What commands apply of a config that is stored in a run's folder, and what they do not.

A folder may come from someone else. It says what was trained, on which data and how; it never says
how this machine reaches storage, where it writes, or what code it runs. Data that it names are read
only where `storage.places` allows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dist_ft.checkpoint import trained_model
from dist_ft.config.load import load_stored_config
from dist_ft.config.schema import ClusterSection, LogSection, RunConfig, Source, StorageSection
from dist_ft.core.errors import DataError
from dist_ft.data.sources.discovery import is_hub_name
from dist_ft.storage import places
from dist_ft.storage.filesystem import Store


def named_places(config: RunConfig) -> tuple[str, ...]:
    """Return the paths, URLs and hub names of data in a user's own config."""
    sources = [*config.data.train, *config.evaluation.data, *(config.tuning.anchor.data or ())]
    return tuple(source.path for source in sources)


def require_readable(
    store: Store, sources: Sequence[Source], field: str, named: Sequence[str], remedy: str
) -> None:
    """Refuse data that the run's folder names in another place than its own.

    Args:
        store: the run's folder.
        sources: data that its config names.
        field: the config field of the sources.
        named: places that the user named.
        remedy: what to do, for the error.

    Raises:
        DataError: names the data; nothing was requested.
    """
    for path in _unreadable(store, sources, named):
        raise DataError(f"{places.not_followed(field, path, store.url)} {remedy}")


def _unreadable(store: Store, sources: Sequence[Source], named: Sequence[str]) -> Iterator[str]:
    for source in sources:
        # a name on the hub looks like a local path
        may_follow = source.path in named
        if not is_hub_name(source.path):
            may_follow = places.may_follow(source.path, store.url, named)
        if not may_follow:
            yield source.path


def config_to_score_by(store: Store) -> RunConfig:
    """Return the stored config as far as scores depend on it, to score the run's exported model.

    Without storage options, places on this machine, workers, trackers, and code of its own.
    """
    config = load_stored_config(store)

    # Few-shot examples were drawn when the run started: its training data is not read again.
    task, prompting = trained_model.load_task_settings(store)
    return config.model_copy(
        update={
            "storage": StorageSection(),
            "cluster": ClusterSection(workers=0),
            "log": LogSection(),
            "data": config.data.model_copy(update={"cache_dir": None}),
            "model": config.model.model_copy(
                update={"tokenizer": None, "chat_template": None, "trust_remote_code": False}
            ),
            "task": task,
            "prompting": prompting,
        }
    )
