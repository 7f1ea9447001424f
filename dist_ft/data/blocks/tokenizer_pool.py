"""Tokeniser processes beside training: started when first needed, one task at a time each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from queue import LifoQueue
from threading import Lock
from typing import Any

from dist_ft.core import errors
from dist_ft.core.errors import DataError, DistFtError, StorageError
from dist_ft.data.blocks.token_cache import fingerprint
from dist_ft.data.encoding.chat import Encoder

TRIES = 2


class TokeniserPool:
    """Up to `size` processes that put blocks into the cache."""

    def __init__(
        self, size: int, encoder: Encoder, limit_bytes: float, options: Mapping[str, Any]
    ) -> None:
        """Assign only; `options` are those of storage.options."""
        self.size = size
        self._encoder = encoder
        self._limit_bytes = limit_bytes
        self._options = dict(options)
        self._idle: LifoQueue[subprocess.Popen[str] | None] = LifoQueue()
        for _ in range(size):
            self._idle.put(None)
        self._folder: str | None = None
        self._started: list[subprocess.Popen[str]] = []
        self._closed = False
        self._lock = Lock()

    def run(self, task: Mapping[str, Any]) -> None:
        """Have a process do a task (`tokenise.pack_task`) and wait for it. Safe over threads.

        Raises:
            DistFtError: what the process met; StorageError if processes die of it (as one that runs out of memory), or
                if the pool was closed.
        """
        process, answer = self._idle.get(), None
        try:
            for _ in range(TRIES):
                if process is None or process.poll() is not None:
                    process = self._start()
                answer = self._ask(process, json.dumps(task))
                if answer is not None:
                    break
                process.wait()
        finally:
            self._idle.put(process)
        if answer is None:
            assert process is not None
            raise StorageError(
                f"data: the tokeniser process died {TRIES} times (last exit code "
                f"{process.returncode}); it may need more memory; lower data.block_mib, or set "
                "data.tokenizer_processes=0 to see its error"
            )
        if "error" in answer:
            raise _error(*answer["error"])

    def close(self) -> None:
        """End the processes. Tasks under way are not waited for: `run` raises, and no process is started any more."""
        with self._lock:
            self._closed = True
            for process in self._started:
                process.kill()
            for process in self._started:
                process.wait()
            if self._folder:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> subprocess.Popen[str]:
        """Return a new process, which `close` knows of.

        Raises:
            StorageError: the pool is closed.
        """
        with self._lock:
            if self._closed:
                raise StorageError(
                    "data: the tokeniser processes were ended while blocks were asked for; none is made "
                    "once a run closes; start it again"
                )
            if self._folder is None:
                self._folder = tempfile.mkdtemp(prefix="dist_ft-tokenizer-")
                self._encoder.tokenizer.save_pretrained(self._folder)
            self._started = [process for process in self._started if process.poll() is None]
            self._started.append(self._spawn(self._folder))
            return self._started[-1]

    def _spawn(self, folder: str) -> subprocess.Popen[str]:
        data = self._encoder.data
        setup = {
            "tokenizer": folder,
            "data": data.model_dump(mode="json"),
            "limit_bytes": self._limit_bytes,
            "options": self._options,
            "fingerprint": fingerprint(self._encoder),
            **self._encoder.recipe,
        }
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            [sys.executable, "-m", "dist_ft.data.blocks.tokenize_blocks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "TOKENIZERS_PARALLELISM": "false",
                "CUDA_VISIBLE_DEVICES": "",
            },
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(setup) + "\n")
        return process

    @staticmethod
    def _ask(process: subprocess.Popen[str], task: str) -> dict[str, Any] | None:
        """Return the answer to a task, or None if the process died."""
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(task + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None
        line = process.stdout.readline()
        return json.loads(line) if line else None


def _error(kind: str, text: str) -> Exception:
    """Return the error a process told of."""
    if kind == "OSError":
        return OSError(text)
    found = getattr(errors, kind, DataError)
    return found(text) if issubclass(found, DistFtError) else DataError(text)
