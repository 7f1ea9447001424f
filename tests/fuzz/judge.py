"""Says what is wrong with how a case ended: everything but a result or one clear line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from fuzz.sandbox import CRASHED, GUARDED

MAX_SECONDS = 10.0
MAX_GROWTH_BYTES = 2**30
MAX_ERROR_CHARACTERS = 20_000
EXIT_CODES = (0, 1, 2, 3, 130, GUARDED)
VERDICTS = ("runs verify", "data verify", "jobs status")
"""Commands that end with 1 after a result on stdout."""
BUG = re.compile(r"(?i)this is a (bug|gap) in dist_ft|unexpected \w+(Error|Exception)\b.*traceback")
NATIVE = re.compile(
    r"panicked at|Fatal Python error|Exception ignored in|Exception in thread|core dumped"
    r"|terminate called|Segmentation fault"
)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
FRAME = re.compile(r'^\s+File "(?P<file>[^"]+)", line (?P<line>\d+),? in (?P<function>\S+)', re.M)


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Attributes:
        code: exit code; minus the signal that ended it.
        stdout: what it printed.
        stderr: what it printed as errors.
        seconds: from its start to its end.
        cpu_s: seconds of the processor.
        growth_bytes: memory it took in addition to that of the process it was forked from.
        timed_out: it was ended for its time.
        outside: paths outside the case's folder that it tried to write.
        problems: what `siblings` or a call found.
        guards: what it was kept from.
        log: the traceback that it saved for a bug report.
    """

    code: int
    stdout: str
    stderr: str
    seconds: float
    cpu_s: float
    growth_bytes: int
    timed_out: bool
    outside: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    guards: tuple[str, ...] = ()
    log: str = ""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        category: such as traceback; a smaller input must fail in the same one.
        detail: for people.
    """

    category: str
    detail: str


def problems(outcome: Outcome, command: str, may_write_outside: bool) -> list[Problem]:
    """Return what is wrong with an outcome; empty: nothing.

    Args:
        outcome: how the case ended.
        command: its first two words; "" for a call.
        may_write_outside: the input is the user's own, who may name any path.
    """
    found = [*_crashes(outcome), *_costs(outcome)]
    # A text is judged only if the process could write all of it.
    if not found and command and outcome.code != GUARDED:
        found += _message_problems(outcome, command)
    found += [Problem("disagreement", text) for text in outcome.problems]
    if outcome.outside and not may_write_outside:
        found.append(Problem("outside", f"writes {outcome.outside[0]}"))
    return found


def _crashes(outcome: Outcome) -> Iterator[Problem]:
    if outcome.timed_out:
        yield Problem("time", f"over {outcome.seconds:.1f} s{_place(outcome.stderr)}")
        return
    if outcome.code < 0:
        yield Problem("signal", f"ended by signal {-outcome.code}{_place(outcome.stderr)}")
    elif outcome.code == CRASHED or "Traceback (most recent call last)" in outcome.stderr:
        yield Problem("traceback", _last_line(outcome.stderr) + _place(outcome.stderr))
    elif outcome.code not in EXIT_CODES:
        yield Problem("exit code", str(outcome.code))

    text = outcome.stdout + outcome.stderr
    if match := BUG.search(text):
        yield Problem("bug line", _line_of(text, match.start()) + _place(outcome.log))
    if match := NATIVE.search(text):
        yield Problem("native", _line_of(text, match.start()))


def _costs(outcome: Outcome) -> Iterator[Problem]:
    if outcome.growth_bytes > MAX_GROWTH_BYTES:
        yield Problem("memory", f"took {outcome.growth_bytes / 2**20:,.0f} MiB")


def _message_problems(outcome: Outcome, command: str) -> Iterator[Problem]:
    lines = outcome.stderr.splitlines()
    own = [line for line in lines if line.startswith("dist-ft: ")]
    usage = [line for line in lines if line.startswith(("Error: ", "Usage: "))]

    if outcome.code and not own and not usage:
        has_verdict = command in VERDICTS and outcome.stdout.strip()
        is_help = "Usage: " in outcome.stdout
        if not has_verdict and not is_help:
            yield Problem("no line", f"exit code {outcome.code}: {outcome.stderr[-200:]!r}")
    if outcome.code == 0 and own:
        yield Problem("line of a success", own[0])
    if len(own) > 1 or (own and usage):
        yield Problem("several errors", " | ".join(line[:100] for line in [*own, *usage]))
    if len(outcome.stderr) > MAX_ERROR_CHARACTERS:
        yield Problem("long error", f"{len(outcome.stderr):,} characters: {outcome.stderr[:100]!r}")

    for text in (outcome.stdout, outcome.stderr):
        if match := CONTROL.search(text):
            yield Problem("control character", repr(_line_of(text, match.start()))[:200])


def _line_of(text: str, position: int) -> str:
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    return text[start : len(text) if end < 0 else end][:300]


def _last_line(text: str) -> str:
    lines = text.strip().splitlines() or [""]
    return lines[-1][:300]


def _place(text: str) -> str:
    """Return where in dist_ft a traceback or a stack points to."""
    frames = [match for match in FRAME.finditer(text) if "/dist_ft/" in match["file"]]
    if not frames:
        return ""

    # A traceback ends with the innermost call, a stack of faulthandler starts with it.
    frame = frames[-1] if "most recent call last" in text else frames[0]
    file = frame["file"].rpartition("/dist_ft/")[2]
    return f" at {file}:{frame['line']} in {frame['function']}"
