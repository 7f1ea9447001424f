"""B8: bandwidth of save, restore and reshard / that of the raw disk; beside torch DCP and DeepSpeed's universal format.

    python tests/benchmarks/b8_bandwidth.py

The state of B7 (1.27 GB of float32 with AdamW's moments, filled with random numbers) under ZeRO-1, on real ranks over
gloo. Four ranks save and restore, three read what three saved and what four saved. A time is that of the slowest rank,
from a barrier to a barrier, files on the disk (fsync) or out of the page cache (posix_fadvise) on every side alike.

- *raw*: every rank writes as many bytes as it owns to one file, 16 MiB at a time, and forces them to disk; reads them
  into one buffer.
- *ours*: `CheckpointManager.save`, commit included; `newest` and `load`, checksums and all, until the last byte lies in
  the engine. What the engine does then (gather its working copy) is told apart: it is not the disk's.
- *DCP*: `torch.distributed.checkpoint` `save` and `load` of as many bytes, as DTensors sharded over the ranks.
- *DeepSpeed*: `save_checkpoint` on four ranks, `ds_to_universal`, `load_checkpoint` on three; held against all of ours,
  from finding the checkpoint to an engine that is ready.
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
from typing import Any

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
    """Measure, print the table, write the JSON; or be a rank of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer-rounds", type=int, default=2, help="of convert and load")
    parser.add_argument("--vocabulary", type=int, default=32768, help="smaller: less state")
    parser.add_argument("--layers", type=int, default=8, help="fewer: less state")
    parser.add_argument("--stage", type=int, default=1, choices=(1, 2, 3))
    parser.add_argument("--folder", help="on the disk to measure; a temporary one by default")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--out", help="JSON file to write instead of results/b8_bandwidth.json")
    args = parser.parse_args()
    if args.part:
        return be_rank(args)
    harness.require_one_thread()
    environment = harness.describe_environment()
    with tempfile.TemporaryDirectory(prefix="dist_ft-b8-", dir=args.folder) as name:
        args.folder = name
        found = {
            **ranks(args, "four", 4),
            "convert_s": [convert(args, number) for number in range(args.peer_rounds)],
        }
        found.update(ranks(args, "three", 3))
    result = summarize(found)
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


def ranks(args: argparse.Namespace, part: str, size: int) -> dict[str, Any]:
    """Run one part of the benchmark on so many ranks and return what rank 0 found."""
    given = [
        f"--{key.replace('_', '-')}={value}"
        for key, value in {**vars(args), "part": part}.items()
        if value is not None
    ]
    harness.run_ranks(__file__, given, size, Path(args.folder) / f"log-{part}", 800)
    return json.loads((Path(args.folder) / f"{part}.json").read_text())


def convert(args: argparse.Namespace, number: int) -> float:
    """Return how long `ds_to_universal` takes, as the command it is."""
    folder = Path(args.folder)
    shutil.rmtree(folder / "deepspeed/universal", ignore_errors=True)
    os.sync()
    evict(folder / "deepspeed")
    start_s = time.perf_counter()
    done = subprocess.run(
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
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-3000:])
    print(f"round {number + 1}: convert {seconds:.4g}", file=sys.stderr, flush=True)
    return seconds


def evict(folder: Path) -> None:
    """Put the files below a folder out of the page cache; they must be on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


# On a rank


class Rank:
    """One rank: its world, its engine, and a clock that all ranks share."""

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
        for slot in self.engine.state_slices():
            slot.write(torch.rand(slot.numel))
        self.own_bytes = sum(slot.numel * 4 for slot in self.engine.state_slices() if slot.owned)
        self.total_bytes = int(self.comms.sum([self.own_bytes])[0])
        self.own = self.folder / f"raw/{self.world.rank}"
        self.own.parent.mkdir(exist_ok=True)

    def timed(self, action: Callable[[], Any], cold: Path | None = None) -> float:
        """Return how long `action` takes until the last rank has done it; `cold`: what it reads is evicted before."""
        if self.world.rank == 0:
            os.sync()
            if cold:
                evict(cold)
        self.comms.barrier()
        start_s = time.perf_counter()
        action()
        self.comms.barrier()
        return self.comms.broadcast(time.perf_counter() - start_s)

    def content(self) -> float:
        """Return the sum of all state there is: what was loaded is what was saved."""
        return self.comms.sum(
            [
                sum(
                    float(slot.read().double().sum())
                    for slot in self.engine.state_slices()
                    if slot.owned
                )
            ]
        )[0]


def be_rank(args: argparse.Namespace) -> None:
    """Measure one part and, on rank 0, write down what was found."""
    sys.path.insert(0, str(HERE))
    rank = Rank(args)
    found = four(rank, args) if args.part == "four" else three(rank, args)
    if rank.world.rank == 0:
        (rank.folder / f"{args.part}.json").write_text(json.dumps(found))
    rank.comms.barrier()


def four(rank: Rank, args: argparse.Namespace) -> dict[str, Any]:
    """Save and restore on four ranks, beside the raw disk and DCP; then leave DeepSpeed's checkpoint for `convert`."""
    state = dtensors(rank)
    saves = {
        "raw": lambda: raw_write(rank),
        "ours": saver(rank, "four"),
        "DCP": lambda: dcp_save(rank, state),
    }
    restores = {
        "raw": lambda: raw_read(rank),
        "ours": lambda: restore(rank, "four")[0],
        "DCP": lambda: dcp_load(rank, state),
        "raw again": lambda: raw_read(rank),
    }
    before = rank.content()
    for side in saves.values():
        side()
    found = {"save_s": harness.alternate_sides(saves, args.rounds)}
    blank(rank)
    restores["ours"]()
    if rank.content() != before:
        raise SystemExit("what was restored is not what was saved")
    found["restore_s"] = harness.alternate_sides(restores, args.rounds)
    written = rank.timed(lambda: deepspeed_save(rank))
    return {
        **found,
        "deepspeed_save_s": written,
        "state_bytes": rank.total_bytes,
        "content": before,
    }


