"""B8: bandwidth of save, restore and reshard / that of the raw disk, torch DCP and DeepSpeed.

    python tests/benchmarks/b8_bandwidth.py

The state of B7 (1.27 GB of float32 with AdamW's moments, filled with random numbers) under ZeRO-1,
on real ranks over gloo. Four ranks save and restore; three ranks restore the checkpoints of three
and of four. A time is that of the slowest rank, from barrier to barrier. On every side, written
files are on the disk at the end (fsync), and files to read are not in the page cache
(posix_fadvise).

- *raw*: each rank writes one file with as many bytes as it owns, 16 MiB at a time, with fsync; and
  reads it into one buffer.
- *ours*: `CheckpointManager.save` with the commit; `find_latest` and `load` with checksums, until
  the last byte is in the engine. The time after that (the engine gathers its working copy) is
  reported separately, because it does not depend on the disk.
- *DCP*: `torch.distributed.checkpoint` `save` and `load` of the same number of bytes, as DTensors
  sharded over the ranks.
- *DeepSpeed*: `save_checkpoint` on four ranks, `ds_to_universal`, `load_checkpoint` on three. It is
  compared with all of ours, from finding the checkpoint to an engine that is ready.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np

HERE = Path(__file__).resolve().parent
CHUNK = 16 * 2**20
GOAL_DISK, GOAL_RESHARD, GOAL_CONVERT = 0.9, 1.1, 10
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "checkpoint": {"load_universal": True},
}


def main() -> None:
    """Measure, print the table, write the JSON file; with --part: run one rank."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--peer-rounds", type=int, default=2, help="rounds of DeepSpeed's conversion and load"
    )
    parser.add_argument(
        "--vocabulary", type=int, default=32768, help="vocabulary size; smaller: less state"
    )
    parser.add_argument("--layers", type=int, default=8, help="number of layers; fewer: less state")
    parser.add_argument("--stage", type=int, default=1, choices=(1, 2, 3))
    parser.add_argument("--folder", help="folder on the disk to measure; default: a temporary one")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--out", help="JSON file to write instead of results/b8_bandwidth.json")
    args = parser.parse_args()
    if args.part:
        return run_rank(args)
    harness.require_one_thread()
    environment = harness.describe_environment()
    with tempfile.TemporaryDirectory(prefix="dist_ft-b8-", dir=args.folder) as name:
        args.folder = name
        measured = {
            **run_part(args, "four", 4),
            "convert_s": [convert(args, number) for number in range(args.peer_rounds)],
        }
        measured.update(run_part(args, "three", 3))
    result = summarize(measured)
    report(result)
    harness.save_results(
        "b8_bandwidth",
        {
            key: getattr(args, key)
            for key in ("rounds", "peer_rounds", "vocabulary", "layers", "stage")
        },
        environment,
        result,
        args.out,
    )


def run_part(args: argparse.Namespace, part: str, size: int) -> dict[str, Any]:
    """Run one part of the benchmark on `size` ranks and return the measurements of rank 0."""
    options = [
        f"--{key.replace('_', '-')}={value}"
        for key, value in {**vars(args), "part": part}.items()
        if value is not None
    ]
    harness.run_ranks(__file__, options, size, Path(args.folder) / f"log-{part}", 800)
    return json.loads((Path(args.folder) / f"{part}.json").read_text())


def convert(args: argparse.Namespace, number: int) -> float:
    """Return the seconds of the command `ds_to_universal`."""
    folder = Path(args.folder)
    shutil.rmtree(folder / "deepspeed/universal", ignore_errors=True)
    os.sync()
    evict(folder / "deepspeed")
    start_s = time.perf_counter()
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "deepspeed.checkpoint.ds_to_universal",
            "--input_folder",
            str(folder / "deepspeed/t"),
            "--output_folder",
            str(folder / "deepspeed/universal"),
            "--inject_missing_state",
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    seconds = time.perf_counter() - start_s
    if process.returncode:
        raise SystemExit(process.stdout[-2000:] + process.stderr[-3000:])
    print(f"round {number + 1}: convert {seconds:.4g}", file=sys.stderr, flush=True)
    return seconds


