"""A short run as a person would start it, disturbed or not, followed to its end; what drill and selftest share.

Each run is the command `dist-ft train` in a process of its own; what it is disturbed with is a failpoint that the
command hands to its workers. Guarantees: no command outlives its time or this process's interruption.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_ft.config.load import resolved_yaml
from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import DistFtError
from dist_ft.core.logs import redact
from dist_ft.runs import catalog, ledger_audit, time_accounting
from dist_ft.selftest.drill_scenarios import AGAIN, Evidence, Line, Scenario
from dist_ft.storage.filesystem import Store
from dist_ft.training.metrics_log import read_metrics

LIMIT_S = 600.0
"""Seconds a command may take, besides what workers may take to start."""
LEAVE_S = 30.0


def play(
    config: RunConfig, scenario: Scenario, place: Store, again: RunConfig | None = None
) -> Evidence:
    """Run a scenario to its end and return what it left behind; its output goes to `<name>.log` in `place`.

    `again`: the config of the second command, where the scenario has one; None: that of the first.
    """
    begun, lines, codes = time.monotonic(), list[Line](), list[int | None]()
    limit_s = LIMIT_S + config.cluster.start_timeout_s
    with tempfile.TemporaryDirectory(prefix="dist_ft-rehearsal-") as folder:
        disturbed = {"DIST_FT_FAILPOINT": scenario.failpoint} if scenario.failpoint else {}
        codes.append(
            follow(_command(config, folder), disturbed, limit_s, begun, lines, scenario.terminate)
        )
        if codes[0] == scenario.first_code != 0:
            lines.append(Line(time.monotonic() - begun, AGAIN))
            codes.append(follow(_command(again or config, folder), {}, limit_s, begun, lines))
    place.write(
        f"{scenario.name}.log",
        "".join(f"{line.at_s:8.2f} {redact(line.text)}\n" for line in lines).encode(),
    )
    return _evidence(config.run_url, codes, lines)


def _command(config: RunConfig, folder: str) -> list[str]:
    path = Path(folder) / f"{config.run.name}.yaml"
    path.write_text(resolved_yaml(config))
    return [sys.executable, "-m", "dist_ft.cli", "train", str(path), "--skip-check"]


def follow(
    command: Sequence[str],
    environment: dict[str, str],
    limit_s: float,
    begun: float,
    lines: list[Line],
    terminate: bool = False,
) -> int | None:
    """Run `command` to its end, adding what it says to `lines`; return its exit code, None if it had to be ended.

    Args:
        command: what to run.
        environment: variables besides this process's own; failpoints of this process's own are not passed on.
        limit_s: seconds until it is ended.
        begun: the steady clock's time that lines count from.
        lines: what it says is added here.
        terminate: send it SIGTERM when it tells of a failpoint.
    """
    own = {
        key: value for key, value in os.environ.items() if not key.startswith("DIST_FT_FAILPOINT")
    }
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={"OMP_NUM_THREADS": "1", **own, **environment},
        start_new_session=True,
    )

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(Line(time.monotonic() - begun, line.rstrip("\n")))
            if terminate and "failpoint " in line:
                process.terminate()

    reader = threading.Thread(target=read, name="rehearsal", daemon=True)
    reader.start()
    try:
        code: int | None = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        code = None
        lines.append(Line(time.monotonic() - begun, f"no end within {limit_s:.0f} s; it is ended"))
    finally:
        _end(process)
    reader.join(LEAVE_S)
    return code


def _end(process: subprocess.Popen[Any]) -> None:
    """End a command that still runs: first as a person would, then with all it has started."""
    if process.poll() is not None:
        return
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LEAVE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _evidence(url: str, codes: Sequence[int | None], lines: Sequence[Line]) -> Evidence:
    """Return what lies in the storage of a run that has ended; what can not be read is evidence too."""
    store = Store(url)
    try:
        losses = tuple(
            (line["step"], line["loss"]) for line in read_metrics(store) if line["kind"] == "train"
        )
        checked = list(catalog.verify(url))
        times_kept, _ = time_accounting.accounts(store)
        counted = ledger_audit.audit(url)
    except (DistFtError, KeyError) as error:
        return Evidence(
            tuple(codes), tuple(lines), ledger=f"what the run left can not be read ({error})"
        )
    return Evidence(
        tuple(codes),
        tuple(lines),
        losses,
        "" if counted.is_sound else ledger_audit.describe(counted),
        tuple(f"{name}: {wrong}" for name, wrong in checked if wrong),
        len(checked),
        len(catalog.attempts(store)),
        time_accounting.stall_s(times_kept),
    )