def three(rank: Rank, args: argparse.Namespace) -> dict[str, Any]:
    """Restore on three ranks what three have saved and what four have, and DeepSpeed's universal checkpoint."""
    saver(rank, "three")()
    every: dict[str, list[float]] = {"plain": [], "reshard": []}

    def side(name: str, place: str) -> float:
        read, whole = restore(rank, place)
        every[name].append(whole)
        return read

    blank(rank)
    restore(rank, "four")
    before = json.loads((rank.folder / "four.json").read_text())["content"]
    if abs(rank.content() - before) > 1e-9 * before:  # another order of adding
        raise SystemExit("what was resharded is not what was saved")
    every["reshard"].clear()
    found = harness.alternate_sides(
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
    return {"three_s": found, "three_ready_s": every, "universal_load_s": loads}


def blank(rank: Rank) -> None:
    """Forget the state."""
    import torch

    for slot in rank.engine.state_slices():
        slot.write(torch.zeros(slot.numel))


def chunks(num_bytes: int) -> Iterator[tuple[int, memoryview]]:
    """Yield (offset, memory to write or read) over so many bytes; always the same memory, which was touched before."""
    buffer = memoryview(_buffer)
    for start in range(0, num_bytes, CHUNK):
        yield start, buffer[: min(CHUNK, num_bytes - start)]


_buffer = np.random.default_rng(0).integers(0, 255, CHUNK, dtype=np.uint8)


def raw_write(rank: Rank) -> float:
    """Each rank writes one new file and forces it to disk."""

    def write() -> None:
        descriptor = os.open(rank.own, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        for _, content in chunks(rank.own_bytes):
            os.write(descriptor, content)
        os.fsync(descriptor)
        os.close(descriptor)

    rank.own.unlink(missing_ok=True)
    return rank.timed(write)


def raw_read(rank: Rank) -> float:
    """Each rank reads its file."""

    def read() -> None:
        descriptor = os.open(rank.own, os.O_RDONLY)
        for start, memory in chunks(rank.own_bytes):
            os.preadv(descriptor, [memory], start)
        os.close(descriptor)

    return rank.timed(read, rank.folder / "raw")


def manager_of(rank: Rank, place: str) -> Any:
    """Return a manager of the checkpoints at `place`."""
    from dist_ft.checkpoint.manager import CheckpointManager
    from dist_ft.config.schema import CheckpointSection
    from dist_ft.storage.filesystem import Store

    return CheckpointManager(
        Store(str(rank.folder / place)), CheckpointSection(keep_last=9), rank.world, rank.comms, 1
    )


def saver(rank: Rank, place: str) -> Callable[[], float]:
    """Return what saves and commits a checkpoint at `place`; the one before it is removed first, off the clock."""
    import b7_save

    steps = iter(range(1, 10**6))

    def run() -> float:
        if rank.world.rank == 0:
            shutil.rmtree(rank.folder / place, ignore_errors=True)
        rank.comms.barrier()
        manager, step = manager_of(rank, place), next(steps)

        def save() -> None:
            outcome = manager.save(rank.engine, b7_save.save_request(step))
            if outcome.problem is not None:
                raise outcome.problem

        seconds = rank.timed(save)
        manager.close()
        return seconds

    return run


class Watched:
    """The engine, with a note of when its slots were full on all ranks."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self.state_slices = rank.engine.state_slices
        self.full_at = 0.0

    def finish_load(self, optimizer_step: int) -> None:
        self._rank.comms.barrier()
        self.full_at = time.perf_counter()
        self._rank.engine.finish_load(optimizer_step)


def restore(rank: Rank, place: str) -> tuple[float, float]:
    """Return the seconds until the engine's slots are full, and until the engine is ready."""
    manager, watched, began = manager_of(rank, place), Watched(rank), [0.0]

    def load() -> None:
        began[0] = time.perf_counter()
        manager.load(manager.find_latest(), watched, {})

    whole = rank.timed(load, rank.folder / place)
    manager.close()
    return rank.comms.broadcast(watched.full_at - began[0]), whole


def dtensors(rank: Rank) -> dict[str, Any]:
    """Return as much state as the engine's, sharded evenly over the ranks."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh, size = init_device_mesh("cpu", (rank.world.num_ranks,)), rank.world.num_ranks
    whole: dict[str, int] = {}
    for part in rank.comms.all_gather(
        [
            (f"{slot.key}:{slot.name}", slot.numel)
            for slot in rank.engine.state_slices()
            if slot.owned
        ]
    ):
        for name, numel in part:
            whole[name] = whole.get(name, 0) + numel
    state = {}
    for name, numel in sorted(whole.items()):
        most = -(-numel // size)
        own = max(0, min(most, numel - rank.world.rank * most))
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
    """DCP's save (it forces its files to disk by itself)."""
    import torch.distributed.checkpoint as dcp

    if rank.world.rank == 0:
        shutil.rmtree(rank.folder / "dcp", ignore_errors=True)
    rank.comms.barrier()
    return rank.timed(lambda: dcp.save(state, checkpoint_id=str(rank.folder / "dcp")))


def dcp_load(rank: Rank, state: dict[str, Any]) -> float:
    """DCP's load into the same tensors."""
    import torch.distributed.checkpoint as dcp

    return rank.timed(
        lambda: dcp.load(state, checkpoint_id=str(rank.folder / "dcp")), rank.folder / "dcp"
    )


def deepspeed_save(rank: Rank) -> None:
    """DeepSpeed's own save, and its bytes on the disk."""
    rank.engine._engine.save_checkpoint(str(rank.folder / "deepspeed"), tag="t")
    if rank.world.rank == 0:
        os.sync()


# What it says


def summarize(found: dict[str, Any]) -> dict[str, Any]:
    """Return what was found with the ratios of it."""
    save, load, three_s, ready = (
        found[key] for key in ("save_s", "restore_s", "three_s", "three_ready_s")
    )
    converted = [a + b for a, b in zip(found["convert_s"], found["universal_load_s"], strict=True)]
    return {
        **found,
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
    size, reached = result["state_bytes"], harness.format_goal

    def speed(seconds: list[float]) -> str:
        return f"{size / 1e6 / float(np.exp(np.mean(np.log(seconds)))):,.0f} MB/s"

    save, load, three_s = result["save_s"], result["restore_s"], result["three_s"]
    rows = [
        ("save: raw, write and fsync", speed(save["raw"]), "", ""),
        (
            "save: ours / raw",
            speed(save["ours"]),
            str(result["save_over_raw"]),
            reached(result["save_over_raw"], GOAL_DISK, at_least=True),
        ),
        ("save: DCP / raw", speed(save["DCP"]), str(result["DCP_save_over_raw"]), ""),
        ("restore: raw, cold read", speed(load["raw"]), "", ""),
        (
            "restore: ours / raw",
            speed(load["ours"]),
            str(result["restore_over_raw"]),
            reached(result["restore_over_raw"], GOAL_DISK, at_least=True),
        ),
        ("restore: DCP / raw", speed(load["DCP"]), str(result["DCP_restore_over_raw"]), ""),
        ("restore: raw / raw (control)", speed(load["raw again"]), str(result["raw_over_raw"]), ""),
        (
            "time of 4 -> 3 / of 3 -> 3",
            speed(three_s["reshard"]),
            str(result["reshard_over_plain"]),
            reached(result["reshard_over_plain"], GOAL_RESHARD, at_least=False),
        ),
        (
            "time of convert and load / of 4 -> 3",
            f"{np.mean(result['convert_and_load_s']):.1f} s / "
            f"{np.mean(result['three_ready_s']['reshard']):.1f} s",
            str(result["convert_and_load_over_reshard"]),
            reached(result["convert_and_load_over_reshard"], GOAL_CONVERT, at_least=True),
        ),
    ]
    harness.print_table(
        f"B8 bandwidth, {size / 1e9:.2f} GB of state",
        ("side", "speed", "ratio [95 %]", "goal"),
        rows,
    )


if __name__ == "__main__":
    main()
