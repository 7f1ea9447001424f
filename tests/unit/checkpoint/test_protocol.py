"""The checkpoint protocol under any order of saves, deaths, restarts, zombies, damage and loss.

Ranks are threads, each with a manager, a state and a node's folder of its own; storage is a real
folder. The state after step s is a function of s, as in a run that resumes exactly, so whatever is
loaded can be checked.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint.discovery import LOCAL_FOLDER
from dist_ft.checkpoint.ledger import LedgerRows, read_ledger
from dist_ft.checkpoint.local_tier import LocalTier
from dist_ft.checkpoint.manager import CheckpointManager
from dist_ft.checkpoint.manifest import NAME, Progress, TensorInfo, parse_folder
from dist_ft.checkpoint.save_status import SaveRequest
from dist_ft.checkpoint.tier import Tier
from dist_ft.config.schema import CheckpointSection
from dist_ft.core import fault_injection
from dist_ft.core.errors import CheckpointError, ConfigError
from dist_ft.core.world import Collectives, World
from dist_ft.engine.base import StateSlice
from dist_ft.storage.filesystem import Store

NUMEL, KEEP, LANES = 23, 2, 3
TENSORS = {
    "w": TensorInfo(shape=(NUMEL,)),
    "b": TensorInfo(shape=(3,)),
    "f": TensorInfo(shape=(NUMEL,)),
}
TIERS = st.sampled_from(Tier)
SIZES = st.sampled_from([0, 0, 0, 0, 1, 2, 3])  # 0: as many as before
PLACES = (
    "checkpoint.before_file",
    "checkpoint.after_file",
    "checkpoint.before_manifest",
    "checkpoint.after_manifest",
)


LOSSES = ("attempts", "attempts/{:06d}.json", "time", LOCAL_FOLDER, "ledger")


class Killed(BaseException):
    """A rank died here."""


class Ranks:
    """A world of threads; if one of them dies, the others notice."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=20)
        self._values: list[Any] = [None] * size

    def run(self, action: Callable[[World, Collectives], Any]) -> list[Any]:
        """Return what each rank returned or raised."""

        def one(rank: int) -> Any:
            try:
                return action(World(rank, self.size, rank, self.size), _Rank(self, rank))
            except BaseException as error:
                self._barrier.abort()
                return error

        with ThreadPoolExecutor(self.size) as pool:
            found = list(pool.map(one, range(self.size)))
        self._barrier.reset()
        return found

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        return found


class _Rank(Collectives):
    def __init__(self, ranks: Ranks, rank: int) -> None:
        self._ranks, self._rank = ranks, rank

    def all_gather(self, value: Any) -> list[Any]:
        return self._ranks.exchange(self._rank, value)

    def gather(self, value: Any) -> list[Any] | None:
        return self.all_gather(value) if self._rank == 0 else (self.all_gather(value), None)[1]

    def broadcast(self, value: Any) -> Any:
        return self.all_gather(value)[0]


def state(name: str, step: int) -> torch.Tensor:
    """Return the value of the parameter after `step` steps; `f` is not trained."""
    if name == "f":
        return torch.arange(NUMEL, dtype=torch.float32) * 11 + 5
    return (
        torch.arange(NUMEL if name == "w" else 3, dtype=torch.float32) * (7 if name == "w" else -3)
        + step * 1000
    )


class Sharded:
    """The part of an engine that a manager uses: `w` and `f` are sharded, `b` is replicated."""

    def __init__(self, world: World) -> None:
        self._part = world.share(NUMEL)
        self._owner = world.rank == 0
        self.values = {
            name: torch.full((3 if name == "b" else len(self._part),), -1.0) for name in TENSORS
        }

    def become(self, step: int) -> None:
        self.values = {name: self._own(name, step).clone() for name in TENSORS}

    def holds(self, step: int) -> bool:
        return all(torch.equal(self.values[name], self._own(name, step)) for name in TENSORS)

    def _own(self, name: str, step: int) -> torch.Tensor:
        return (
            state(name, step)
            if name == "b"
            else state(name, step)[self._part.start : self._part.stop]
        )

    def frozen_parameters(self) -> frozenset[str]:
        return frozenset({"f"})

    def state_slices(self) -> Iterator[StateSlice]:
        yield StateSlice(
            "w",
            "param",
            self._part.start,
            len(self._part),
            True,
            lambda: self.values["w"],
            self._put("w"),
        )
        yield StateSlice(
            "f",
            "frozen",
            self._part.start,
            len(self._part),
            True,
            lambda: self.values["f"],
            self._put("f"),
        )
        yield StateSlice("b", "buffer", 0, 3, self._owner, lambda: self.values["b"], self._put("b"))

    def _put(self, name: str) -> Callable[[torch.Tensor], None]:
        return lambda values: self.values.__setitem__(name, values.clone())

    def finish_load(self, optimizer_step: int) -> None:
        pass


