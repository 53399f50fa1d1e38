"""Requests to start an execution that must be refused, each with its reason and without a trace."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from genvm_manager import encode_calldata

from .conftest import IDLE, Start
from .support import (
    VERSION,
    Daemon,
    Reply,
    Root,
    in_other_threads,
    memory_of,
    message,
    report,
    run_body,
    watched,
)

MISSING = object()
TOO_LONG = 131_072


def changed(**changes: Any) -> bytes:
    """Return a body with changes to a good one; ``MISSING`` leaves a key out."""
    body = {**run_body("exit 0"), **changes}
    return json.dumps({key: v for key, v in body.items() if v is not MISSING}).encode()


def nested(**changes: str) -> bytes:
    """Return a body in which values are replaced by JSON texts."""
    marks = {key: f"@@{key}@@" for key in changes}
    text = changed(**marks).decode()
    for key, mark in marks.items():
        text = text.replace(json.dumps(mark), changes[key])
    return text.encode()


def refused(daemon: Daemon, body: bytes | None, code: str, *parts: str, status: int = 500) -> Reply:
    """Post a run that must be refused, and show that nothing changed."""
    before = daemon.get("/status")["executions"]
    reply = daemon.request("POST", "/genvm/run", body)
    assert (reply.status, reply.json["code"]) == (status, code), reply.raw[:1000]
    for part in parts:
        assert part in reply.json["error"], reply.json["error"]
    assert reply.json["retryable"] is False
    assert len(reply.raw) < 5000, "an error does not echo a large request"
    assert b"Traceback" not in reply.raw
    assert daemon.permits() == IDLE
    assert daemon.get("/status")["executions"] == before
    assert daemon.descendants() == []
    return reply


REQUIRED = [
    *("major", "message", "is_sync", "capture_output", "host_data", "timestamp", "host"),
]


@pytest.mark.parametrize("key", REQUIRED)
def test_missing(daemon: Daemon, key: str) -> None:
    refused(daemon, changed(**{key: MISSING}), "invalid_request", f"{key}: required")


def test_everything_missing(daemon: Daemon) -> None:
    refused(daemon, b"{}", "invalid_request", *(f"{key}: required" for key in REQUIRED))


WRONG_TYPES: dict[str, list[Any]] = {
    "major": ["0", 0.0, 1.5, True, None, [], {}, -1, -(10**30), 10**30],
    "message": ["{}", 1, None, [], True],
    "is_sync": ["yes", "true", 1, 0, None, [], {}],
    "capture_output": ["yes", "false", 1, 0, None],
    "max_execution_minutes": [0, -1, 0.0, -0.5, 10**400, "10", True, None, [1], {}],
    "host_data": [{}, None, 1, ["x"], False],
    "timestamp": [None, 1735689600, 1735689600.5, True, ["2025-01-01T00:00:00Z"], {}],
    "host": [None, 1, ["h:1"], {"path": "x"}, True],
    "extra_args": ["--debug", {}, None, 1, [1], ["a", None], [["a"]], [True], ["a", {"b": 1}]],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG_TYPES.items() for value in values]
)
def test_ill_typed(daemon: Daemon, key: str, value: object) -> None:
    # A major that does not exist is well-typed, and no version fits it.
    code = "version_not_available" if (key, value) == ("major", 10**30) else "invalid_request"
    refused(daemon, changed(**{key: value}), code, key)


@pytest.mark.parametrize(
    ("extra_args", "path"), [([1], "extra_args[0]"), (["a", "b", None], "extra_args[2]")]
)
def test_the_place_in_an_array_is_named(
    daemon: Daemon, extra_args: list[object], path: str
) -> None:
    refused(daemon, changed(extra_args=extra_args), "invalid_request", f"{path}: expected a string")


OWN_OPTIONS = ["--log-fd", "--host", "--host-data", "--message", "--cookie"]


@pytest.mark.parametrize("option", OWN_OPTIONS)
def test_an_option_of_the_manager_is_no_extra_argument(daemon: Daemon, option: str) -> None:
    """Neither as two words nor as one; an executor would take the last, or refuse both."""
    for words in ([option, "x"], [f"{option}=x"], ["--debug-mode", f"{option}="]):
        reply = refused(daemon, changed(extra_args=words), "invalid_request")
        place = f"extra_args[{len(words) - 1 if '=' in words[-1] else 0}]"
        assert (
            reply.json["error"] == f"{place}: {option} is set by the manager itself; leave it out"
        )


def test_what_ends_the_options_is_no_extra_argument(daemon: Daemon) -> None:
    refused(daemon, changed(extra_args=["--"]), "invalid_request", "extra_args[0]: --")


def test_the_wrong_value_is_shown(daemon: Daemon) -> None:
    reply = refused(daemon, changed(is_sync="yes"), "invalid_request")
    assert reply.json["error"] == 'is_sync: expected true or false, got "yes"'


def test_everything_wrong_is_named(daemon: Daemon) -> None:
    body = changed(major="0", is_sync=1, host=MISSING)
    refused(daemon, body, "invalid_request", "major: ", "is_sync: ", "host: ")


def test_many_arguments_delay_nobody(daemon: Daemon) -> None:
    """It is a thread that looks at a large request."""
    body = changed(extra_args=["x" * 100] * 480_000)

    def ask() -> Reply:
        return refused(daemon, body, "invalid_request", "extra_args: 480000 arguments")

    in_other_threads(daemon, "480000 arguments", ask)
    watched(daemon, "480000 arguments", ask)


@pytest.mark.parametrize(
    "timestamp",
    [
        *("", "now", "2025-01-01", "2025-01-01T00:00:00", "2025-01-01T00:00Z", "20250101T000000Z"),
        *("2025-13-01T00:00:00Z", "2025-02-30T00:00:00Z", "2025-01-01T24:00:00Z"),
        *("2025-01-01T00:60:00Z", "2025-01-01T00:00:61Z", "2025-01-01T00:00:00+24:00"),
        *("2025-01-01T00:00:00+0000", "2025-01-01T00:00:00.Z", " 2025-01-01T00:00:00Z"),
        *("2025-01-01T00:00:00Z\n", "0000-01-01T00:00:00Z", "٢٠٢٥-01-01T00:00:00Z"),
        *("9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", "2025-01-01T00:00:00Z" * 999),
    ],
)
def test_bad_timestamps(daemon: Daemon, timestamp: str) -> None:
    refused(daemon, changed(timestamp=timestamp), "invalid_request", "timestamp: ")


@pytest.mark.parametrize(
    "timestamp",
    ["2025-06-01t00:00:00z", "2025-06-01T00:00:00.123456789Z", "2025-06-01T05:30:00+05:30"],
)
def test_good_timestamps(daemon: Daemon, timestamp: str) -> None:
    assert daemon.result(daemon.run("exit 0", timestamp=timestamp))["exit_code"] == 0


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"host_data": "a\0b"}, "host_data: "),
        ({"host": "h\0:1"}, "host: "),
        ({"extra_args": ["x", "\0"]}, "extra_args[1]: "),
        ({"host_data": "\ud800"}, "surrogate pair"),
        ({"host": "\udfff:1"}, "surrogate pair"),
        ({"extra_args": ["\ud83d"]}, "surrogate pair"),
        ({"host_data": "x" * TOO_LONG}, "host_data: "),
        ({"host": "é" * (TOO_LONG // 2)}, "host: "),
        ({"extra_args": ["ok", "x" * TOO_LONG]}, "extra_args[1]: "),
        ({"message": {**message(), "x": "x" * TOO_LONG}}, "message: "),
    ],
)
def test_what_cannot_be_an_argument(daemon: Daemon, changes: dict[str, Any], path: str) -> None:
    reply = refused(daemon, changed(**changes), "invalid_request", path)
    if any(len(str(value)) > TOO_LONG for value in changes.values()):
        assert "131071" in reply.json["error"]


def test_an_argument_of_the_largest_size(root: Root, start: Start) -> None:
    root.script('for word; do echo "${#word}"; done')
    daemon = start()
    status = daemon.result(daemon.run(host_data="x" * (TOO_LONG - 1)))
    assert str(TOO_LONG - 1) in status["stdout"].split()


@pytest.mark.parametrize("count", [40, 4096])
def test_more_arguments_than_the_kernel_takes(daemon: Daemon, count: int) -> None:
    body = changed(extra_args=["x" * min(130_000, 5_000_000 // count)] * count)
    refused(daemon, body, "spawn_failed", VERSION, "extra_args")


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        (None, ["body: ", "nothing"]),
        (b"", ["body: ", "nothing"]),
        (b"   ", ["body: ", "nothing"]),
        (b"[]", ["body: ", "object"]),
        (b"null", ["body: ", "object"]),
        (b'"text"', ["body: ", "object"]),
        (b"12", ["body: ", "object"]),
        (b"nonsense", ["body: ", "JSON"]),
        (b"{", ["body: ", "JSON"]),
        (b'{"major": 0', ["body: ", "JSON"]),
        (b'{"major": }', ["body: ", "JSON"]),
        (b"{'major': 0}", ["body: ", "JSON"]),
        (b'{"major": 0,}', ["body: ", "JSON"]),
        (b'{"a": 1} {"b": 2}', ["body: ", "JSON"]),
        (b'{"a": 01}', ["body: ", "JSON"]),
        (b'{"a": "\n"}', ["body: ", "JSON"]),
        (b'{"a": "\xff"}', ["body: ", "UTF-8"]),
        (b"\xff\xfe{\0}\0", ["body: ", "UTF-8"]),
        (b"\xef\xbb\xbf{}", ["body: "]),
        (nested(major="NaN"), ["body: ", "JSON"]),
        (nested(max_execution_minutes="Infinity"), ["body: ", "JSON"]),
        (nested(max_execution_minutes="-Infinity"), ["body: ", "JSON"]),
        (nested(message='{"a": NaN}'), ["body: ", "JSON"]),
        (nested(max_execution_minutes="1e999"), ["max_execution_minutes: "]),
        (nested(major="1" * 100_000), ["expected a number"]),
        (b"[" * 100_000, ["body: "]),
        (b'{"a": ' + b"[" * 100_000, ["body: ", "deep"]),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ["body: ", "deep"]),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, ["body: ", "deep"]),
        (nested(message='{"a":' * 50_000 + "1" + "}" * 50_000), ["body: ", "deep"]),
        (b'{"k": "' + b"x" * 3_000_000, ["body: ", "JSON"]),
        (encode_calldata({"major": 0, "message": b""}), ["body: this is calldata", "send JSON"]),
        (b"null and void", ["body: not JSON"]),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_json(daemon: Daemon, body: bytes | None, parts: list[str]) -> None:
    refused(daemon, body, "invalid_request", *parts)


def test_content_type_does_not_matter(daemon: Daemon) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"):
        reply = daemon.request("POST", "/genvm/run", changed(), {"Content-Type": kind})
        assert reply.status == 200, reply.raw
        daemon.result(reply.json["id"])


def test_unknown_keys_are_ignored(daemon: Daemon) -> None:
    genvm_id = daemon.run("exit 0", permits=7, code="x", is_syncs={"deep": [1]})
    assert daemon.result(genvm_id)["exit_code"] == 0


def test_optional_keys(daemon: Daemon) -> None:
    body = changed(max_execution_minutes=MISSING, extra_args=MISSING)
    genvm_id = daemon.request("POST", "/genvm/run", body).json["id"]
    entry = daemon.get("/status")["executions"][str(genvm_id)]
    daemon.result(genvm_id)
    begin, end = (datetime.fromisoformat(entry[key]) for key in ("started_at", "strict_deadline"))
    assert end - begin == timedelta(minutes=20)


@pytest.mark.parametrize("minutes", [1, 0.001, 1440, 1440.0, 1e-3])
def test_good_minutes(daemon: Daemon, minutes: float) -> None:
    daemon.result(daemon.run("exit 0", max_execution_minutes=minutes))


# --- executors that cannot be started ---


def make_folder(path: Path) -> None:
    """Put a folder in the place of a file."""
    path.unlink()
    path.mkdir()


def install_broken_executors(root: Root) -> dict[int, tuple[str, str]]:
    """Install executors that cannot be started; returns the reason for each major."""
    spoils: list[tuple[Callable[[Path], object], str]] = [
        (lambda path: path.unlink(), "not found"),
        (lambda path: shutil.rmtree(path.parent.parent), "not found"),
        (lambda path: path.chmod(0o644), "not executable"),
        (make_folder, "not executable"),
        (lambda path: path.write_text("no program"), "not an executable"),
        (lambda path: path.write_bytes(b""), "not an executable"),
        (lambda path: path.write_bytes(b"\x7fELF"), "not an executable"),
        (lambda path: path.write_text("#!/nonexistent/sh\n"), "not found"),
    ]
    reasons = {}
    versions = {}
    for number, (spoil, reason) in enumerate(spoils, 1):
        version = f"v{number}.0.0"
        spoil(root.script("exit 0", version))
        versions[version] = "2025-01-01T00:00:00Z"
        reasons[number] = (version, reason)
    root.write_manifest(versions)
    return reasons


def test_executors_that_cannot_be_started(root: Root, start: Start) -> None:
    """An error with version and reason, the permits back at once, and no internal path."""
    reasons = install_broken_executors(root)
    daemon = start("--permits", "8")
    problems = []
    for major, (version, reason) in reasons.items():
        for is_sync in (True, False):
            reply = refused(daemon, changed(major=major, is_sync=is_sync), "spawn_failed", version)
            assert str(root.path) not in reply.json["error"]
            if reason not in reply.json["error"]:
                problems.append((reason, reply.json["error"]))
    assert problems == []


def test_a_failed_start_lets_the_next_one_run(root: Root, start: Start) -> None:
    """Permits are back at once: whoever waits behind a run that cannot start is admitted."""
    root.script("exit 0", "v1.0.0").chmod(0o644)
    root.write_manifest({VERSION: "2025-01-01T00:00:00Z", "v1.0.0": "2025-01-01T00:00:00Z"})
    daemon = start("--permits", "0")
    broken = [daemon.send("POST", "/genvm/run", changed(major=1)) for _ in range(20)]
    daemon.waiting(20)
    good = daemon.send("POST", "/genvm/run", changed())
    daemon.waiting(21)
    daemon.post("/permits", {"permits": 1})
    assert {one.reply().json["code"] for one in broken} == {"spawn_failed"}
    genvm_id = good.reply().json["id"]
    assert list(daemon.get("/status")["executions"]) == [str(genvm_id)]
    assert daemon.result(genvm_id)["exit_code"] == 0


def test_a_major_that_does_not_exist(daemon: Daemon) -> None:
    refused(daemon, changed(major=3), "version_not_available", "major 3", "2025-06-01", VERSION)


def test_a_time_before_every_version(daemon: Daemon) -> None:
    body = changed(timestamp="2024-12-31T23:59:59Z")
    refused(daemon, body, "version_not_available", "major 0", "2024-12-31T23:59:59", VERSION)


def test_bad_requests_leave_no_memory_behind(daemon: Daemon) -> None:
    """Nothing of what was refused is kept: not the body, not what was read of it."""
    bodies = [
        b'{"k": "' + b"x" * 3_000_000,
        nested(message='{"a":' * 50_000 + "1" + "}" * 50_000),
        changed(host_data="x" * 3_000_000),
        changed(is_sync="x" * 3_000_000),
    ]

    def send_all(times: int) -> int:
        for _ in range(times):
            for body in bodies:
                assert daemon.request("POST", "/genvm/run", body).status == 500
        return memory_of(daemon.pid, "VmRSS")

    before = send_all(5)
    grown = send_all(20) - before
    sent = 20 * sum(map(len, bodies))
    report(f"{sent >> 20} MiB of bad requests: the manager grows by {grown / (1 << 20):.1f} MiB")
    assert grown < sent / 2
