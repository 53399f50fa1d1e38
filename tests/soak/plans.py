"""What the soak runs, and what each run must come to.

A plan is the body of ``POST /genvm/run`` together with every byte that its executor writes. The
text that a run writes has a tag of its own, so that what strays into another run is seen.
"""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from ..integration.support import run_body

MIB = 1 << 20
STREAM_MAX = 4 * MIB
"""Bytes that the manager keeps of stdout and of stderr."""
RECORDS_MAX = 10_000
NOTICE = b"practice executor: this is not GenVM: it interprets practice scripts\n"
ENDLESS = 1 << 60
"""A size that nothing gets to."""

Status = Mapping[str, Any]


def info(message: str) -> dict[str, Any]:
    """Return a log record as executors write it."""
    return {"level": "info", "message": message}


def plain(line: str) -> dict[str, Any]:
    """Return the record that a log line comes to that is not JSON."""
    return {"level": "info", "message": "genvm log", "line": line}


@attrs.frozen
class Stream:
    """Bytes on stdout or stderr: a unit repeated up to a size, then an end."""

    unit: bytes = b"\n"
    size: int = 0
    end: bytes = b""

    def problem(self, name: str, got: str, cut: bool, whole: bool) -> str | None:
        """Tell what is wrong with what was captured; ``whole``: the process ended by itself."""
        if whole and self.size + len(self.end) <= STREAM_MAX:
            body = self.unit * (self.size // len(self.unit) + 1)
            wanted = (body[: self.size] + self.end).decode("utf-8", "replace")
            if got != wanted or cut:
                return f"{name}: {_difference(got, wanted)}, truncated {cut}"
            return None
        if whole and (not cut or len(got) != STREAM_MAX):
            return f"{name}: {len(got)} of {self.size} characters, truncated {cut}"
        if self._from_start(got) or (cut and self._from_anywhere(got)):
            return None
        return f"{name}: not written like that: {got[:80]!r}…{got[-80:]!r}, truncated {cut}"

    def _from_start(self, got: str) -> bool:
        body = self.unit * (min(len(got) * 4, self.size) // len(self.unit) + 1)
        wanted = (body[: self.size] + self.end).decode("utf-8", "replace")
        return wanted.startswith(got.rstrip("\ufffd"))

    def _from_anywhere(self, got: str) -> bool:
        unit = self.unit.decode("utf-8", "replace")
        got = got.removesuffix(self.end.decode("utf-8", "replace"))
        start = (unit * 2).find(got[: len(unit)])
        return start >= 0 and (unit * (len(got) // len(unit) + 2))[start:].startswith(got)


def _difference(got: str, wanted: str) -> str:
    at = next((i for i, pair in enumerate(zip(got, wanted, strict=False)) if len({*pair}) > 1), -1)
    if at < 0:
        return f"{len(got)} characters instead of {len(wanted)}"
    return f"at {at} {got[at : at + 60]!r} instead of {wanted[at : at + 60]!r}"


@attrs.frozen
class Records:
    """Records on the log pipe: one of them many times, then others."""

    record: dict[str, Any] = attrs.field(factory=dict)
    count: int = 0
    end: Sequence[dict[str, Any]] = ()

    def problem(self, got: Sequence[Any], cut: bool, whole: bool) -> str | None:
        """Tell what is wrong with what was captured."""
        total = self.count + len(self.end)
        if whole and total <= RECORDS_MAX:
            wanted = [self.record] * self.count + list(self.end)
            if list(got) == wanted and not cut:
                return None
            strange = next((pair for pair in zip(got, wanted, strict=False) if len(pair) > 2), "")
            return f"genvm_log: {len(got)} records instead of {total}, truncated {cut} {strange}"
        if whole and (not cut or len(got) != RECORDS_MAX):
            return f"genvm_log: {len(got)} of {total} records, truncated {cut}"
        # The last line may have been cut by the end of the process.
        bad = [r for r in got[:-1] if r != self.record and r not in self.end]
        return f"genvm_log: not a record of this run: {bad[0]!r:.200}" if bad else None


@attrs.frozen
class Plan:
    """A run, and what it must come to."""

    kind: str
    body: dict[str, Any]
    stdout: Stream = Stream()
    stderr: Stream = Stream()
    log: Records | None = Records()
    """What is on the log pipe; None where that is not known."""
    exit_code: int | None = 0
    signal: int | None = None
    endless: bool = False
    """Whether it goes on until it is ended."""
    on_term: tuple[int, Stream] | None = None
    """Its exit code and its stdout where it ends in an orderly way on SIGTERM."""
    leaves_writers: bool = False
    """Whether something goes on writing to its pipes when it has ended."""

    @property
    def captured(self) -> bool:
        """Whether its output comes back."""
        return bool(self.body["capture_output"])

    @property
    def weight(self) -> int:
        """How many permits it takes."""
        return 1 if self.body["is_sync"] else 2

    def problems(self, status: Status, causes: set[str]) -> list[str]:
        """Tell what is wrong with a result whose cause must be one of these."""
        cause, ended = status["cause"], (status["exit_code"], status["signal"])
        by_itself = cause == "exited"
        found = [] if cause in causes else [f"cause {cause}, expected one of {sorted(causes)}"]
        orderly = self.on_term is not None and ended == (self.on_term[0], None)
        if by_itself and ended != (self.exit_code, self.signal):
            found.append(f"ended with {ended} instead of {(self.exit_code, self.signal)}")
        elif not by_itself:
            usual: list[tuple[int | None, int | None]] = [(None, signal.SIGTERM)]
            usual.append((None, signal.SIGKILL))
            if not self.endless:
                usual.append((self.exit_code, self.signal))  # the signal met one that just ended
            if ended not in usual and not orderly:
                found.append(f"{cause}, but ended with {ended}")
        if not self.captured:
            outputs = [status[name] for name in ("stdout", "stderr", "genvm_log", "truncated")]
            return found + ([] if outputs == ["", "", [], []] else ["captured unasked"])
        # What was killed may have had more to say, and what it left behind may still say it.
        whole = by_itself and not self.leaves_writers
        out = self.on_term[1] if self.on_term is not None and orderly else self.stdout
        cut = set(status["truncated"])
        found += filter(
            None,
            (
                out.problem("stdout", status["stdout"], "stdout" in cut, whole or orderly),
                self.stderr.problem("stderr", status["stderr"], "stderr" in cut, whole),
                None
                if self.log is None
                else self.log.problem(status["genvm_log"], "genvm_log" in cut, whole),
            ),
        )
        return found


# --- making plans ---


def shell_body(rng: random.Random, command: str) -> dict[str, Any]:
    """Return the body of a run of a shell command, in one of the four forms."""
    return run_body(
        major=1,
        host_data=command,
        is_sync=rng.random() < 0.7,
        capture_output=rng.random() < 0.75,
    )


def practice_body(rng: random.Random, *steps: str, **changes: Any) -> dict[str, Any]:
    """Return the body of a run of the practice executor."""
    data = {"node_address": "0x", "tx_id": "0x", "practice": "\n".join(steps)}
    return run_body(
        host_data=json.dumps(data),
        is_sync=rng.random() < 0.7,
        capture_output=rng.random() < 0.8,
        **changes,
    )


def _record(tag: str) -> str:
    return json.dumps(info(tag))


def quick(rng: random.Random, tag: str) -> Plan:
    """Say a little on every pipe, without a newline at the end, and exit."""
    code = rng.choice((0, 0, 0, 1, 2, 101, 255))
    pause = rng.choice((0, 0, 0, 0.1, 0.5))
    command = (
        f"printf '{tag} out'; printf '{tag} err' >&2; printf '%s' '{_record(tag)}' >&3; "
        f"sleep {pause}; exit {code}"
    )
    return Plan(
        "quick",
        shell_body(rng, command),
        Stream(end=f"{tag} out".encode()),
        Stream(end=f"{tag} err".encode()),
        Records(end=[info(tag)]),
        exit_code=code,
    )


def long(rng: random.Random, tag: str) -> Plan:
    """Speak now and then for some seconds."""
    turns = rng.randint(2, 8)
    pause = rng.choice((0.1, 0.3, 0.6))
    command = (
        f"for i in {' '.join('x' * turns)}; do echo '{tag} out'; echo '{tag} err' >&2; "
        f"echo '{_record(tag)}' >&3; sleep {pause}; done"
    )
    out, err = f"{tag} out\n".encode(), f"{tag} err\n".encode()
    return Plan(
        "long",
        shell_body(rng, command),
        Stream(out, turns * len(out)),
        Stream(err, turns * len(err)),
        Records(info(tag), turns),
    )


def large(rng: random.Random, tag: str) -> Plan:
    """Write megabytes as fast as it can, then exit."""
    sizes = [rng.choice((10_000, 300_000, 2 * MIB, STREAM_MAX, 5 * MIB + 7)) for _ in range(2)]
    count = rng.choice((0, 50, 3000, RECORDS_MAX, 12_000))
    body = shell_body(rng, "")
    if not body["capture_output"]:
        count = min(count, 3000)  # each goes to the manager's log
    command = f"yes '{tag} out' | head -c {sizes[0]}; yes '{tag} err' | head -c {sizes[1]} >&2; "
    command += f"yes '{_record(tag)}' | head -n {count} >&3; exit 7"
    return Plan(
        "large",
        {**body, "host_data": command},
        Stream(f"{tag} out\n".encode(), sizes[0]),
        Stream(f"{tag} err\n".encode(), sizes[1]),
        Records(info(tag), count),
        exit_code=7,
    )


def odd_bytes(rng: random.Random, tag: str) -> Plan:
    """Write what is not UTF-8, and log lines that are no JSON, one of them of megabytes."""
    data = tag.encode() + rng.randbytes(rng.randint(1, 400)) + "é€😀".encode()[: rng.randint(1, 9)]
    body = shell_body(rng, "")
    size = rng.choice((10, 70_000, 2 * MIB if body["capture_output"] else 10))
    octal = "".join(f"\\{byte:03o}" for byte in data)
    command = f"printf '{octal}'; printf '{tag}\\n{tag}' >&3; "
    command += f"head -c {size} /dev/zero | tr '\\0' x >&3; exit 0"
    return Plan(
        "odd bytes",
        {**body, "host_data": command},
        Stream(end=data),
        log=Records(end=[plain(tag), plain(tag + "x" * size)]),
    )


def deadly(rng: random.Random, tag: str) -> Plan:
    """Die of a signal that nobody sent."""
    number = rng.choice((signal.SIGKILL, signal.SIGABRT, signal.SIGUSR1, signal.SIGTERM))
    command = f"ulimit -c 0; printf '{tag}'; kill -{int(number)} $$; sleep 60"
    return Plan(
        "deadly",
        shell_body(rng, command),
        Stream(end=tag.encode()),
        exit_code=None,
        signal=int(number),
    )


def holder(rng: random.Random, tag: str) -> Plan:
    """Leave a process that holds the pipes and says nothing, and exit."""
    away = rng.choice(("", "setsid "))
    command = f"{away}sleep {rng.choice((0.3, 40))} & printf '{tag}'; printf '{tag}' >&3; exit 5"
    return Plan(
        "holder",
        shell_body(rng, command),
        Stream(end=tag.encode()),
        log=Records(end=[plain(tag)]),
        exit_code=5,
    )


def writer(rng: random.Random, tag: str) -> Plan:
    """Leave a process that goes on writing, and exit."""
    command = f"yes '{tag}' & sleep {rng.choice((0, 0.2))}; exit 6"
    unit = f"{tag}\n".encode()
    body = shell_body(rng, command)
    return Plan("writer", body, Stream(unit, ENDLESS), exit_code=6, leaves_writers=True)


def helper(rng: random.Random, tag: str) -> Plan:
    """Wait for a helper that is no child of ours any more; it must not be killed meanwhile."""
    pause = rng.choice((0.3, 1, 2))
    command = (
        f"mkfifo $SOAK_FOLDER/{tag}; ( (sleep {pause}; printf '{tag}' >$SOAK_FOLDER/{tag}) & ); "
        f"cat $SOAK_FOLDER/{tag}; rm $SOAK_FOLDER/{tag}"
    )
    body = {**shell_body(rng, command), "max_execution_minutes": 0.25}
    return Plan("helper", body, Stream(end=tag.encode()))


def flood(rng: random.Random, tag: str) -> Plan:
    """Write on some pipes at full speed until it is ended."""
    streams = {"out": Stream(), "err": Stream()}
    parts, log = [], Records()
    body = shell_body(rng, "")
    targets = rng.sample(("out", "err", "log"), rng.randint(1, 3))
    for name in targets:
        if name == "log":
            # What is not captured goes to the manager's log unless its level is below.
            record = {"level": "info" if body["capture_output"] else "trace", "message": tag}
            log = Records(record, ENDLESS)
            parts.append(f"yes '{json.dumps(record)}' >&3")
        else:
            text = f"{tag} {name} " + "." * rng.choice((0, 100, 30_000))
            streams[name] = Stream(f"{text}\n".encode(), ENDLESS)
            parts.append(f"yes '{text}' >&{1 if name == 'out' else 2}")
    command = " & ".join([*parts[:-1], f"exec {parts[-1]}"])
    return Plan(
        "flood",
        {**body, "host_data": command},
        streams["out"],
        streams["err"],
        log,
        endless=True,
    )


def polite(rng: random.Random, tag: str) -> Plan:
    """Wait until it is asked to end, and say good-bye."""
    command = f"trap 'printf bye; exit 3' TERM; printf '{tag}'; sleep 60 & wait"
    bye = (3, Stream(end=f"{tag}bye".encode()))
    body = shell_body(rng, command)
    return Plan("polite", body, Stream(end=tag.encode()), endless=True, on_term=bye)


def stubborn(rng: random.Random, tag: str) -> Plan:
    """Ignore SIGTERM."""
    command = f"trap '' TERM; printf '{tag}'; exec sleep 60"
    return Plan("stubborn", shell_body(rng, command), Stream(end=tag.encode()), endless=True)


def practice(rng: random.Random, tag: str) -> Plan:
    """Let the practice executor write on every pipe, and exit or die."""
    out, err, log = (rng.choice((0, 100, 50_000)) // 100 * 100 for _ in range(3))
    steps = [f"print {tag}", f"print-err {tag}", f"log info {tag}"]
    steps += [f"spam stdout {out}", f"spam stderr {err}", f"log-big {log}"]
    steps += [f"sleep {rng.choice((0, 0.2, 1))}"]
    steps += rng.choice(([], ["grandchild-session 30"]))
    leaves = len(steps) > 7
    last = rng.choice(("exit 0", "exit 9", "die KILL"))
    line = f"{tag}\n".encode()
    spam = b"." * 99 + b"\n"
    by_target = {"target": "practice"}
    records = [{**info(text), **by_target} for text in (tag, "x" * log, *["grandchild"] * leaves)]
    died = last.startswith("die")
    body = practice_body(rng, *steps, last)
    if leaves:
        body["capture_output"] = False  # its log has a pid that is not known here
    return Plan(
        "practice",
        body,
        Stream(end=line + spam * (out // 100)),
        Stream(end=NOTICE + line + spam * (err // 100)),
        Records(end=records),
        exit_code=None if died else int(last.split()[1]),
        signal=signal.SIGKILL if died else None,
    )


def practice_waits(rng: random.Random, tag: str) -> Plan:
    """Let the practice executor wait until it is cancelled."""
    ignores = rng.random() < 0.3
    steps = [*(["ignore-sigterm"] if ignores else []), f"print {tag}", "sleep 60"]
    line = Stream(end=f"{tag}\n".encode())
    body = practice_body(rng, *steps)
    # Its log tells that it cannot tell its host, in words that are not known here.
    return Plan(
        "practice that waits",
        {**body, "capture_output": False},
        line,
        endless=True,
        on_term=None if ignores else (0, line),
    )


Maker = Callable[[random.Random, str], Plan]

ENDING: dict[Maker, int] = {
    **{quick: 30, long: 12, large: 10, odd_bytes: 6, deadly: 6, holder: 5, writer: 3},
    **{helper: 5, practice: 8},
}
"""How often which run that ends by itself."""
ENDED: dict[Maker, int] = {
    **{quick: 3, long: 6, large: 4, flood: 6, polite: 4, stubborn: 4, practice_waits: 3, helper: 1}
}
"""How often which run that somebody ends."""


def choose(rng: random.Random, makers: Mapping[Maker, int], tag: str) -> Plan:
    """Return a plan by weight."""
    (maker,) = rng.choices(list(makers), list(makers.values()))
    return maker(rng, tag)
