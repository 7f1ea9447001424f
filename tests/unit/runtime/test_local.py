"""The first signal saves and stops; the second one has its usual effect."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny

from dist_ft.config.load import load_config
from dist_ft.core.errors import ConfigError, Interrupted
from dist_ft.runtime import local
from dist_ft.runtime.local import stop_on_signal
from dist_ft.training.console import Console
from dist_ft.training.run_context import RunContext


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.base(tmp_path_factory.mktemp("local"), 40)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_requests_a_stop(number):
    before, stream = signal.getsignal(number), io.StringIO()
    with stop_on_signal(Console(stream)) as got_signal:
        assert not got_signal()
        os.kill(os.getpid(), number)
        assert got_signal()
        assert signal.getsignal(number) == before  # the second has its usual effect
    assert signal.getsignal(number) == before
    assert (
        stream.getvalue()
        == f"{number.name}: saving after this step, then stopping (again: stop at once)\n"
    )


def test_signal_in_the_middle_of_a_line_is_printed_after_it():
    """A buffered stream refuses to be entered again by the thread that is in it."""

    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.seen = b""

        def writable(self) -> bool:
            return True

        def write(self, data) -> int:
            if not self.seen:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)
            self.seen += bytes(data)
            return len(data)

    pipe = Pipe()
    console = Console(io.TextIOWrapper(io.BufferedWriter(pipe)))
    with stop_on_signal(console) as got_signal:
        console.print("step 1")
        assert got_signal()
    assert pipe.seen.decode().splitlines() == [
        "step 1",
        "SIGTERM: saving after this step, then stopping (again: stop at once)",
    ]


def test_second_signal_ends_the_process():
    program = (
        "import os, signal\nfrom dist_ft.runtime.local import stop_on_signal\n"
        "from dist_ft.training.console import Console\nwith stop_on_signal(Console()):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    print('once', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    print('twice')\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == -signal.SIGTERM
    # the notice comes from a thread: before, after or within the line
    assert "once" in ran.stdout.replace("stop at once", "")
    assert "twice" not in ran.stdout


def test_signals_are_not_handled_outside_the_main_thread():
    seen = []

    def watch():
        with stop_on_signal(Console()) as got_signal:
            seen.append((got_signal(), signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


@pytest.mark.parametrize("own_context", [False, True])
def test_signal_during_a_run_saves_and_stops(base, own_context, capsys):
    """With context of the caller too: they are used in addition to the signals."""
    document = tiny.config(
        base, f"signal-{str(own_context).lower()}", schedule={"epochs": None, "steps": 5}
    )
    before = signal.getsignal(signal.SIGTERM)

    def at_second_step(text, real=Console.show_progress):
        real(console, text)
        if text.startswith("step 2/"):
            os.kill(os.getpid(), signal.SIGTERM)

    console = Console()
    console.show_progress = at_second_step
    context = RunContext(console=console) if own_context else None
    if context is None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Console,
                "show_progress",
                lambda self, text, real=Console.show_progress: (
                    real(self, text),
                    text.startswith("step 2/") and os.kill(os.getpid(), signal.SIGTERM),
                )[0],
            )
            with pytest.raises(Interrupted, match="stopped at step 3 of 5 as requested; saved as "):
                local.run(load_config(document))
    else:
        with pytest.raises(Interrupted, match="stopped at step 3 of 5 as requested; saved as "):
            local.run(load_config(document), context)
    assert "SIGTERM: saving after this step" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before


def test_stop_requested_by_the_caller_is_obeyed(base):
    document = tiny.config(base, "wish", schedule={"epochs": None, "steps": 5})
    with pytest.raises(Interrupted, match="stopped at step 1 of 5 as requested"):
        local.run(
            load_config(document),
            RunContext(console=Console(io.StringIO()), should_stop=lambda: True),
        )


GROUPED = """
import atexit, logging, sys
from dist_ft.runtime import local
atexit.register(lambda: print("taken down"))
print("done", end="")
if sys.argv[1] == "group":
    local.joined_process_group.set()
local.exit_process(3)
"""


@pytest.mark.parametrize(("which", "output"), [("group", "done"), ("alone", "donetaken down\n")])
def test_process_in_a_process_group_exits_at_once(which, output):
    """Threads of gloo that still hold tensors would abort it then."""
    ran = subprocess.run(
        [sys.executable, "-c", GROUPED, which], capture_output=True, text=True, timeout=60
    )
    assert (ran.returncode, ran.stdout) == (3, output), ran.stderr


def test_several_processes_without_an_address_are_refused(base, monkeypatch):
    """Each of them once became a world of one."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = load_config(tiny.config(base, "no-address", cluster={"workers": 2}))
    with pytest.raises(ConfigError, match="MASTER_ADDR: not set, although WORLD_SIZE=2"):
        local.run(config)
    assert "MASTER_ADDR" not in os.environ and not local.joined_process_group.is_set()
