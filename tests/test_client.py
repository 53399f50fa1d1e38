"""What client commands show: text for people, and nothing of others that steers a terminal."""

from __future__ import annotations

import argparse
import contextlib
import os
import pty
import select
import shutil
from collections.abc import AsyncIterator, Awaitable, Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from genvm_manager import (
    CLIENT_COMMANDS,
    Cause,
    ClientProblem,
    ConfigError,
    Ending,
    EventLines,
    ExecutionOutcome,
    ListedExecution,
    ManagerStatus,
    Place,
    RemoteManager,
    Screen,
    State,
    duration_text,
    ending_of,
    executions_text,
    line_text,
    main,
    outcome_text,
    status_text,
)

from .support import PATIENCE, async_test, real_reactor, soon

STDOUT, STDERR = 1, 2
NOW = datetime(2025, 6, 1, 12, 0, 30, tzinfo=UTC)


def ended(cause: Cause = Cause.EXITED, **changes: int | None) -> ExecutionOutcome:
    base = ExecutionOutcome(
        finished_at=0,
        exit_code=0,
        signal=None,
        cause=cause,
        started_at=None,
        version="v0.1.0",
        truncated=[],
    )
    return msgspec.structs.replace(base, **changes)


# --- where a manager listens ---


@pytest.mark.parametrize(
    ("text", "base", "socket"),
    [
        ("http://127.0.0.1:3999", "http://127.0.0.1:3999", None),
        ("https://node.example/", "https://node.example", None),
        ("node:3999", "http://node:3999", None),
        ("http://[::1]:3999", "http://[::1]:3999", None),
        ("unix:///run/genvm.sock", "http://localhost", "/run/genvm.sock"),
    ],
)
def test_places(text: str, base: str, socket: str | None) -> None:
    assert Place.parse(text) == Place(text, base, socket)


@pytest.mark.parametrize(
    "text",
    [
        *("", "http://", "ftp://node", "http://node/path", "http://me:secret@node", "http://n?q"),
        *("http://node:99999", "http://node:x", "http://node:0", "unix://relative", "unix://"),
    ],
)
def test_what_is_no_place(text: str) -> None:
    with pytest.raises(ConfigError, match="expected http://host:port or unix:///path"):
        Place.parse(text)