def evict(folder: Path) -> None:
    """Remove the files of a folder from the page cache; they must be on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


# One rank


class Rank:
    """One rank: its world, its engine, and a clock that all ranks share.

    Attributes:
        own_bytes: bytes of the state that this rank saves.
        total_bytes: their sum over all ranks.
        own: this rank's file of the raw side.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        import b7_save
        import torch
        import torch.distributed as dist

        from dist_ft.config.schema import OptimizerSection
        from dist_ft.core.world import World, collectives
        from dist_ft.engine import deepspeed_engine as sharded

        dist.init_process_group("gloo")
        sharded.attach_to_process_group(False)
        b7_save.SHAPE.update(vocab_size=args.vocabulary, num_hidden_layers=args.layers)
        self.world = World.from_environment()
        self.comms = collectives(self.world)
        self.folder = Path(args.folder)
        settings = {**SETTINGS, "zero_optimization": {"stage": args.stage}}
        with sharded.zero_init(settings):
            module = b7_save.build_module()
        self.engine = sharded.DeepSpeedEngine(
            module, OptimizerSection(learning_rate=1e-5), settings, self.world
        )
        torch.manual_seed(self.world.rank)
        for part in self.engine.state_slices():
            part.write(torch.rand(part.numel))
        self.own_bytes = sum(part.numel * 4 for part in self.engine.state_slices() if part.owned)
        self.total_bytes = int(self.comms.sum([self.own_bytes])[0])
        self.own = self.folder / f"raw/{self.world.rank}"
        self.own.parent.mkdir(exist_ok=True)

    def timed(self, action: Callable[[], Any], cold: Path | None = None) -> float:
        """Return the seconds until the last rank has done `action`.

        Args:
            action: what to measure.
            cold: a folder to evict from the page cache before.
        """
        if self.world.rank == 0:
            os.sync()
            if cold:
                evict(cold)
        self.comms.barrier()
        start_s = time.perf_counter()
        action()
        self.comms.barrier()
        return self.comms.broadcast(time.perf_counter() - start_s)

    def state_sum(self) -> float:
        """Return the sum of the state of all ranks, to compare loaded with saved state."""
        own_sum = 0.0
        for part in self.engine.state_slices():
            if part.owned:
                own_sum += float(part.read().double().sum())
        return self.comms.sum([own_sum])[0]


def run_rank(args: argparse.Namespace) -> None:
    """Measure one part; rank 0 writes the measurements."""
    sys.path.insert(0, str(HERE))
    rank = Rank(args)
    measured = measure_four(rank, args) if args.part == "four" else measure_three(rank, args)
    if rank.world.rank == 0:
        (rank.folder / f"{args.part}.json").write_text(json.dumps(measured))
    rank.comms.barrier()


def measure_four(rank: Rank, args: argparse.Namespace) -> dict[str, Any]:
    """Measure save and restore on four ranks, of ours, the raw disk and DCP.

    Also write DeepSpeed's checkpoint for `convert`.
    """
    state = dtensors(rank)
    saves = {
        "raw": lambda: raw_write(rank),
        "ours": saver(rank, "four"),
        "DCP": lambda: dcp_save(rank, state),
    }
    restores = {
        "raw": lambda: raw_read(rank),
        "ours": lambda: restore(rank, "four").loaded_s,
        "DCP": lambda: dcp_load(rank, state),
        "raw again": lambda: raw_read(rank),
    }
    before = rank.state_sum()
    for side in saves.values():
        side()
    measured = {"save_s": harness.alternate_sides(saves, args.rounds)}
    clear_state(rank)
    restores["ours"]()
    if rank.state_sum() != before:
        raise SystemExit("the restored state differs from the saved state")
    measured["restore_s"] = harness.alternate_sides(restores, args.rounds)
    deepspeed_save_s = rank.timed(lambda: deepspeed_save(rank))
    return {
        **measured,
        "deepspeed_save_s": deepspeed_save_s,
        "state_bytes": rank.total_bytes,
        "content": before,
    }


def measure_three(rank: Rank, args: argparse.Namespace) -> dict[str, Any]:
    """Measure restoring on three ranks: of three, of four, and DeepSpeed's universal."""
    saver(rank, "three")()
    ready_s: dict[str, list[float]] = {"plain": [], "reshard": []}

    def side(name: str, place: str) -> float:
        times = restore(rank, place)
        ready_s[name].append(times.ready_s)
        return times.loaded_s

    clear_state(rank)
    restore(rank, "four")
    before = json.loads((rank.folder / "four.json").read_text())["content"]
    if abs(rank.state_sum() - before) > 1e-9 * before:  # another order of the sum
        raise SystemExit("the resharded state differs from the saved state")
    ready_s["reshard"].clear()
    loaded_s = harness.alternate_sides(
        {"plain": lambda: side("plain", "three"), "reshard": lambda: side("reshard", "four")},
        args.rounds,
    )
    universal = rank.folder / "deepspeed"
    loads = [
        rank.timed(
            lambda: rank.engine._engine.load_checkpoint(str(universal), tag="universal"), universal
        )
        for _ in range(args.peer_rounds)
    ]
    return {"three_s": loaded_s, "three_ready_s": ready_s, "universal_load_s": loads}