def rows(steps: range, lanes: Sequence[int]) -> np.ndarray:
    """Return the ledger's rows of `lanes`: one sample per lane and step."""
    found = [[step, 0, lane, step * LANES + lane, 0, 5] for step in steps for lane in lanes]
    return np.array(found, np.int64).reshape(-1, 6)


class Attempt:
    """One attempt of all ranks."""

    def __init__(self, base: Path, size: int) -> None:
        self.store, self.size = Store(str(base / "run")), size
        self.number = discovery.start_attempt(self.store, size)
        self.store.write(f"time/{self.number:06d}.json", b"{}")  # as the time ledger does at once
        self.ranks = Ranks(size)
        self.saved_from = self.step = 0
        self.managers: list[CheckpointManager] = [None] * size  # type: ignore[list-item]

        def start_rank(world: World, comms: Collectives) -> Any:
            nodes = LocalTier(
                self.store, Store(str(base / f"node-{world.rank}")), f"{size} workers", world, comms
            )
            manager = CheckpointManager(
                self.store, CheckpointSection(keep_last=KEEP), world, comms, self.number, nodes
            )
            self.managers[world.rank] = manager
            manifest = manager.find_latest()
            engine = Sharded(world)
            if manifest is not None:
                manifest = manager.load(manifest, engine, TENSORS)  # type: ignore[arg-type]
                assert engine.holds(manifest.progress.step)
            return manifest

        self.latest_by_rank = self.ranks.run(start_rank)
        if self.latest_by_rank[0] is not None and not isinstance(
            self.latest_by_rank[0], BaseException
        ):
            self.saved_from = self.step = self.latest_by_rank[0].progress.step

    def save(self, tier: Tier, background: bool) -> list[Any]:
        """Save the state at the current step."""
        steps = range(self.saved_from, self.step)

        def act(world: World, comms: Collectives) -> Any:
            engine, manager = Sharded(world), self.managers[world.rank]
            engine.become(self.step)
            draft = SaveRequest(
                "r",
                "Sharded",
                Progress(step=self.step, optimizer_step=self.step),
                LedgerRows(rows(steps, world.share(LANES))),
                TENSORS,
                {},
                {},
                tier,
            )
            if not background:
                return manager.save(engine, draft)  # type: ignore[arg-type]
            manager.start_save(engine, draft)  # type: ignore[arg-type]
            engine.become(-99)  # training continues; the copy is written
            return manager.finish_save()

        found = self.ranks.run(act)
        if tier is Tier.STORAGE and all(
            getattr(outcome, "problem", outcome) is None for outcome in found
        ):
            self.saved_from = self.step
        return found

    def close(self) -> None:
        for manager in self.managers:
            if manager is not None:
                manager.close()


