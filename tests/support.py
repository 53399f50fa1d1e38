"""What several test modules share: the real reactor, JSON, and fakes of threads, of a process
and of its spawner."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Awaitable, Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, cast

import pytest
import pytest_twisted
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.testing import MemoryReactorClock
from twisted.internet.threads import deferToThreadPool
from twisted.logger import ILogObserver, globalLogPublisher
from twisted.python.failure import Failure

from genvm_manager import (
    Child,
    ChildListener,
    HttpClient,
    Lazy,
    OutputTurns,
    SpareThreads,
    SpawnFailed,
)

#: Seconds after which a test gives up waiting for something real; nothing takes that long.
PATIENCE = 120.0

Arguments = ParamSpec("Arguments")

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
json_objects = st.dictionaries(st.text(), json_values, max_size=5)


def async_test(test: Callable[Arguments, Awaitable[None]]) -> Callable[Arguments, None]:
    """Make a test of a coroutine that runs in the real reactor."""
    return cast(Callable[Arguments, None], pytest_twisted.ensureDeferred(test))


def real_reactor() -> Any:
    """Return the reactor that pytest-twisted runs."""
    from twisted.internet import reactor

    return reactor


def soon(waiting: Deferred[Any]) -> Deferred[Any]:
    """Bound a wait for something real."""
    return waiting.addTimeout(PATIENCE, real_reactor())


def outcome(waiting: Deferred[Any]) -> list[Any]:
    """Return a list that gets the result of a Deferred, or its error."""
    result: list[Any] = []
    waiting.addCallbacks(result.append, lambda failure: result.append(failure.value))
    return result


@contextlib.contextmanager
def observing(observer: Callable[[dict[str, Any]], object]) -> Iterator[None]:
    """Let something observe what is logged, the loggers of the manager included."""
    observer_ = cast(ILogObserver, observer)
    globalLogPublisher.addObserver(observer_)
    try:
        yield
    finally:
        globalLogPublisher.removeObserver(observer_)


def exit_reason(code: int | None, signal_number: int | None = None) -> Failure:
    """Return the reason that Twisted gives for the end of a process."""
    if code == 0:
        return Failure(ProcessDone(0))
    return Failure(ProcessTerminated(code, signal_number, 0))


def without_spare_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the threads of the reactor, such as a ``ThreadlessReactor``, do what may hang."""

    def run(_self: object, reactor: Any, _seconds: float, work: Any, *arguments: Any) -> Any:
        return deferToThreadPool(reactor, reactor.getThreadPool(), work, *arguments)

    monkeypatch.setattr(SpareThreads, "run", run)


class ThreadlessReactor(MemoryReactorClock):
    """A reactor in memory whose threads work when the test says so."""

    def __init__(self) -> None:
        MemoryReactorClock.__init__(self)
        self.jobs: list[Callable[[], None]] = []

    def getThreadPool(self) -> ThreadlessReactor:
        return self

    def callInThreadWithCallback(
        self,
        on_result: Callable[[bool, Any], None],
        work: Callable[..., Any],
        *arguments: Any,
        **options: Any,
    ) -> None:
        def job() -> None:
            try:
                result = work(*arguments, **options)
            except Exception:
                on_result(False, Failure())
            else:
                on_result(True, result)

        self.jobs.append(job)

    def callFromThread(self, call: Callable[..., Any], *args: Any, **kw: Any) -> None:
        call(*args, **kw)

    def work(self) -> None:
        """Let the threads do what they were given."""
        while self.jobs:
            self.jobs.pop(0)()


class FakeProcess:
    """The transport of a child that ends only when the test says so."""

    def __init__(self, pid: int, pipes: Iterable[int]) -> None:
        self.pid = pid
        self.pipes: dict[int, object] = dict.fromkeys(pipes)
        self.signals: list[str] = []
        self.child: Child | None = None
        self.alive = True
        self.ended = False

    # --- what a Child asks of it ---

    def signalProcess(self, name: str) -> None:
        """Record a signal."""
        if not self.alive:
            raise ProcessExitedAlready
        self.signals.append(name)

    def closeChildFD(self, fd: int) -> None:
        """Close one pipe."""
        del self.pipes[fd]
        self._maybe_end()

    # --- what a test lets it do ---

    def write(self, fd: int, data: bytes) -> None:
        """Let the process write."""
        assert self.child is not None
        self.child.childDataReceived(fd, data)

    def exit(self, code: int = 0) -> None:
        """Let the process exit by itself, or die of the signals that it got."""
        assert self.child is not None
        assert self.alive
        self.alive = False
        deadly = "KILL" if "KILL" in self.signals else next(iter(self.signals), None)
        if deadly is None:
            self.reason = exit_reason(code)
        else:
            self.reason = exit_reason(None, signal.Signals[f"SIG{deadly}"])
        self.child.processExited(self.reason)

    def close(self) -> None:
        """Let all pipes of the process be closed."""
        self.pipes.clear()
        self._maybe_end()

    def end(self, code: int = 0) -> None:
        """Let the process exit and all its pipes be closed."""
        self.exit(code)
        self.close()

    def _maybe_end(self) -> None:
        if not self.pipes and not self.alive and not self.ended:
            assert self.child is not None
            self.ended = True
            self.child.processEnded(self.reason)


class FakeSpawner:
    """Stands in for ``Spawner``; its processes are in the hands of the test."""

    process_class = FakeProcess

    def __init__(self, clock: Any) -> None:
        self.clock = clock
        self.turns = OutputTurns(clock)
        self.processes: list[FakeProcess] = []
        self.commands: list[list[str]] = []
        self.descriptors: list[tuple[set[int], set[int]]] = []
        self.problem: str | None = None

    def spawn(
        self,
        listener: ChildListener,
        argv: Sequence[str],
        environment: Mapping[bytes, bytes],
        *,
        pipes: Iterable[int],
        nulls: Iterable[int] = (),
        feeds: Iterable[int] = (),
        inherited: Mapping[int, int] | None = None,
        nice: int = 0,
        whole: Container[int] = (),
        after: Callable[[], object] | None = None,
    ) -> Child:
        """Start nothing, and never call ``after``; see ``Spawner.spawn``."""
        self.commands.append(list(argv))
        self.descriptors.append((set(pipes), set(nulls)))
        if self.problem is not None:
            raise SpawnFailed(self.problem)
        process = self.process_class(1000 + len(self.processes), [*pipes, *feeds])
        self.processes.append(process)
        process.child = child = Child(self.clock, listener, lambda child: None, self.turns)
        child.makeConnection(process)
        return child

    def kill_all(self) -> None:
        """Send SIGKILL to every process."""
        for process in self.processes:
            if process.alive:
                process.signalProcess("KILL")


def http_client(treq: Any, loading: Deferred[None] | None = None) -> HttpClient:
    """Return a client that asks through one of treq's, or a fake of it, once that is loaded."""

    class Loading(Lazy[Any]):
        async def get(self) -> Any:
            await (loading or succeed(None))
            return treq, None

    return HttpClient(Loading(None, 0, dict))
