"""What driver and workers tell each other, without Ray."""

from __future__ import annotations

import subprocess
import sys

from dist_ft.errors import DataError
from dist_ft.runtime.relay import Relay
from dist_ft.train.result import Result


def test_the_relay_hands_lines_one_way_and_the_wish_to_stop_the_other():
    relay = Relay()
    relay.put("say", "a")
    relay.put("progress", "b")
    assert relay.take() == [("say", "a"), ("progress", "b")] and relay.take() == []
    assert not relay.stopping()
    relay.stop()
    assert relay.stopping()
    assert relay.outcome() is None
    first = Result("runs/r", 3, 3)
    relay.end(first)
    relay.end(DataError("later"))
    assert relay.outcome() is first


def test_the_relay_and_the_driver_start_without_torch():
    program = ("import sys, dist_ft.runtime.relay, dist_ft.runtime.ray_train\n"
               "print([name for name in ('torch', 'transformers', 'deepspeed', 'ray') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
