"""Tokenizer processes next to training: started on first use, with one task at a time each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from queue import LifoQueue
from threading import Lock
from typing import Any

from dist_ft.core import scratch
from dist_ft.core.errors import DataError, SentError, StorageError
from dist_ft.data.blocks.tokenize_blocks import BlockTask, TaskResult, describe_encoder
from dist_ft.data.encoding.chat import Encoder

MAX_TRIES = 2


class TokenizerPool:
    """Up to `size` processes that write blocks to the cache."""

    def __init__(
        self, size: int, encoder: Encoder, limit_bytes: float, options: Mapping[str, Any]
    ) -> None:
        """Store the settings; start nothing yet.

        Args:
            size: maximum number of processes.
            encoder: what the processes encode rows with.
            limit_bytes: limit of the cache.
            options: `storage.options`.
        """
        self.size = size
        self._encoder = encoder
        self._limit_bytes = limit_bytes
        self._options = dict(options)

        # None stands for a process that is not started yet. Last in, first out: a process that runs
        # already is used before another is started.
        self._idle: LifoQueue[subprocess.Popen[str] | None] = LifoQueue()
        for _ in range(size):
            self._idle.put(None)

        self._folder: scratch.Scratch | None = None
        self._started: list[subprocess.Popen[str]] = []
        self._closed = False
        self._lock = Lock()

    def run(self, task: BlockTask) -> None:
        """Run a task (see `tokenize_blocks.create_task`) in a process and wait for it.

        Safe over threads.

        Raises:
            DistFtError: raised in the process; StorageError if processes die (for example, without
                memory) or the pool was closed.
            OSError: raised in the process.
        """
        # waits while all processes have a task
        process = self._idle.get()
        result = None
        try:
            for _ in range(MAX_TRIES):
                if process is None or process.poll() is not None:
                    process = self._start()
                result = self._send(process, json.dumps(task))
                if result is not None:
                    break

                # Died while it had the task: reap it, so that the next attempt starts another.
                process.wait()
        finally:
            # a dead one too: its place in the pool must not be lost
            self._idle.put(process)

        if result is None:
            assert process is not None
            raise StorageError(
                f"data: the tokenizer process died {MAX_TRIES} times (last exit code "
                f"{process.returncode}). It may need more memory. Lower data.block_mib, or set "
                "data.tokenizer_processes=0 to see its error."
            )

        if "error" in result:
            raise _restore_error(SentError(*result["error"]))

    def close(self) -> None:
        """End the processes without waiting for their tasks.

        `run` raises from now on, and no process is started.
        """
        # Under the lock of `_start`: no process can be started after those here were ended.
        with self._lock:
            self._closed = True

            # A kill loses nothing: cache files are written whole or not at all.
            for process in self._started:
                process.kill()
            for process in self._started:
                process.wait()

            if self._folder:
                self._folder.remove()

    def _start(self) -> subprocess.Popen[str]:
        """Start a process and register it for `close`.

        Raises:
            StorageError: the pool is closed.
        """
        with self._lock:
            if self._closed:
                raise StorageError(
                    "data: the tokenizer processes were stopped while blocks were requested. A run "
                    "that closes tokenizes no more blocks. Start the run again."
                )

            # All processes load the tokenizer from this folder, saved once: the tokenizer in memory
            # may have a template that no file of the model has.
            if self._folder is None:
                self._folder = scratch.create("tokenizer")
                self._encoder.tokenizer.save_pretrained(self._folder.path)

            self._started = [process for process in self._started if process.poll() is None]
            self._started.append(self._spawn(str(self._folder.path)))
            return self._started[-1]

    def _spawn(self, folder: str) -> subprocess.Popen[str]:
        setup = describe_encoder(self._encoder, folder, self._limit_bytes, self._options)
        # the package may be imported from a folder that only this process's sys.path names
        python_path = str(Path(__file__).resolve().parents[3])
        inherited_path = os.environ.get("PYTHONPATH")
        if inherited_path:
            python_path = os.pathsep.join([python_path, inherited_path])

        environment = {
            **os.environ,
            "PYTHONPATH": python_path,
            # the number of processes is configured; threads of each would compete with training
            "TOKENIZERS_PARALLELISM": "false",
            # so that no library takes GPU memory here
            "CUDA_VISIBLE_DEVICES": "",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "dist_ft.data.blocks.tokenize_blocks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        # `_send` flushes it, with the first task, and notices a process that has died by then
        assert process.stdin is not None
        process.stdin.write(json.dumps(setup) + "\n")
        return process

    @staticmethod
    def _send(process: subprocess.Popen[str], task: str) -> TaskResult | None:
        """Return the result of a task, or None if the process died."""
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(task + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None

        # an empty line is the end of its output: it died during the task
        line = process.stdout.readline()
        if not line:
            return None
        return json.loads(line)


def _restore_error(error: SentError) -> Exception:
    """Return the error that a process sent."""
    if error.type_name == "OSError":
        return OSError(*error.lines)

    return error.restore(DataError)