# --- the command line ---


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("run /nonexistent", "/nonexistent: No such file or directory"),
        ("stop one", "argument ID: invalid int value: 'one'"),
        ("wait 1 --timeout soon", "expected seconds or a duration"),
        ("module status wasm", "invalid choice: 'wasm'"),
        ("module start llm --config /nonexistent", "/nonexistent: No such file or directory"),
        ("log-level loud", "expected trace, debug, info, warn or error"),
        ("status --server ftp://x", "expected http://host:port or unix:///path"),
        ("status --token-file /nonexistent", "/nonexistent cannot be read"),
    ],
)
def test_wrong_arguments(words: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == Ending.USAGE
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("name", CLIENT_COMMANDS)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == Ending.DONE
    assert "--server URL" in text
    assert [f"  {status.value:>3}  {status.meaning}" in text for status in Ending] == [True] * 10


# --- text ---


def test_durations() -> None:
    assert [*map(duration_text, (-1, 0.4, 185, 90000))] == [
        *("0:00:00", "0:00:00", "0:03:05", "1 day, 1:00:00")
    ]


@pytest.mark.parametrize(
    ("outcome", "text", "ending"),
    [
        (ended(), "exit code 0", Ending.DONE),
        (ended(exit_code=3), "exit code 3", Ending.FAILED),
        (ended(exit_code=None, signal=9), "signal 9", Ending.FAILED),
        (ended(Cause.DEADLINE, exit_code=None, signal=15), "deadline", Ending.ENDED),
        (ended(Cause.CANCELLED), "cancelled", Ending.ENDED),
        (ended(Cause.SHUTDOWN), "shutdown", Ending.ENDED),
    ],
)
def test_how_an_execution_ended(outcome: ExecutionOutcome, text: str, ending: Ending) -> None:
    assert (outcome_text(outcome), ending_of(outcome)) == (text, ending)


def test_a_list_of_executions() -> None:
    waiting = ListedExecution(
        id=100,
        state=State.WAITING,
        version="v0.1.0",
        is_sync=False,
        started_at=None,
        strict_deadline=None,
        has_result=False,
        result=None,
    )
    begin, end = "2025-06-01T12:00:00.000Z", "2025-06-01T12:02:00.000Z"
    running = msgspec.structs.replace(
        waiting,
        id=3,
        state=State.RUNNING,
        is_sync=True,
        started_at=begin,
        strict_deadline=end,
    )
    over = msgspec.structs.replace(running, id=2, state=State.FINISHED, result=ended(exit_code=1))
    assert executions_text([waiting, running, over], NOW).split("\n") == [
        "ID   STATE     VERSION  PERMITS  PROGRESS",
        "100  waiting   v0.1.0   2        waits for permits",
        "3    running   v0.1.0   1        for 0:00:30, deadline in 0:01:30",
        "2    finished  v0.1.0   1        exit code 1",
    ]


def test_the_status_of_a_manager() -> None:
    module: dict[str, object] = {
        "state": "failed",
        "pid": None,
        "generation": 2,
        "address": "127.0.0.1:3031",
        "restarts": 5,
        "since": None,
        "last_error": "it broke\n\x1b[2J",
        "waits_for": None,
        "draining": 0,
        "stats": {},
    }
    status = msgspec.convert(
        {
            "llm_module": "failed",
            "web_module": "failed",
            "permits": {"max": 4, "current": 1, "in_use": 3, "waiting": 2},
            "queue": {"length": 2, "oldest_wait_ms": 61000},
            "modules": {"llm": module},
            "manifest": {"versions": 0, "problem": "line 2: not YAML"},
            "version": "0.1.0",
            "boot_id": "0",
            "instance": 0,
            "uptime_s": 3661.0,
            "draining": True,
            "unread": 1,
            "executions": {},
        },
        ManagerStatus,
    )
    assert status_text(status).split("\n") == [
        "manager     0.1.0, up for 1:01:01",
        "accepts     nothing new: it is draining",
        "permits     3 of 4 in use, 2 waiting, the first for 0:01:01",
        "executions  none",
        "results     1 unread",
        r"llm module  failed; at 127.0.0.1:3031; last error: it broke\n\x1b[2J; restarted 5 times",
        "manifest    line 2: not YAML",
    ]


def test_an_event_is_one_line() -> None:
    text = line_text("now finished", {"cause": "exited", "what": "a\nb\u202e"})
    assert text == r'now finished cause="exited" what="a\nb\u202e"'


def test_events_of_lines() -> None:
    found = []
    lines = EventLines(lambda kind, data: found.append((kind, data, lines.last_id)))
    for line in (b": comment", b"id: boot-7", b"event: drain", b'data: {"a": "b: c"}', b""):
        lines.take(line, False)
    for line in (b":", b"event: stdout", b'data: {"text": ""}', b""):
        lines.take(line, False)
    assert found == [("drain", {"a": "b: c"}, "boot-7"), ("stdout", {"text": ""}, "boot-7")]


# --- a terminal, and something else ---

STEERING = "\x1b]0;title\x07\x9b2J\r\u202ered\u2066"
ESCAPED = r"\x1b]0;title\x07\x9b2J\r\u202ered\u2066"


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal."""
    ends = pty.openpty()
    yield ends
    for fd in ends:
        os.close(fd)


def shown(fd: int, text: bytes) -> None:
    """Check what a terminal is told next; it may come in pieces."""
    found = b""
    while len(found) < len(text):
        assert select.select([fd], [], [], PATIENCE)[0], found
        found += os.read(fd, len(text) - len(found))
    assert found == text


def test_text_of_others_does_not_steer_a_terminal() -> None:
    with terminal() as (ours, theirs):
        Screen(Clock(), str, {STDOUT: theirs, STDERR: theirs}).write(f"{STEERING}\tä\n", STDERR)
        shown(ours, f"{ESCAPED}\tä\r\n".encode())


def test_what_is_no_terminal_gets_text_as_it_is() -> None:
    read_end, write_end = os.pipe()
    screen = Screen(Clock(), str, {STDOUT: write_end, STDERR: write_end})
    screen.write(STEERING)
    assert not screen.is_watched
    os.close(write_end)
    with open(read_end, encoding="utf-8", newline="") as file:
        assert file.read() == STEERING


def test_progress_is_shown_once_a_second_and_removed() -> None:
    clock = Clock()
    with terminal() as (ours, theirs):
        screen = Screen(clock, "run: {}".format, {STDOUT: theirs, STDERR: theirs})
        screen.watch()
        clock.advance(1)
        shown(ours, b"\r\x1b[Krun: 0:00:01")
        screen.write("out\n")
        shown(ours, b"\r\x1b[Kout\r\n")
        screen.write("half a line")
        clock.advance(1)
        screen.write(" and the rest\n")
        shown(ours, b"half a line and the rest\r\n")  # nothing was overwritten
        screen.describe = lambda _: "x" * 1000
        clock.advance(1)
        screen.write("end\n")
        room = shutil.get_terminal_size().columns - 1
        shown(ours, b"\r\x1b[K" + b"x" * room + b"\r\x1b[Kend\r\n")


# --- a manager that hangs ---


class OwnTime(Clock):
    """The reactor with its sockets, but with the time of a test."""

    def __getattr__(self, name: str) -> Any:
        return getattr(real_reactor(), name)


class Silent(Protocol):
    """A connection to something that answers nothing by itself; it tells each request's path."""

    transport: Any = None

    def connectionMade(self) -> None:
        self.lost: Deferred[None] = Deferred()
        self.factory.connections.append(self)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.lost.callback(None)

    def dataReceived(self, data: bytes) -> None:
        asked, self.factory.asked = self.factory.asked, Deferred()
        asked.callback((data.split()[1].decode(), self))

    def say(self, text: bytes) -> None:
        """Send something."""
        self.transport.write(text)


class SilentFactory(Factory):
    """Makes such connections."""

    protocol = Silent

    def __init__(self) -> None:
        self.asked: Deferred[tuple[str, Silent]] = Deferred()
        self.connections: list[Silent] = []


@contextlib.asynccontextmanager
async def silent() -> AsyncIterator[tuple[RemoteManager, SilentFactory, OwnTime]]:
    """A manager that accepts connections and does not answer, how a command sees it, and time."""
    factory, clock = SilentFactory(), OwnTime()
    port = real_reactor().listenTCP(0, factory, interface="127.0.0.1")
    options = argparse.Namespace(token=None, server=[None], json=False)
    place = Place.parse(f"127.0.0.1:{port.getHost().port}")
    yield RemoteManager(place, Screen(clock, str), options, str), factory, clock
    await port.stopListening()
    for connection in factory.connections:
        connection.transport.abortConnection()


ALIVE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
BEGINNING = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n"


async def problem_of(asking: Awaitable[object]) -> ClientProblem:
    """Return what a request fails with."""
    with pytest.raises(ClientProblem) as raised:
        await asking
    return raised.value


@async_test
async def test_a_manager_that_does_not_answer() -> None:
    async with silent() as (manager, listener, clock):
        asking = Deferred.fromCoroutine(manager.ask("GET", "/status", dict[str, Any]))
        path, _ = await soon(listener.asked)
        assert path == "/status"
        clock.advance(29.9)
        assert not asking.called
        clock.advance(0.2)
        problem = await problem_of(soon(asking))
        assert problem.ending is Ending.UNREACHABLE
        assert str(problem).startswith("no answer within 30 s: the manager is stopped or ")


@async_test
async def test_a_request_that_may_last_goes_on_for_as_long_as_the_manager_lives() -> None:
    """A run may wait for permits for a day: only a manager that hangs ends that."""
    async with silent() as (manager, listener, clock):
        run = manager.ask("POST", "/genvm/run", dict[str, Any], {}, limit=None)
        asking = Deferred.fromCoroutine(run)
        await soon(listener.asked)
        for _ in range(3):
            clock.advance(30)
            path, connection = await soon(listener.asked)
            assert path == "/livez"
            connection.say(ALIVE)
            await soon(connection.lost)
        clock.advance(30)
        await soon(listener.asked)
        assert not asking.called
        clock.advance(30)
        problem = await problem_of(soon(asking))
        assert problem.ending is Ending.UNREACHABLE
        assert str(problem).startswith("no answer to this, nor to GET /livez within 30 s: ")


@async_test
async def test_an_answer_that_has_begun_may_take_its_time() -> None:
    async with silent() as (manager, listener, clock):
        asking = Deferred.fromCoroutine(manager.ask("GET", "/status", dict[str, Any]))
        _, connection = await soon(listener.asked)
        connection.say(BEGINNING + b'{"a"')
        later = Deferred.fromCoroutine(manager.ask("GET", "/later", dict[str, Any]))
        _, other = await soon(listener.asked)
        other.say(ALIVE)
        await soon(later)  # what was said before has come, too
        clock.advance(30)
        path, probe = await soon(listener.asked)
        assert path == "/livez"
        probe.say(ALIVE)
        connection.say(b": 1}")
        assert await soon(asking) == {"a": 1}


@async_test
async def test_a_stream_that_goes_silent() -> None:
    async with silent() as (manager, listener, clock):
        lines: list[bytes] = []
        first: Deferred[None] = Deferred()

        def take(line: bytes, _cut: bool) -> None:
            lines.append(line)
            first.callback(None)

        following = Deferred.fromCoroutine(manager.follow("GET", "/events", take))
        _, connection = await soon(listener.asked)
        connection.say(BEGINNING + b"one\n")
        await soon(first)
        clock.advance(30)
        await soon(listener.asked)
        clock.advance(30)
        problem = await problem_of(soon(following))
        assert problem.ending is Ending.UNREACHABLE
        assert lines == [b"one"]


@pytest.mark.parametrize(
    ("seconds", "asked", "limit", "ending"),
    [
        (0, "0", 5, Ending.LATE),
        (10, "10000", 15, Ending.LATE),
        (100, "100000", 105, Ending.LATE),
        (300, "120000", 150, Ending.UNREACHABLE),
        (float("inf"), "120000", 150, Ending.UNREACHABLE),
    ],
)
@async_test
async def test_a_time_that_was_given_is_kept(
    seconds: float, asked: str, limit: float, ending: Ending
) -> None:
    """A manager that hangs while it is waited for does not hold the command."""
    async with silent() as (manager, listener, clock):
        polling = manager.poll("GET", "/genvm/1", dict[str, Any], seconds, bool)
        waiting = Deferred.fromCoroutine(polling)
        path, _ = await soon(listener.asked)
        assert path == f"/genvm/1?wait_ms={asked}"
        for _ in range(30, int(limit), 30):  # to all other requests it answers
            clock.advance(30)
            assert (await soon(listener.asked))[0] == "/livez"
            listener.connections[-1].say(ALIVE)
            await soon(listener.connections[-1].lost)
        clock.advance((limit % 30 or 30) - 0.1)
        assert not waiting.called
        clock.advance(0.2)
        problem = await problem_of(soon(waiting))
        assert problem.ending is ending
        assert f"no answer within {limit} s" in str(problem)