def clear_state(rank: Rank) -> None:
    """Set the state to zero."""
    import torch

    for part in rank.engine.state_slices():
        part.write(torch.zeros(part.numel))


def chunks(num_bytes: int) -> Iterator[tuple[int, memoryview]]:
    """Yield (offset, memory) of each chunk of `num_bytes`; the memory is reused."""
    buffer = memoryview(_buffer)
    for start in range(0, num_bytes, CHUNK):
        yield start, buffer[: min(CHUNK, num_bytes - start)]


_buffer = np.random.default_rng(0).integers(0, 255, CHUNK, dtype=np.uint8)


def raw_write(rank: Rank) -> float:
    """Measure writing one new file per rank, with fsync."""

    def write() -> None:
        descriptor = os.open(rank.own, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        for _, content in chunks(rank.own_bytes):
            os.write(descriptor, content)
        os.fsync(descriptor)
        os.close(descriptor)

    rank.own.unlink(missing_ok=True)
    return rank.timed(write)


def raw_read(rank: Rank) -> float:
    """Measure reading one file per rank."""

    def read() -> None:
        descriptor = os.open(rank.own, os.O_RDONLY)
        for start, memory in chunks(rank.own_bytes):
            os.preadv(descriptor, [memory], start)
        os.close(descriptor)

    return rank.timed(read, rank.folder / "raw")


def build_manager(rank: Rank, place: str) -> Any:
    """Return a manager of the checkpoints at `place`."""
    from dist_ft.checkpoint.manager import CheckpointManager
    from dist_ft.config.schema import CheckpointSection
    from dist_ft.storage.filesystem import Store

    return CheckpointManager(
        Store(str(rank.folder / place)), CheckpointSection(keep_last=9), rank.world, rank.comms, 1
    )


def saver(rank: Rank, place: str) -> Callable[[], float]:
    """Return a function that saves a checkpoint at `place` and returns the seconds with the commit.

    The previous checkpoint is removed first, off the clock.
    """
    import b7_save

    steps = iter(range(1, 10**6))

    def run() -> float:
        if rank.world.rank == 0:
            shutil.rmtree(rank.folder / place, ignore_errors=True)
        rank.comms.barrier()
        manager, step = build_manager(rank, place), next(steps)

        def save() -> None:
            outcome = manager.save(rank.engine, b7_save.save_request(step))
            if outcome.problem is not None:
                raise outcome.problem

        seconds = rank.timed(save)
        manager.close()
        return seconds

    return run


class LoadTimer:
    """The engine's loading interface; records when the state was loaded on all ranks."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self.state_slices = rank.engine.state_slices
        self.loaded_at_s = 0.0

    def finish_load(self, optimizer_step: int) -> None:
        self._rank.comms.barrier()
        self.loaded_at_s = time.perf_counter()
        self._rank.engine.finish_load(optimizer_step)


class RestoreTimes(NamedTuple):
    """The times of a restore.

    Attributes:
        loaded_s: seconds until the state is in the engine on all ranks.
        ready_s: seconds until the engine is ready.
    """

    loaded_s: float
    ready_s: float


def restore(rank: Rank, place: str) -> RestoreTimes:
    """Restore the checkpoint at `place`."""
    manager, timer = build_manager(rank, place), LoadTimer(rank)
    started_s = 0.0

    def load() -> None:
        nonlocal started_s
        started_s = time.perf_counter()
        manager.load(manager.find_latest(), timer, {})

    ready_s = rank.timed(load, rank.folder / place)
    manager.close()
    return RestoreTimes(rank.comms.broadcast(timer.loaded_at_s - started_s), ready_s)


def dtensors(rank: Rank) -> dict[str, Any]:
    """Return random state of the size of the engine's, sharded evenly over the ranks."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    size = rank.world.num_ranks
    mesh = init_device_mesh("cpu", (size,))
    numel_by_name: dict[str, int] = {}
    own_parts = [
        (f"{part.key}:{part.name}", part.numel) for part in rank.engine.state_slices() if part.owned
    ]
    for parts_of_rank in rank.comms.all_gather(own_parts):
        for name, numel in parts_of_rank:
            numel_by_name[name] = numel_by_name.get(name, 0) + numel

    state = {}
    for name, numel in sorted(numel_by_name.items()):
        shard = -(-numel // size)
        own = max(0, min(shard, numel - rank.world.rank * shard))
        state[name] = DTensor.from_local(
            torch.rand(own),
            mesh,
            [Shard(0)],
            run_check=False,
            shape=torch.Size([numel]),
            stride=(1,),
        )
    return state


def dcp_save(rank: Rank, state: dict[str, Any]) -> float:
    """Measure DCP's save, which does its own fsync."""
    import torch.distributed.checkpoint as dcp

    if rank.world.rank == 0:
        shutil.rmtree(rank.folder / "dcp", ignore_errors=True)
    rank.comms.barrier()
    return rank.timed(lambda: dcp.save(state, checkpoint_id=str(rank.folder / "dcp")))


def dcp_load(rank: Rank, state: dict[str, Any]) -> float:
    """Measure DCP's load into the same tensors."""
    import torch.distributed.checkpoint as dcp

    return rank.timed(
        lambda: dcp.load(state, checkpoint_id=str(rank.folder / "dcp")), rank.folder / "dcp"
    )


def deepspeed_save(rank: Rank) -> None:
    """Save with DeepSpeed, and wait until the files are on the disk."""
    rank.engine._engine.save_checkpoint(str(rank.folder / "deepspeed"), tag="t")
    if rank.world.rank == 0:
        os.sync()


# Results


def summarize(measured: dict[str, Any]) -> dict[str, Any]:
    """Return the measurements with their ratios."""
    save, load, three_s, ready = (
        measured[key] for key in ("save_s", "restore_s", "three_s", "three_ready_s")
    )
    converted = [
        convert_s + load_s
        for convert_s, load_s in zip(
            measured["convert_s"], measured["universal_load_s"], strict=True
        )
    ]
    return {
        **measured,
        "save_over_raw": harness.ratio(save["raw"], save["ours"]),
        "restore_over_raw": harness.ratio(load["raw"], load["ours"]),
        "DCP_save_over_raw": harness.ratio(save["raw"], save["DCP"]),
        "DCP_restore_over_raw": harness.ratio(load["raw"], load["DCP"]),
        "raw_over_raw": harness.ratio(load["raw"], load["raw again"]),
        "reshard_over_plain": harness.ratio(three_s["reshard"], three_s["plain"]),
        "convert_and_load_s": converted,
        "convert_and_load_over_reshard": harness.ratio(
            converted, ready["reshard"][: len(converted)]
        ),
    }


def report(result: dict[str, Any]) -> None:
    """Print the results."""
    size, goal = result["state_bytes"], harness.format_goal

    def speed(seconds: list[float]) -> str:
        return f"{size / 1e6 / float(np.exp(np.mean(np.log(seconds)))):,.0f} MB/s"

    save, load, three_s = result["save_s"], result["restore_s"], result["three_s"]
    rows = [
        ("save: raw write and fsync", speed(save["raw"]), "", ""),
        (
            "save: ours / raw",
            speed(save["ours"]),
            str(result["save_over_raw"]),
            goal(result["save_over_raw"], GOAL_DISK, at_least=True),
        ),
        ("save: DCP / raw", speed(save["DCP"]), str(result["DCP_save_over_raw"]), ""),
        ("restore: raw, cold read", speed(load["raw"]), "", ""),
        (
            "restore: ours / raw",
            speed(load["ours"]),
            str(result["restore_over_raw"]),
            goal(result["restore_over_raw"], GOAL_DISK, at_least=True),
        ),
        ("restore: DCP / raw", speed(load["DCP"]), str(result["DCP_restore_over_raw"]), ""),
        ("restore: raw / raw (control)", speed(load["raw again"]), str(result["raw_over_raw"]), ""),
        (
            "time of reshard 4 -> 3 / restore 3 -> 3",
            speed(three_s["reshard"]),
            str(result["reshard_over_plain"]),
            goal(result["reshard_over_plain"], GOAL_RESHARD, at_least=False),
        ),
        (
            "time of convert and load / reshard 4 -> 3",
            f"{np.mean(result['convert_and_load_s']):.1f} s / "
            f"{np.mean(result['three_ready_s']['reshard']):.1f} s",
            str(result["convert_and_load_over_reshard"]),
            goal(result["convert_and_load_over_reshard"], GOAL_CONVERT, at_least=True),
        ),
    ]
    harness.print_table(
        f"B8 bandwidth, {size / 1e9:.2f} GB of state",
        ("side", "speed", "ratio [95 %]", "goal"),
        rows,
    )


if __name__ == "__main__":
    main()
