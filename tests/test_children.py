"""The bytes that children write, their timers, spawning, and their end with us."""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from genvm_manager import (
    DRAIN_SECONDS,
    MARKER,
    PARENT_POLL_SECONDS,
    PIECE_BYTES,
    BirthMarks,
    BoundedTail,
    Child,
    ExitStatus,
    Guardian,
    LineSplitter,
    OutputTurns,
    Spawner,
    SpawnFailed,
    watch_parent,
)

from .support import PATIENCE, FakeProcess, async_test, exit_reason, real_reactor, soon

# --- bounded tails ---


@given(st.lists(st.binary(max_size=30)), st.integers(min_value=0, max_value=50))
def test_a_tail_holds_the_last_bytes(pieces: list[bytes], limit: int) -> None:
    tail = BoundedTail(limit)
    for piece in pieces:
        tail.add(piece)
    everything = b"".join(pieces)
    last = everything[max(0, len(everything) - limit) :]
    assert tail.content == last
    tail.trim()
    assert tail.content == b"".join(tail.blocks) == last
    assert tail.size == len(last)
    assert tail.truncated == (len(everything) > limit)


@pytest.mark.parametrize("size", [1, 1000, 65_536, 10_000_000])
def test_a_tail_never_grows_far_beyond_its_limit(size: int) -> None:
    limit = 1000
    tail = BoundedTail(limit)
    for _ in range(max(3, min(3000, 3 * (limit + PIECE_BYTES) // size))):
        tail.add(b"x" * size)
        assert tail.size == sum(map(len, tail.blocks)) <= limit + PIECE_BYTES
        assert len(tail.content) <= limit
    tail.trim()
    assert tail.size == len(tail.content) == limit


# --- lines ---


def split(pieces: list[bytes], limit: int) -> list[tuple[bytes, bool]]:
    lines: list[tuple[bytes, bool]] = []
    splitter = LineSplitter(limit, lambda line, cut: lines.append((line, cut)))
    for piece in pieces:
        splitter.add(piece)
    splitter.end()
    return lines


@given(
    st.lists(st.lists(st.sampled_from([b"\n", b"a", b"bc", b"\r", b"\0"])).map(b"".join)),
    st.integers(min_value=1, max_value=6),
)
@example([b"abcdef", b"", b"\n", b"\n\n", b"abcdefg"], 6)
def test_lines_are_cut_as_bytes_split_does_however_they_arrive(
    pieces: list[bytes], limit: int
) -> None:
    expected = b"".join(pieces).split(b"\n")
    if expected[-1] == b"":
        expected.pop()
    assert split(pieces, limit) == [(line[:limit], len(line) > limit) for line in expected]


@given(
    st.lists(st.lists(st.sampled_from([b"\n", b"a", b"bc", b"!"])).map(b"".join)),
    st.integers(min_value=1, max_value=9),
)
@example([b"ab", b"c\na\nbc\nb", b"!\na\n!\n"], 9)
def test_whole_lines_may_be_taken_together(pieces: list[bytes], limit: int) -> None:
    lines: list[bytes] = []

    def take(together: bytes) -> bool:
        assert 0 < len(together) <= limit
        lines.extend(() if b"!" in together else together.split(b"\n"))
        return b"!" not in together

    splitter = LineSplitter(limit, lambda line, _cut: lines.append(line), take)
    for piece in pieces:
        splitter.add(piece)
    splitter.end()
    assert lines == [line for line, _ in split(pieces, limit)]


def test_a_line_of_many_megabytes_costs_no_more_than_the_limit() -> None:
    lines: list[tuple[int, bool]] = []
    splitter = LineSplitter(1000, lambda line, cut: lines.append((len(line), cut)))
    for _ in range(100):
        splitter.add(b"x" * 100_000)
    assert lines == []
    splitter.add(b"\nnext")
    splitter.end()
    splitter.end()
    assert lines == [(1000, True), (4, False)]


# --- exit status ---


@pytest.mark.parametrize(
    ("code", "number", "expected"),
    [
        (0, None, ExitStatus(0, None)),
        (3, None, ExitStatus(3, None)),
        (None, 9, ExitStatus(None, 9)),
        (None, 15, ExitStatus(None, 15)),
    ],
)
def test_an_exit_has_a_code_or_a_signal(
    code: int | None, number: int | None, expected: ExitStatus
) -> None:
    assert ExitStatus.of(exit_reason(code, number)) == expected


# --- timers of a child ---


class Owner:
    """Hears what happens to a child."""

    def __init__(self) -> None:
        self.data: dict[int, bytes] = {}
        self.events: list[str] = []
        self.status: ExitStatus | None = None
        self.spoken: Deferred[None] = Deferred()
        self.exited: Deferred[None] = Deferred()
        self.closed: Deferred[None] = Deferred()

    def child_data(self, fd: int, data: bytes) -> None:
        self.data[fd] = self.data.get(fd, b"") + data
        if not self.spoken.called:
            self.spoken.callback(None)

    def child_cut(self, fd: int) -> None:
        self.events.append(f"cut {fd}")

    def child_exited(self, status: ExitStatus) -> None:
        self.status = status
        self.events.append("exited")
        self.exited.callback(None)

    def child_closed(self) -> None:
        self.events.append("closed")
        self.closed.callback(None)


class Faked:
    """A child of which everything but the process is real, and time."""

    def __init__(self, pipes: tuple[int, ...] = (1, 2, 3)) -> None:
        self.clock = Clock()
        self.owner = Owner()
        self.gone: list[Child] = []
        self.child = Child(self.clock, self.owner, self.gone.append, OutputTurns(self.clock))
        self.process = FakeProcess(77, pipes)
        self.process.child = self.child
        self.child.makeConnection(self.process)


def test_a_child_forwards_its_events_once() -> None:
    faked = Faked()
    assert (faked.child.pid, faked.owner.events) == (77, [])
    faked.process.write(3, b"a")
    faked.process.exit(3)
    assert faked.owner.events == ["exited"]
    assert faked.gone == [faked.child]
    faked.process.write(3, b"b")
    faked.process.close()
    assert faked.owner.events == ["exited", "closed"]
    assert (faked.owner.status, faked.owner.data) == (ExitStatus(3, None), {3: b"ab"})
    assert faked.clock.getDelayedCalls() == []


def test_terminating_asks_first_and_kills_after_the_grace() -> None:
    faked = Faked()
    faked.child.terminate(5)
    assert faked.process.signals == ["TERM"]
    faked.clock.advance(4.99)
    assert faked.process.signals == ["TERM"]
    faked.clock.advance(0.02)
    assert faked.process.signals == ["TERM", "KILL"]
    assert faked.child.force_killed


@pytest.mark.parametrize(("number", "killed"), [(signal.SIGTERM, False), (signal.SIGKILL, True)])
def test_what_it_died_of_tells_whether_it_had_to_be_killed(number: int, killed: bool) -> None:
    """On a busy machine a process may still have SIGTERM before it when SIGKILL is sent."""
    faked = Faked()
    faked.child.terminate(0.1)
    faked.clock.advance(0.1)
    assert faked.process.signals == ["TERM", "KILL"]
    faked.child.processExited(exit_reason(None, number))
    assert faked.child.force_killed is killed


def test_without_grace_it_is_killed_at_once() -> None:
    faked = Faked()
    faked.child.terminate(0)
    assert faked.process.signals == ["KILL"]
    assert faked.child.force_killed
    assert faked.clock.getDelayedCalls() == []


@pytest.mark.parametrize(("first", "second", "killed_at"), [(10, 3, 4), (3, 10, 3), (5, 0, 1)])
def test_the_shorter_grace_wins(first: float, second: float, killed_at: float) -> None:
    faked = Faked()
    faked.child.terminate(first)
    faked.clock.advance(1)
    faked.child.terminate(second)
    if killed_at > 1:
        faked.clock.advance(killed_at - 1 - 0.01)
        assert "KILL" not in faked.process.signals
        faked.clock.advance(0.02)
    assert faked.process.signals.count("KILL") == 1
    faked.process.end()
    faked.clock.advance(100)
    assert faked.process.signals.count("KILL") == 1
    assert faked.process.signals.count("TERM") == 1, "a second one may mean: at once"


def test_an_exit_in_time_cancels_the_kill() -> None:
    faked = Faked()
    faked.child.terminate(5)
    faked.process.end()
    assert faked.clock.getDelayedCalls() == []
    assert not faked.child.force_killed
    assert faked.owner.status == ExitStatus(None, signal.SIGTERM)


def test_a_signal_that_comes_too_late_is_no_error() -> None:
    faked = Faked()
    faked.process.alive = False  # it is a zombie: Twisted knows, but has not told us yet
    faked.child.terminate(1)
    faked.clock.advance(2)
    faked.child.kill()
    assert faked.process.signals == []
    faked.process.alive = True
    faked.process.end()
    faked.child.terminate(1)
    faked.child.kill()
    assert faked.clock.getDelayedCalls() == []
    assert faked.owner.events == ["exited", "closed"]


def test_pipes_that_others_hold_are_closed_after_the_exit() -> None:
    faked = Faked()
    faked.process.exit()
    faked.clock.advance(DRAIN_SECONDS - 0.01)
    assert set(faked.process.pipes) == {1, 2, 3}
    faked.clock.advance(0.02)
    assert faked.process.pipes == {}
    assert faked.owner.events == ["exited", "closed"]
    assert faked.clock.getDelayedCalls() == []
    assert DRAIN_SECONDS < 1, "a grandchild delays the result by no more than a second"


# --- spawning ---

PYTHON = sys.executable


@pytest.fixture
def spawner() -> Iterator[Spawner]:
    """Return a spawner of real children that shares its process with the tests."""
    spawner = Spawner(real_reactor(), "boot", owns_process=False)
    spawner.start()
    yield spawner
    spawner.stop()


def script(path: Path, text: str, mode: int = 0o755) -> str:
    """Write a file that may be run."""
    path.write_text(text)
    path.chmod(mode)
    return str(path)


@async_test
async def test_a_child_says_what_it_says_and_exits(spawner: Spawner) -> None:
    owner = Owner()
    code = (
        "import os; os.write(1, b'out'); os.write(2, b'err'); os.write(3, b'log');"
        "os.write(1, os.read(0, 10) or b' eof'); os._exit(5)"
    )
    child = spawner.spawn(owner, [PYTHON, "-c", code], os.environb, pipes={1, 2, 3}, nulls={0})
    assert child.pid > 0
    await soon(owner.closed)
    assert owner.data == {1: b"out eof", 2: b"err", 3: b"log"}
    assert owner.status == ExitStatus(5, None)
    assert owner.events == ["exited", "closed"]


@async_test
async def test_a_child_has_no_other_descriptors_and_the_environment_it_is_given(
    spawner: Spawner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OF_OURS", "é\udcff")
    monkeypatch.chdir(tmp_path)
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    owner = Owner()
    code = (
        "import os, sys; fds = set(os.listdir('/proc/self/fd'));"
        "print(sorted(f for f in fds if os.path.exists('/proc/self/fd/' + f)), os.getcwd(),"
        " os.environb[b'OF_OURS'])"
    )
    try:
        spawner.spawn(owner, [PYTHON, "-c", code], os.environb, pipes={1, 3}, nulls={0, 2})
        await soon(owner.closed)
    finally:
        os.close(reader)
        os.close(writer)
    expected = f"['0', '1', '2', '3'] {tmp_path} {'é'.encode() + bytes([255])!r}\n"
    assert owner.data[1].decode() == expected


@async_test
async def test_output_that_cannot_be_taken_is_cut_and_ends_no_other(
    spawner: Spawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, other = Owner(), Owner()
    monkeypatch.setattr(owner, "child_data", lambda fd, data: 1 / 0)
    for one in (owner, other):
        spawner.spawn(one, ["/bin/echo", "x"], os.environb, pipes={1}, nulls={0, 2})
    await soon(owner.closed)
    await soon(other.closed)
    assert owner.events.count("cut 1") == 1
    assert (owner.status, other.status) == (ExitStatus(0, None), ExitStatus(0, None))
    assert other.data == {1: b"x\n"}


@async_test
async def test_no_fork_is_ever_called(spawner: Spawner, monkeypatch: pytest.MonkeyPatch) -> None:
    spawned: list[bytes] = []
    real_spawn = os.posix_spawnp

    def forbidden(*_: object) -> int:
        raise AssertionError("fork is slow in a large process")

    def spy(*arguments: Any, **options: Any) -> int:
        spawned.append(arguments[0])
        return real_spawn(*arguments, **options)

    monkeypatch.setattr(os, "fork", forbidden)
    monkeypatch.setattr(os, "posix_spawnp", spy)
    for pipes, nulls in (({1, 2, 3}, {0}), ({3}, {0, 1, 2})):
        owner = Owner()
        spawner.spawn(owner, [PYTHON, "-c", ""], os.environb, pipes=pipes, nulls=nulls)
        await soon(owner.closed)
        assert owner.status == ExitStatus(0, None)
    assert len(spawned) == 2


def missing(tmp_path: Path) -> list[str]:
    return [str(tmp_path / "none" / "genvm")]


def a_folder(tmp_path: Path) -> list[str]:
    return [str(tmp_path)]


def not_executable(tmp_path: Path) -> list[str]:
    return [script(tmp_path / "genvm", "#!/bin/sh\n", 0o644)]


def no_program(tmp_path: Path) -> list[str]:
    return [script(tmp_path / "genvm", "neither ELF nor a script\n")]


def no_interpreter(tmp_path: Path) -> list[str]:
    return [script(tmp_path / "genvm", "#!/none/such\n")]


def too_long(tmp_path: Path) -> list[str]:
    return ["/bin/true", *["x" * 131_000] * 40]


def one_too_long(tmp_path: Path) -> list[str]:
    return ["/bin/true", "x" * 131_072]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (missing, "not found"),
        (a_folder, "not executable"),
        (not_executable, "not executable"),
        (no_program, "not an executable of this machine"),
        (no_interpreter, "the interpreter or loader that it names is not found"),
        (too_long, "arguments too long"),
        (one_too_long, "arguments too long"),
    ],
)
def test_what_cannot_be_spawned_is_an_error_with_a_reason_and_leaves_nothing(
    make: Any, reason: str, tmp_path: Path, spawner: Spawner
) -> None:
    argv = make(tmp_path)
    gc.collect()  # of what earlier tests left
    before = sorted(os.listdir("/proc/self/fd"))
    owner = Owner()
    for _ in range(20):
        with pytest.raises(SpawnFailed) as caught:
            spawner.spawn(owner, argv, os.environb, pipes={1, 2, 3}, nulls={0})
        assert caught.value.message.startswith(reason)
    assert owner.events == []
    gc.collect()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_no_descriptors_left_is_an_error_with_a_reason(spawner: Spawner) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
    try:
        with pytest.raises(SpawnFailed, match="too many open files"):
            spawner.spawn(Owner(), ["/bin/true"], os.environb, pipes=range(50, 450), nulls={0})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_before_the_start_and_after_the_stop_nothing_is_spawned() -> None:
    spawner = Spawner(real_reactor(), "boot", owns_process=False)
    for started in (False, True):
        if started:
            spawner.start()
            spawner.stop()
        with pytest.raises(SpawnFailed, match="not running"):
            spawner.spawn(Owner(), ["/bin/true"], os.environb, pipes=(), nulls={0})


@async_test
async def test_a_child_that_ignores_the_request_is_killed(spawner: Spawner) -> None:
    owner = Owner()
    code = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "os.write(1, b'ready'); time.sleep(600)"
    )
    child = spawner.spawn(owner, [PYTHON, "-c", code], os.environb, pipes={1}, nulls={0, 2})
    await soon(owner.spoken)
    child.terminate(0.05)
    await soon(owner.closed)
    assert owner.status == ExitStatus(None, signal.SIGKILL)
    assert child.force_killed


@async_test
async def test_a_grandchild_that_holds_the_pipes_delays_neither_exit_nor_end(
    spawner: Spawner,
) -> None:
    owner = Owner()
    code = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.write(1, b'%d ' % os.getpid())\n"
        "    time.sleep(600)\n"
        "os._exit(0)"
    )
    spawner.spawn(owner, [PYTHON, "-c", code], os.environb, pipes={1}, nulls={0, 2})
    await soon(owner.spoken)
    grandchild = int(owner.data[1])
    try:
        await soon(owner.exited)
        await soon(owner.closed)  # long before the grandchild ends by itself
        os.kill(grandchild, 0)  # it lives, and was not waited for
    finally:
        os.kill(grandchild, signal.SIGKILL)


@async_test
async def test_stopping_kills_every_child(spawner: Spawner) -> None:
    owners = [Owner() for _ in range(3)]
    for owner in owners:
        spawner.spawn(owner, ["/bin/sleep", "600"], os.environb, pipes={1}, nulls={0, 2})
    spawner.kill_all()
    for owner in owners:
        await soon(owner.closed)
        assert owner.status == ExitStatus(None, signal.SIGKILL)
    spawner.kill_all()


@async_test
async def test_who_tidies_up_hears_when_a_child_is_gone(spawner: Spawner) -> None:
    owner, gone = Owner(), Deferred[None]()
    spawner.spawn(
        owner,
        ["/bin/sleep", "600"],
        os.environb,
        pipes={1},
        nulls={0, 2},
        after=lambda: gone.callback(None),
    )
    assert not gone.called
    spawner.kill_all()
    await soon(gone)
    assert "closed" not in owner.events, "as soon as it is reaped"


# --- the guardian ---


def guardian_command() -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment with which the guardian is started."""
    calls: list[tuple[list[str], dict[str, str]]] = []

    class Recorder:
        def spawnProcess(
            self, _protocol: object, _program: str, argv: list[str], **options: Any
        ) -> None:
            calls.append((argv, options["env"]))

        def seconds(self) -> float:
            return 0.0

    Guardian(Recorder(), "the-boot-id").start()
    ((argv, environment),) = calls
    return argv, environment


def test_the_guardian_kills_what_has_our_marker_and_nothing_else() -> None:
    argv, environment = guardian_command()
    assert argv[1] == "-ISc", "a bare Python starts fast and needs no packages"
    assert environment == {}

    def victim(marker: str, parent: str = "") -> subprocess.Popen[bytes]:
        return subprocess.Popen(["/bin/sleep", "600"], env={parent + MARKER: marker})

    with BirthMarks("the-boot-id").marking(1):
        hidden = victim("", "X")
    with BirthMarks("another-boot-id").marking(1):
        foreign = victim("", "X")
    ours = [victim("the-boot-id"), victim("the-boot-id"), hidden]
    others = [victim("the-boot-id-2"), victim("the-boot"), victim("the-boot-id", "X"), foreign]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, env=environment) as guardian:
        try:
            # It says nothing when it is ready: it must do its work whenever the end comes.
            assert guardian.stdin is not None
            guardian.stdin.write(b"bytes are not the end\n")
            guardian.stdin.flush()
            assert [child.poll() for child in (*ours, *others)] == [None] * 7
            guardian.stdin.close()
            assert [child.wait(PATIENCE) for child in ours] == [-signal.SIGKILL] * 3
            assert guardian.wait(PATIENCE) == 0
            assert [child.poll() for child in others] == [None] * 4
        finally:
            for child in (*ours, *others, guardian):
                child.kill()
                child.wait()


def test_a_birth_mark_is_inherited_and_leaves_us_as_we_were() -> None:
    limit = resource.RLIMIT_RTTIME
    before = resource.getrlimit(limit)
    marks = BirthMarks("the-boot-id")
    assert marks.are_possible, "this machine limits RLIMIT_RTTIME"
    with marks.marking(2**32 + 7):
        command = ["setsid", "-w", "env", "-i", "sh", "-c", "sleep 600 & echo $!; wait"]
        parent = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert resource.getrlimit(limit) == before
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        assert marks.number_of(child) == 7
        assert BirthMarks("another").number_of(child) is None
        assert marks.number_of(os.getpid()) is None
    finally:
        os.kill(child, signal.SIGKILL)
        parent.wait(PATIENCE)
        parent.stdout.close()
    assert marks.number_of(child) is None, "it is gone"


def test_the_guardian_ignores_the_signals_of_the_group() -> None:
    argv, environment = guardian_command()
    victim = subprocess.Popen(["/bin/sleep", "600"], env={MARKER: "the-boot-id"})
    with subprocess.Popen(argv, stdin=subprocess.PIPE, env=environment) as guardian:
        try:
            assert guardian.stdin is not None
            wait_for_own_session(guardian.pid)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                guardian.send_signal(number)
            guardian.stdin.close()
            assert victim.wait(PATIENCE) == -signal.SIGKILL
            assert guardian.wait(PATIENCE) == 0
        finally:
            for child in (victim, guardian):
                child.kill()
                child.wait()


def wait_for_own_session(pid: int) -> None:
    """Return once a process has a session of its own and ignores what ends others."""
    deadline = real_reactor().seconds() + PATIENCE
    wanted = sum(1 << number - 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    while real_reactor().seconds() < deadline:
        status = Path(f"/proc/{pid}/status").read_text()
        (ignored,) = (line.split()[1] for line in status.splitlines() if line[:7] == "SigIgn:")
        if int(ignored, 16) & wanted == wanted and os.getsid(pid) == pid:
            return
        select.select([], [], [], 0.01)
    pytest.fail("the guardian never got ready")


def test_the_guardian_is_started_again_when_it_dies() -> None:
    class Recorder(Clock):
        started = 0

        def spawnProcess(self, protocol: Any, *_: Any, **__: Any) -> None:
            self.started += 1

    clock = Recorder()
    guardian = Guardian(clock, "b")
    guardian.start()
    guardian.processEnded(exit_reason(None, signal.SIGKILL))
    assert clock.started == 1
    clock.advance(2)
    assert clock.started == 2
    guardian.processEnded(exit_reason(0))
    guardian.stop()
    clock.advance(10)
    assert clock.started == 2
    guardian.processEnded(exit_reason(0))
    assert clock.getDelayedCalls() == []


# --- the parent ---


def test_the_end_of_the_parent_is_noticed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parents = [5]
    monkeypatch.setattr(os, "getppid", lambda: parents[-1])
    clock = Clock()
    ended: list[bool] = []
    watch = watch_parent(clock, 5, lambda: ended.append(True))
    clock.pump([PARENT_POLL_SECONDS] * 5)
    assert ended == []
    parents.append(1)
    clock.pump([PARENT_POLL_SECONDS] * 5)
    assert ended == [True]
    assert not watch.running
    assert clock.getDelayedCalls() == []


def test_a_parent_that_is_gone_at_the_start_is_noticed_at_once() -> None:
    with subprocess.Popen(["/bin/true"]) as other:
        ended: list[bool] = []
        watch_parent(Clock(), other.pid, lambda: ended.append(True))
        assert ended == [True]


def test_a_watch_that_was_stopped_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    watch = watch_parent(clock, os.getppid(), lambda: pytest.fail("it was stopped"))
    watch.stop()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    clock.pump([PARENT_POLL_SECONDS] * 5)
    assert clock.getDelayedCalls() == []