class Protocol(RuleBasedStateMachine):
    """A run under any sequence of events."""

    @initialize(size=st.integers(1, 3))
    def start(self, size: int) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="protocol-"))
        self.store = Store(str(self.base / "run"))
        self.store.write("run.yaml", b"run: {}")
        self.has_ledger = True
        self.damaged: set[str] = set()
        self.acknowledged = 0  # the latest step whose save in storage was reported as committed
        self.zombies: list[Attempt] = []
        self.live = Attempt(self.base, size)

    @rule(steps=st.integers(1, 3), tier=TIERS, background=st.booleans())
    def train_and_save(self, steps: int, tier: Tier, background: bool) -> None:
        self.live.step += steps
        found = self.live.save(tier, background)
        assert all(outcome.problem is None for outcome in found), found
        if tier is Tier.STORAGE:
            self.acknowledged = self.live.step

    @rule(
        steps=st.integers(1, 3),
        tier=TIERS,
        place=st.sampled_from(PLACES),
        rank=st.integers(0, 2),
        size=SIZES,
    )
    def die_while_saving(self, steps: int, tier: Tier, place: str, rank: int, size: int) -> None:
        real, own = fault_injection.hit, rank % self.live.size if "file" in place else 0

        def hit(name: str, number: int = 0) -> None:
            if name == place and number == own:
                raise Killed

        self.live.step += steps
        fault_injection.hit = hit
        try:
            found = self.live.save(tier, False)
        finally:
            fault_injection.hit = real
        assert any(isinstance(outcome, BaseException) for outcome in found)
        self.restart(size)

    @rule(steps=st.integers(0, 3), size=SIZES)
    def die_and_restart(self, steps: int, size: int) -> None:
        self.live.step += steps
        self.restart(size)

    def restart(self, size: int) -> None:
        self.live.close()
        undamaged, number = self.undamaged(), self.live.number
        self.live = Attempt(self.base, size or self.live.size)
        assert self.live.number > number, "no number comes again"
        for latest_by_rank in self.live.latest_by_rank:
            assert not isinstance(latest_by_rank, BaseException), latest_by_rank
        step = self.live.step
        assert step >= (undamaged[0] if undamaged else 0), (
            "the run resumes at least from the latest undamaged checkpoint in storage"
        )
        self.acknowledged = min(self.acknowledged, step)
        if self.live.latest_by_rank[0] is not None and self.has_ledger:
            history = read_ledger(self.store, self.live.latest_by_rank[0])
            assert np.array_equal(
                history[:, [0, 2, 3]], rows(range(step), range(LANES))[:, [0, 2, 3]]
            )

    @rule(size=SIZES)
    def an_old_attempt_is_left_running(self, size: int) -> None:
        self.zombies.append(self.live)
        self.live = Attempt(self.base, size or self.live.size)
        assert self.live.number > self.zombies[-1].number

    @rule(lost=st.sampled_from(LOSSES))
    def a_folder_vanishes(self, lost: str) -> None:
        """One after the other: of those that carry the live attempt's number, one must be left."""
        record = f"{self.live.number:06d}.json"
        if lost == "time" and record not in self.store.list("attempts"):
            return
        if lost.startswith("attempts") and record not in self.store.list("time"):
            return
        self.store.remove(lost.format(self.live.number))
        self.has_ledger = self.has_ledger and lost != "ledger"

    @rule()
    def its_record_is_torn(self) -> None:
        record = f"{self.live.number:06d}.json"
        if record in self.store.list("attempts"):
            self.store.write(f"attempts/{record}", b'{"attempt": ')

    @rule()
    def a_start_without_check_on_a_store_that_ignores_conditions(self) -> None:
        def create_anyway(store: Store, path: str, content: bytes) -> bool:
            store.write(path, content)
            return True

        before, real = self.store.walk(), Store.create
        Store.create = create_anyway  # type: ignore[method-assign]
        try:
            with pytest.raises(ConfigError, match="Only storage with conditional writes"):
                discovery.start_attempt(self.store, 1)
        finally:
            Store.create = real  # type: ignore[method-assign]
        assert self.store.walk() == before

    @rule(count=st.integers(2, 3), size=SIZES)
    def several_starts_at_once(self, count: int, size: int) -> None:
        barrier = threading.Barrier(count, timeout=20)

        def start(_: int) -> int:
            barrier.wait()
            return discovery.start_attempt(self.store, 1)

        with ThreadPoolExecutor(count) as pool:
            numbers = list(pool.map(start, range(count)))
        assert len(set(numbers)) == count and min(numbers) > self.live.number
        self.restart(size)

    @precondition(lambda self: self.zombies)
    @rule(steps=st.integers(0, 9), tier=TIERS, background=st.booleans(), data=st.data())
    def a_zombie_saves(self, steps: int, tier: Tier, background: bool, data: Any) -> None:
        zombie = data.draw(st.sampled_from(self.zombies))
        zombie.step += steps
        before = self.manifests()
        found = zombie.save(tier, background)
        assert all(isinstance(outcome, BaseException) for outcome in found)
        assert any(
            isinstance(outcome, CheckpointError) and "has taken over" in str(outcome)
            for outcome in found
        )
        assert self.manifests() == before
        self.zombies.remove(zombie)
        zombie.close()

    @rule(rank=st.integers(0, 2))
    def a_node_is_lost(self, rank: int) -> None:
        shutil.rmtree(self.base / f"node-{rank}", ignore_errors=True)

    @precondition(lambda self: len(self.undamaged()) > 1)
    @rule(number=st.integers(0, 9), where=st.floats(0, 0.999), cut=st.booleans())
    def the_newest_is_damaged(self, number: int, where: float, cut: bool) -> None:
        name = next(
            name for name in discovery.list_committed(self.store) if name not in self.damaged
        )
        files = sorted((self.base / "run" / discovery.FOLDER / name).iterdir())
        victim = files[number % len(files)]
        content = bytearray(victim.read_bytes())
        place = int(where * len(content))
        if cut:
            content = content[:place]
        else:
            content[place] ^= 0x20
        victim.write_bytes(bytes(content))
        self.damaged.add(name)
        self.acknowledged = self.undamaged()[0]

    def undamaged(self) -> list[int]:
        """Return the steps of the undamaged checkpoints in storage, latest first."""
        return [
            (parse_folder(name) or (0, 0))[0]
            for name in discovery.list_committed(self.store)
            if name not in self.damaged
        ]

    def manifests(self) -> set[str]:
        return {str(path) for path in (self.base / "run").rglob(NAME)}

    @invariant()
    def what_was_said_to_be_committed_is_there(self) -> None:
        if hasattr(self, "base"):
            assert self.acknowledged == 0 or (self.undamaged() or [0])[0] >= self.acknowledged
            assert len(self.store.list(LOCAL_FOLDER)) <= 2

    def teardown(self) -> None:
        if hasattr(self, "base"):
            self.restart(2)
            for attempt in [self.live, *self.zombies]:
                attempt.close()
            with contextlib.suppress(OSError):
                shutil.rmtree(self.base)


Protocol.TestCase.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
TestProtocol = Protocol.TestCase
