"""A resolved run and its loaders in one process, for tests that look at data or models without training."""

from __future__ import annotations

from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.config.schema import RunConfig
from dist_ft.core.world import Collectives, World
from dist_ft.runtime.bootstrap.build_data import Loaders, build_loaders
from dist_ft.runtime.bootstrap.resolve_run import resolve_run
from dist_ft.storage.filesystem import Store


def resolve(config: RunConfig, store: Store) -> ResolvedRun:
    return resolve_run(config, store, World(), Collectives())


def loaders(config: RunConfig, store: Store) -> Loaders:
    return build_loaders(resolve(config, store), store, World(), Collectives())
