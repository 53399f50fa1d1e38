"""What an execution is, and how it goes from its request to its end."""

from __future__ import annotations

import enum
import functools
import gc
import itertools
import json
import random
import sys
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred, ensureDeferred
from twisted.internet.task import Clock

import genvm_manager
from genvm_manager import (
    ARGUMENT_MAX_BYTES,
    DEADLINE_GRACE_SECONDS,
    KILL_SECONDS,
    LISTED_FINISHED,
    LOG_LINE_MAX_BYTES,
    LOG_MAX_BYTES,
    LOG_MAX_RECORDS,
    MIB,
    PIECE_BYTES,
    TRIM_LITTLE_SECONDS,
    Capture,
    Cause,
    Config,
    Draining,
    Event,
    Execution,
    ExecutionCancelled,
    ExecutionNotFound,
    Executions,
    InvalidRequest,
    LogRecords,
    ManifestStore,
    NoPermit,
    PermitGate,
    QueueFull,
    RunRequest,
    ShutdownTimeout,
    Spawner,
    SpawnFailed,
    State,
    Timestamp,
    Variables,
    VersionNotAvailable,
    do_nothing,
    execution_ids,
    parse_manifest,
)

from .support import FakeProcess, FakeSpawner, observing, outcome

STDOUT, STDERR, LOG = 1, 2, 3
EPOCH = 1_750_000_000.0
MOMENT = Timestamp(2025, 6, 1, tzinfo=UTC)
MINUTE = 60.0


def make_request(**changes: Any) -> RunRequest:
    """Return a request; a synchronous one that captures its output unless told otherwise."""
    fields: dict[str, Any] = {
        "major": 0,
        "message": msgspec.Raw(b'{"v": 1.10}'),
        "is_sync": True,
        "capture_output": True,
        "host_data": '{"h": 1}',
        "timestamp": MOMENT,
        "host": "unix:///tmp/host",
    }
    return RunRequest(**{**fields, **changes})


class World:
    """Executions whose time and processes are in the hands of the test."""

    def __init__(
        self, permits: int = 4, tell: Callable[..., object] = do_nothing, **settings: Any
    ) -> None:
        self.clock = Clock()
        self.config = Config(root=Path("/genvm"), permits=permits, **settings)
        self.gate = PermitGate(permits, self.clock)
        self.manifest = ManifestStore(self.config)
        self.manifest.manifest = parse_manifest(
            "executor_versions: {v0.2.3: {available_after: 2025-01-01T00:00:00Z}}", "m.yaml"
        )
        self.spawner = FakeSpawner(self.clock)
        self.executions = Executions(
            self.config,
            self.clock,
            self.gate,
            self.manifest,
            cast(Spawner, self.spawner),
            Variables(self.config.root / "config"),
            itertools.count(1),
            now=lambda: EPOCH + self.clock.seconds(),
            tell=tell,
        )

    def ask(self, key: str | None = None, **changes: Any) -> Deferred[Execution]:
        """Ask for a run as a client does; cancelling the Deferred is its disconnect."""
        asked = self.ask_at_once(key, **changes)
        self.clock.advance(0)
        return asked

    def ask_at_once(
        self, key: str | None = None, wait: float | None = None, **changes: Any
    ) -> Deferred[Execution]:
        """Ask for a run in the same turn of the reactor as what comes next."""
        return ensureDeferred(self.executions.run(make_request(**changes), key, wait))

    def start(self, **changes: Any) -> tuple[Execution, FakeProcess]:
        """Start a run that must not have to wait."""
        (execution,) = outcome(self.ask(**changes))
        assert isinstance(execution, Execution), execution
        return execution, self.spawner.processes[-1]

    def stop(self, genvm_id: int, grace: float = 30.0) -> list[Any]:
        """Ask for the end of a run."""
        return outcome(ensureDeferred(self.executions.stop(genvm_id, grace)))

    def result(self, genvm_id: int) -> Any:
        """Return the result of a run as a client reads it."""
        return json.loads(b"".join(self.executions.get(genvm_id).result_pieces()))

    def waiting(self) -> list[int]:
        """Return the ids of the runs that wait."""
        return [e.id for e in self.executions.active() if e.state is State.WAITING]


def refused(asked: Deferred[Execution]) -> Any:
    """Return the error of a run that could not be started."""
    (error,) = outcome(asked)
    assert isinstance(error, Exception)
    return error


# --- ids ---


def test_ids_begin_with_the_time_and_end_with_the_instance() -> None:
    first, second = itertools.islice(execution_ids(EPOCH), 2)
    assert (first % 100, second - first) == (0, 100)
    assert next(execution_ids(EPOCH + 0.1)) == first + 100 * 1000, "after 1000 runs in 0.1 s"
    assert next(execution_ids(0.0)) == 100, "where the clock was never set"
    for instance in (0, 7, 99):
        some = itertools.islice(execution_ids(EPOCH, instance), 9)
        assert {each % 100 for each in some} == {instance}
        latest = datetime(2310, 1, 1, tzinfo=UTC).timestamp()
        assert next(execution_ids(latest, instance)) < 2**53


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 9), st.integers(1, 20)), max_size=20))
def test_no_id_comes_twice_from_starts_within_a_millisecond(
    starts: list[tuple[int, int, int]],
) -> None:
    moment, seen, newest = 0, set[int](), dict[int, int]()
    for instance, count, tenths_of_ms in starts:
        ids = execution_ids(EPOCH + moment / 10_000, instance)
        for each in itertools.islice(ids, min(count, tenths_of_ms)):  # none is quicker
            assert each not in seen
            assert each > newest.get(instance, 0), "they grow"
            seen.add(each)
            newest[instance] = each
        moment += tenths_of_ms


# --- starting ---


def test_a_run_starts_the_executor_of_the_version_with_the_documented_command_line() -> None:
    world = World()
    execution, _ = world.start(extra_args=["--debug-mode", "--x y"])
    assert world.spawner.commands == [
        [
            "/genvm/executor/v0.2.3/bin/genvm",
            *("--log-fd=3", "run", "--debug-mode", "--x y", "--sync"),
            *("--host-data", '{"h": 1}', "--host", "unix:///tmp/host"),
            *("--message", '{"v": 1.10}', "--cookie=1"),
        ]
    ]
    assert (execution.id, execution.version, execution.state) == (1, "v0.2.3", State.RUNNING)
    world.start(is_sync=False)
    assert "--sync" not in world.spawner.commands[1]
    assert world.spawner.commands[1][-1] == "--cookie=2"


def test_output_that_is_not_wanted_goes_nowhere() -> None:
    world = World()
    world.start(capture_output=True)
    world.start(capture_output=False)
    assert world.spawner.descriptors == [({1, 2, 3}, {0}), ({2, 3}, {0, 1})]


@pytest.mark.parametrize(("is_sync", "permits"), [(True, 1), (False, 2)])
def test_a_run_takes_its_permits(is_sync: bool, permits: int) -> None:
    world = World(permits=4)
    world.start(is_sync=is_sync)
    assert world.gate.in_use == permits


def test_runs_wait_in_order_for_their_permits() -> None:
    world = World(permits=2)
    _, process = world.start(is_sync=True)
    heavy, light = outcome(world.ask(is_sync=False)), outcome(world.ask(is_sync=True))
    assert (heavy, light) == ([], [])
    assert world.waiting() == [3, 2]
    assert world.result(2) is None
    process.exit()
    assert [heavy[0].id, light] == [2, []]
    world.spawner.processes[1].exit()
    world.clock.advance(0)
    assert light[0].id == 3


@pytest.mark.parametrize("field", ["host_data", "host", "message", "extra_args"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a\0b", "NUL"),
        ("x" * (ARGUMENT_MAX_BYTES + 1), f"at most {ARGUMENT_MAX_BYTES} bytes"),
        ("é" * (ARGUMENT_MAX_BYTES // 2 + 1), f"at most {ARGUMENT_MAX_BYTES} bytes"),
    ],
    ids=["nul", "long", "long in bytes"],
)
def test_text_that_cannot_be_an_argument_is_refused_by_its_path(
    field: str, text: str, reason: str
) -> None:
    world = World()
    message = msgspec.Raw(f'{{"a": "{text}"}}'.encode())
    value: Any = {"extra_args": ["fine", text], "message": message}.get(field, text)
    error = refused(world.ask(None, **{field: value}))
    assert isinstance(error, InvalidRequest)
    assert error.message.startswith("extra_args[1]: " if field == "extra_args" else f"{field}: ")
    assert reason in error.message
    assert len(error.message) < 500
    assert world.spawner.commands == []
    assert list(world.executions.listed()) == []
    assert world.gate.in_use == 0


def test_the_longest_argument_that_the_kernel_takes_is_passed() -> None:
    world = World()
    longest = "x" * ARGUMENT_MAX_BYTES
    world.start(host_data=longest)
    assert longest in world.spawner.commands[0]


def test_a_version_that_does_not_exist_is_refused() -> None:
    world = World()
    error = refused(world.ask(major=7))
    assert isinstance(error, VersionNotAvailable)
    assert world.gate.in_use == 0
    assert world.start()[0].id == 1


def test_a_version_is_chosen_when_the_run_is_asked_for() -> None:
    world = World(permits=0)
    asked = outcome(world.ask())
    world.manifest.manifest = parse_manifest("executor_versions: {}", "m.yaml")
    world.gate.resize(1)
    assert asked[0].version == "v0.2.3"


def test_a_spawn_that_fails_gives_the_permits_back_and_names_version_and_reason() -> None:
    world = World(permits=2)
    world.spawner.problem = "not found"
    for _ in range(3):
        error = refused(world.ask(is_sync=False))
        assert isinstance(error, SpawnFailed)
        assert error.message == "executor v0.2.3 cannot be started: not found"
    assert (world.gate.in_use, list(world.executions.listed())) == (0, [])
    assert world.clock.getDelayedCalls() == []
    world.spawner.problem = None
    execution, _ = world.start(is_sync=False)
    assert execution.id == 4, "ids are never used twice"


def test_many_waiting_runs_that_cannot_be_spawned_fail_without_recursion() -> None:
    world = World(permits=0)
    asked = [outcome(world.ask()) for _ in range(500)]
    world.spawner.problem = "not found"
    world.gate.resize(1)
    while world.clock.getDelayedCalls():
        world.clock.advance(0)
    assert [type(result[0]) for result in asked] == [SpawnFailed] * 500
    assert (world.gate.in_use, world.gate.queue_length) == (0, 0)


@pytest.mark.parametrize("how", ["spawn fails", "client disconnects"])
def test_who_waits_for_the_result_of_a_run_that_never_started_hears_of_it(how: str) -> None:
    world = World(permits=0)
    asked = world.ask()
    asked.addErrback(lambda _: None)
    waiting = outcome(world.executions.wait(world.executions.get(1), 100))
    if how == "spawn fails":
        world.spawner.problem = "not found"
        world.gate.resize(1)
    else:
        asked.cancel()
    with pytest.raises(ExecutionNotFound):
        world.executions.get(1)
    assert len(waiting) == 1, "nothing can come any more"


# --- every interleaving ends once ---

EVENTS = ("exited", "closed", "cancel", "deadline", "shutdown", "disconnect")


class Story:
    """One run, and the events that happen to it."""

    def __init__(self, permits: int, request: RunRequest) -> None:
        # The result outlives the deadline, which is an event of the story.
        self.world = World(permits=permits, execution_retention=86_400.0)
        self.finishes = 0
        self.client = ensureDeferred(self.world.executions.run(request))
        self.heard = outcome(self.client)
        self.stops: list[list[Any]] = []
        self.closed: list[Any] | None = None

    @property
    def process(self) -> FakeProcess | None:
        return self.world.spawner.processes[0] if self.world.spawner.processes else None

    def happen(self, event: str) -> None:
        process = self.process
        if event == "admit":
            self.world.gate.resize(2)
        elif event == "exited":
            if process is not None and process.alive:
                process.exit(0)
        elif event == "closed":
            if process is not None and not process.ended:
                process.close()
        elif event == "cancel":
            self.stops.append(self.world.stop(1))
        elif event == "deadline":
            self.world.clock.advance(20 * MINUTE)
        elif event == "shutdown":
            self.closed = outcome(self.world.executions.close(0.7))
        elif event == "disconnect":
            self.client.cancel()
        else:
            raise AssertionError(event)

    def observe(self, event: dict[str, Any]) -> None:
        if event.get("log_format") == "execution finished":
            self.finishes += 1
        assert "log_failure" not in event, event["log_failure"].getTraceback()

    def tell(self, events: tuple[str, ...]) -> None:
        """Let everything happen, and then what must happen in the end."""
        with observing(self.observe):
            for event in (*events, "shutdown", "exited", "closed"):
                self.happen(event)

    def check_nothing_is_left(self) -> None:
        world = self.world
        assert (world.gate.in_use, world.gate.queue_length) == (0, 0)
        assert self.closed == [None]
        assert len(self.heard) == 1
        world.executions.dispose()
        assert world.clock.getDelayedCalls() == []
        for stop in self.stops:
            assert len(stop) == 1
            assert stop[0] is None or isinstance(stop[0], (ShutdownTimeout, ExecutionNotFound))


CAUSES = {
    "exited": Cause.EXITED,
    "cancel": Cause.CANCELLED,
    "deadline": Cause.DEADLINE,
    "shutdown": Cause.SHUTDOWN,
}


def first_of(events: tuple[str, ...], names: Any) -> str:
    return next((event for event in events if event in names), "shutdown")


def test_a_running_run_ends_in_the_cause_that_came_first_whatever_follows() -> None:
    for events in itertools.permutations(EVENTS):
        if events.index("closed") < events.index("exited"):
            continue
        for capture_output in (True, False):
            story = Story(2, make_request(capture_output=capture_output))
            story.tell(events)
            story.check_nothing_is_left()
            assert story.finishes == 1, events
            execution = story.world.executions.get(1)
            cause = CAUSES[first_of(events, CAUSES)]
            assert (execution.state, execution.cause) == (State.FINISHED, cause), events
            result = story.world.result(1)
            assert result["cause"] == cause.value
            by_itself = cause is Cause.EXITED
            assert (result["exit_code"] == 0) == (result["signal"] is None) == by_itself, events


def test_a_waiting_run_ends_in_the_cause_that_came_first_whatever_follows() -> None:
    for events in itertools.permutations(("admit", *EVENTS)):
        if events.index("closed") < events.index("exited"):
            continue
        story = Story(0, make_request(is_sync=False))
        story.tell(events)
        story.check_nothing_is_left()
        first = first_of(events, ("admit", "cancel", "shutdown", "disconnect"))
        if first == "disconnect":
            assert isinstance(story.heard[0], CancelledError), events
            assert (story.process, story.finishes) == (None, 0), events
            with pytest.raises(ExecutionNotFound):
                story.world.executions.get(1)
            continue
        assert story.finishes == 1, events
        execution = story.world.executions.get(1)
        assert execution.state is State.FINISHED
        if first == "admit":
            assert isinstance(story.heard[0], Execution)
            assert execution.started_at is not None
            since = tuple(
                event
                for event in events[events.index("admit") :]
                # Whatever says that a process ended comes from one that runs.
                if event in CAUSES
            )
            assert execution.cause is CAUSES[first_of(since, CAUSES)], events
        else:
            error = ExecutionCancelled if first == "cancel" else Draining
            assert isinstance(story.heard[0], error), events
            assert execution.cause is CAUSES[first], events
            assert story.process is None, events
            assert story.world.result(1)["started_at"] is None


@pytest.mark.parametrize("grace", [0, 0.2, 5])
def test_all_that_can_come_at_one_moment_comes_to_one_end(grace: float) -> None:
    # The end of the grace, of the deadline and of the shutdown fall together.
    for order in itertools.permutations(("cancel", "shutdown", "exited")):
        world = World()
        execution, process = world.start(max_execution_minutes=grace / 60 or 0.001)
        results: list[list[Any]] = []
        for event in order:
            if event == "cancel":
                results.append(world.stop(1, grace))
            elif event == "shutdown":
                results.append(outcome(world.executions.close(grace)))
            else:
                world.clock.advance(grace)
                if process.alive:
                    process.end()
        world.clock.advance(100)
        assert [len(result) for result in results] == [1, 1]
        assert execution.state is State.FINISHED
        world.executions.dispose()
        assert world.clock.getDelayedCalls() == []


# --- deadlines ---


@pytest.mark.parametrize(
    ("given", "minutes"), [(20, 20), (0.5, 0.5), (0.001, 0.001), (1440, 1440), (1e9, 1440)]
)
def test_the_deadline_ends_at_its_time_counted_from_the_spawn(given: float, minutes: float) -> None:
    world = World(permits=0)
    (asked) = outcome(world.ask(max_execution_minutes=given))
    world.clock.advance(3600)
    world.gate.resize(1)
    execution, process = asked[0], world.spawner.processes[0]
    world.clock.advance(minutes * 60 - 0.01)
    assert (process.signals, execution.state) == ([], State.RUNNING)
    world.clock.advance(0.02)
    assert (process.signals, execution.state) == (["TERM"], State.STOPPING)
    world.clock.advance(DEADLINE_GRACE_SECONDS)
    assert process.signals == ["TERM", "KILL"]
    process.end()
    result = world.result(1)
    assert (result["cause"], result["signal"], result["exit_code"]) == ("deadline", 9, None)


def test_an_executor_that_tells_its_host_of_the_deadline_is_not_killed() -> None:
    world = World()
    _, process = world.start(max_execution_minutes=1)
    world.clock.advance(60)
    assert process.signals == ["TERM"]
    process.signals.clear()  # it handles the signal
    process.end(0)
    result = world.result(1)
    assert (result["cause"], result["signal"], result["exit_code"]) == ("deadline", None, 0)


def test_the_times_of_a_run_are_known() -> None:
    world = World()
    execution, process = world.start(max_execution_minutes=0.5)
    entry = json.loads(execution.summary_json())
    assert entry == {
        "state": "running",
        "version": "v0.2.3",
        "is_sync": True,
        "started_at": "2025-06-15T15:06:40.000Z",
        "strict_deadline": "2025-06-15T15:07:10.000Z",
        "has_result": False,
        "result": None,
    }
    world.clock.advance(2.5)
    process.end(1)
    entry = json.loads(execution.summary_json())
    assert entry["state"] == "finished"
    assert entry["result"] == {
        "finished_at": int((EPOCH + 2.5) * 1000),
        "exit_code": 1,
        "signal": None,
        "cause": "exited",
        "started_at": "2025-06-15T15:06:40.000Z",
        "version": "v0.2.3",
        "truncated": [],
    }
    result = world.result(1)
    assert result == {**entry["result"], "stdout": "", "stderr": "", "genvm_log": []}


# --- ends ---


def test_permits_are_free_the_moment_the_process_exits() -> None:
    world = World(permits=1)
    _, first = world.start()
    second = outcome(world.ask())
    first.exit()
    assert second[0].id == 2
    assert world.result(1) is None, "its output may still be in the pipes"
    first.write(STDOUT, b"last words")
    world.clock.advance(1)
    assert world.result(1)["stdout"] == "last words"


def test_stopping_asks_then_kills_and_answers_when_all_is_over() -> None:
    world = World()
    execution, process = world.start()
    answer = world.stop(1, 30)
    assert process.signals == ["TERM"]
    world.clock.advance(30)
    assert process.signals == ["TERM", "KILL"]
    assert answer == [], "the process is not reaped yet"
    process.exit()
    assert world.gate.in_use == 0
    assert answer == [], "its result cannot be read yet"
    process.close()
    assert [type(error) for error in answer] == [ShutdownTimeout]
    assert answer[0].message == "timeout during shutdown"
    assert answer[0].genvm_id == 1
    assert (execution.cause, world.result(1)["signal"]) == (Cause.CANCELLED, 9)
    assert world.stop(1) == [None], "it has ended already"


def test_a_run_that_stops_in_time_is_stopped_without_an_error() -> None:
    world = World()
    _, process = world.start()
    answer = world.stop(1, 30)
    world.clock.advance(29)
    process.exit()
    world.clock.advance(1)
    assert answer == [None]
    assert process.signals == ["TERM"]
    result = world.result(1)
    assert (result["cause"], result["signal"]) == ("cancelled", 15)


def test_a_run_that_has_just_exited_by_itself_is_not_cancelled() -> None:
    world = World()
    _, process = world.start()
    process.exit(4)
    answer = world.stop(1, 0)
    assert answer == []
    process.close()
    assert answer == [None]
    result = world.result(1)
    assert (result["cause"], result["exit_code"]) == ("exited", 4)


def test_a_stop_without_grace_kills_at_once() -> None:
    world = World()
    _, process = world.start()
    answer = world.stop(1, 0)
    assert process.signals == ["KILL"]
    process.end()
    assert [type(error) for error in answer] == [ShutdownTimeout]


@pytest.mark.parametrize("in_time", [True, False])
def test_those_who_stop_one_run_at_the_same_time_agree(in_time: bool) -> None:
    world = World()
    _, process = world.start()
    answers = [world.stop(1, 30), world.stop(1, 2), world.stop(1, 10)]
    assert set(process.signals) == {"TERM"}
    world.clock.advance(1)
    if not in_time:
        world.clock.advance(1.5)
        assert "KILL" in process.signals, "the shortest patience counts"
    process.end()
    kinds = {type(answer[0]) for answer in answers}
    assert kinds == ({type(None)} if in_time else {ShutdownTimeout})


def test_a_client_that_leaves_while_it_stops_a_run_changes_nothing() -> None:
    world = World()
    _, process = world.start()
    leaving = ensureDeferred(world.executions.stop(1, 30))
    left = outcome(leaving)
    staying = world.stop(1, 30)
    leaving.cancel()
    assert isinstance(left[0], CancelledError)
    process.end()
    assert staying == [None]


def test_a_process_that_cannot_be_killed_does_not_hold_the_answer_for_ever() -> None:
    world = World()
    execution, process = world.start()
    answer = world.stop(1, 1)
    world.clock.advance(1)
    assert process.signals == ["TERM", "KILL"]
    world.clock.advance(KILL_SECONDS)
    assert [type(error) for error in answer] == [ShutdownTimeout]
    assert (execution.state, world.gate.in_use) == (State.STOPPING, 1)


def test_stopping_a_waiting_run_takes_it_off_the_queue() -> None:
    world = World(permits=1)
    _, process = world.start()
    second, third = outcome(world.ask()), outcome(world.ask())
    assert world.stop(2) == [None]
    assert isinstance(second[0], ExecutionCancelled)
    assert second[0].genvm_id == 2
    result = world.result(2)
    assert (result["cause"], result["exit_code"], result["signal"]) == ("cancelled", None, None)
    process.end()
    assert third[0].id == 3
    assert len(world.spawner.commands) == 2


def test_stopping_what_does_not_exist_is_an_error() -> None:
    world = World()
    (error,) = world.stop(9)
    assert isinstance(error, ExecutionNotFound)
    assert error.genvm_id == 9


def test_waiting_for_a_result_ends_with_the_run_or_with_the_time() -> None:
    world = World()
    execution, process = world.start()
    waits = [outcome(world.executions.wait(execution, seconds)) for seconds in (0, 5, 10, 120)]
    assert [len(wait) for wait in waits] == [1, 0, 0, 0]
    world.clock.advance(5)
    assert [len(wait) for wait in waits] == [1, 1, 0, 0]
    process.end()
    assert [len(wait) for wait in waits] == [1, 1, 1, 1]
    assert len(outcome(world.executions.wait(execution, 5))) == 1
    world.executions.dispose()
    assert world.clock.getDelayedCalls() == []


def test_a_thousand_may_wait_for_one_result_and_leave() -> None:
    world = World()
    execution, process = world.start()
    waits = [world.executions.wait(execution, 120) for _ in range(1000)]
    results = [outcome(wait) for wait in waits]
    for wait in waits[::2]:
        wait.cancel()
    process.end()
    assert [type(result[0]) for result in results] == [CancelledError, bool] * 500


# --- disconnects ---


def test_a_client_that_leaves_while_its_run_waits_leaves_nothing_behind() -> None:
    world = World(permits=1)
    _, process = world.start()
    leaving = world.ask(key="k", is_sync=False)
    left, staying = outcome(leaving), outcome(world.ask())
    leaving.cancel()
    assert isinstance(left[0], CancelledError)
    assert world.waiting() == [3]
    with pytest.raises(ExecutionNotFound):
        world.executions.get(2)
    process.end()
    assert staying[0].id == 3
    world.spawner.processes[-1].end()
    assert world.start(key="k", host="other:1")[0].id == 4, "the key is free again"


def test_a_client_that_leaves_when_its_run_has_started_changes_nothing() -> None:
    world = World()
    asked = world.ask()
    asked.cancel()
    assert world.executions.get(1).state is State.RUNNING


# --- idempotency ---


def test_a_retry_with_the_same_key_gets_the_same_run() -> None:
    world = World(permits=4)
    execution, process = world.start(key="k")
    assert outcome(world.ask(key="k")) == [execution]
    process.end()
    assert outcome(world.ask(key="k")) == [execution], "for as long as it is retained"
    assert len(world.spawner.commands) == 1
    assert world.start(key="other")[0] is not execution
    assert world.start()[0] is not world.start()[0]


def test_a_key_with_another_request_is_refused() -> None:
    world = World()
    world.start(key="k")
    error = refused(world.ask(key="k", host="elsewhere:1"))
    assert isinstance(error, InvalidRequest)
    assert error.genvm_id == 1
    assert len(world.spawner.commands) == 1


def test_all_who_ask_with_one_key_while_it_waits_get_the_same_run() -> None:
    world = World(permits=0)
    asked = [world.ask(key="k") for _ in range(3)]
    results = [outcome(one) for one in asked]
    asked[0].cancel()
    assert isinstance(results[0][0], CancelledError)
    assert world.waiting() == [1], "somebody still wants it"
    world.gate.resize(2)
    assert [result[0].id for result in results[1:]] == [1, 1]
    assert len(world.spawner.commands) == 1


def test_when_all_who_asked_with_one_key_leave_the_run_is_removed() -> None:
    world = World(permits=0)
    asked = [world.ask(key="k") for _ in range(3)]
    results = [outcome(one) for one in asked]
    for one in asked:
        one.cancel()
    assert [type(result[0]) for result in results] == [CancelledError] * 3
    assert (world.gate.queue_length, list(world.executions.listed())) == (0, [])


def test_a_key_whose_run_failed_to_start_can_be_tried_again() -> None:
    world = World()
    world.spawner.problem = "not found"
    assert isinstance(refused(world.ask(key="k")), SpawnFailed)
    world.spawner.problem = None
    assert world.start(key="k")[0].id == 2


def test_a_known_key_is_answered_while_draining_and_when_the_queue_is_full() -> None:
    world = World(permits=1, queue_limit=0)
    execution, _ = world.start(key="k")
    world.executions.draining = True
    assert outcome(world.ask(key="k")) == [execution]


def test_a_key_is_forgotten_with_its_run() -> None:
    world = World(execution_retention=10.0)
    _, process = world.start(key="k")
    process.end()
    world.clock.advance(10)
    assert world.start(key="k")[0].id == 2


# --- the queue, draining, shutdown ---


def test_the_queue_is_bounded() -> None:
    world = World(permits=1, queue_limit=2)
    world.start()
    waiting = [world.ask(), world.ask()]
    for asked in waiting:
        asked.addErrback(lambda failure: failure.trap(CancelledError))
    for _ in range(3):
        error = refused(world.ask())
        assert isinstance(error, QueueFull)
        assert error.retryable
    assert (world.gate.queue_length, len(list(world.executions.listed()))) == (2, 3)
    waiting[0].cancel()
    assert outcome(world.ask()) == []
    assert world.gate.queue_length == 2
    assert isinstance(refused(world.ask()), QueueFull)


def test_who_waits_for_so_long_leaves_the_queue() -> None:
    world = World(permits=0)
    heavy = outcome(world.ask(wait=5.0, is_sync=False))
    light = outcome(world.ask(wait=7.0, is_sync=True))
    patient = outcome(world.ask())
    world.clock.advance(4.9)
    assert (heavy, light, patient) == ([], [], [])
    world.clock.advance(0.1)
    (error,) = heavy
    assert isinstance(error, NoPermit)
    assert error.retryable
    assert world.waiting() == [3, 2]
    with pytest.raises(ExecutionNotFound):
        world.executions.get(1)
    world.gate.resize(1)
    world.clock.advance(10)
    assert len(light) == 1
    assert light[0].id == 2, "it had its permit in time, and runs on"
    world.spawner.processes[0].end()
    world.clock.advance(0)
    assert patient[0].id == 3
    assert len(world.spawner.processes) == 2


def test_a_start_that_takes_long_is_not_given_up() -> None:
    world = World(permits=0)
    asked = [outcome(world.ask(wait=5.0, is_sync=True)) for _ in range(2)]
    world.clock.advance(5.0 - 1e-6)
    world.gate.resize(2)  # both have their permits now; the second starts in a turn of its own
    assert [len(one) for one in asked] == [1, 0]
    world.clock.advance(10)
    assert [one[0].id for one in asked] == [1, 2]
    assert world.gate.in_use == len(world.spawner.processes) == 2


@pytest.mark.parametrize("permit_first", [True, False])
def test_a_permit_in_the_moment_in_which_the_time_is_over(permit_first: bool) -> None:
    world = World(permits=0)
    if permit_first:
        world.clock.callLater(5.0, world.gate.resize, 1)
    asked = outcome(world.ask(wait=5.0))
    if not permit_first:
        world.clock.callLater(5.0, world.gate.resize, 1)
    world.clock.advance(5.0)
    world.clock.advance(0)
    (found,) = asked
    assert isinstance(found, NoPermit) != permit_first
    assert (len(world.spawner.processes), world.gate.in_use) == (permit_first, permit_first)
    assert world.waiting() == []


def test_with_a_key_each_client_waits_for_its_own_time() -> None:
    world = World(permits=0)
    first, second, third = (outcome(world.ask(key="k", wait=s)) for s in (1.0, 9.0, 3.0))
    world.clock.advance(3.0)
    assert [type(found) for found in (*first, *third)] == [NoPermit, NoPermit]
    assert all("still waits" in found.message for found in (*first, *third)), "it may start yet"
    assert (second, world.waiting()) == ([], [1])
    world.clock.advance(6.0)
    assert [type(found) for found in second] == [NoPermit]
    assert "nothing was started" in second[0].message
    assert world.waiting() == []
    world.gate.resize(1)
    execution, _ = world.start(key="k", wait=0.0)
    assert execution.id == 2, "the key is free again"
    assert outcome(world.ask(key="k", wait=0.0)) == [execution], "who asks again need not wait"


@pytest.mark.parametrize("way", ["disconnect", "cancel", "shutdown"])
def test_nothing_is_left_of_the_time_of_one_that_ended_otherwise(way: str) -> None:
    world = World(permits=0)
    asked = world.ask(wait=5.0)
    heard = outcome(asked)
    if way == "disconnect":
        asked.cancel()
    elif way == "cancel":
        world.stop(1)
    else:
        world.executions.close(0.0)
    (error,) = heard
    assert not isinstance(error, NoPermit)
    assert not any(cast(Any, call).getTime() == 5.0 for call in world.clock.getDelayedCalls())


def test_memory_of_what_leaves_the_queue_goes_back_to_the_system(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trimmed: list[float] = []
    world = World(permits=0)
    monkeypatch.setattr(
        genvm_manager, "give_back_memory", lambda: trimmed.append(world.clock.seconds())
    )
    outcome(world.ask(wait=1.0, message=msgspec.Raw(b'{"v": "%s"}' % (b"x" * 100_000))))
    world.clock.advance(1.0)
    assert (world.waiting(), trimmed) == ([], [])
    world.clock.advance(TRIM_LITTLE_SECONDS)
    assert trimmed == [1.0 + TRIM_LITTLE_SECONDS]


def test_without_a_queue_runs_start_while_there_are_permits() -> None:
    world = World(permits=2, queue_limit=0)
    world.start()
    world.start()
    assert isinstance(refused(world.ask()), QueueFull)


def test_draining_refuses_new_runs_and_finishes_old_ones() -> None:
    world = World(permits=1)
    _, process = world.start()
    waiting = outcome(world.ask())
    world.executions.draining = True
    error = refused(world.ask())
    assert isinstance(error, Draining)
    assert error.retryable
    process.end()
    assert waiting[0].id == 2, "what was accepted is run"
    world.executions.draining = False
    world.gate.resize(2)
    assert world.start()[0].id == 3


def test_shutdown_ends_everything_in_order() -> None:
    world = World(permits=2)
    (_, obedient), (_, stubborn) = world.start(), world.start()
    waiting = [outcome(world.ask()) for _ in range(3)]
    closed = outcome(world.executions.close(0.7))
    assert [type(result[0]) for result in waiting] == [Draining] * 3
    assert (obedient.signals, stubborn.signals) == (["TERM"], ["TERM"])
    assert isinstance(refused(world.ask()), Draining)
    obedient.end()
    assert len(world.spawner.processes) == 2, "free permits admit nobody any more"
    world.clock.advance(0.7)
    assert stubborn.signals == ["TERM", "KILL"]
    assert closed == []
    stubborn.exit()
    assert closed == []
    world.clock.advance(0.6)
    assert closed == [None]
    assert [world.result(n)["cause"] for n in range(1, 6)] == ["shutdown"] * 5
    assert [world.result(n)["signal"] for n in (1, 2)] == [15, 9]
    assert outcome(world.executions.close(0.7)) == [None]
    world.executions.dispose()
    assert world.clock.getDelayedCalls() == []


def test_shutdown_with_nothing_to_do_is_over_at_once() -> None:
    world = World()
    assert outcome(world.executions.close(1)) == [None]
    world = World()
    world.start()[1].end()
    assert outcome(world.executions.close(1)) == [None]


# --- retention ---


def test_results_can_be_read_again_until_their_retention_ends() -> None:
    world = World(execution_retention=300.0)
    _, process = world.start()
    process.write(STDOUT, b"out")
    process.end()
    first = world.result(1)
    world.clock.advance(200)
    world.start()[1].end()
    assert world.result(1) == first
    world.clock.advance(99.9)
    assert world.result(1) == first
    world.clock.advance(0.2)
    with pytest.raises(ExecutionNotFound) as caught:
        world.executions.get(1)
    assert caught.value.genvm_id == 1
    assert world.result(2)["cause"] == "exited"
    world.clock.advance(200)
    with pytest.raises(ExecutionNotFound):
        world.executions.get(2)
    world.clock.advance(TRIM_LITTLE_SECONDS)
    assert world.clock.getDelayedCalls() == []


def test_a_run_is_kept_while_it_runs_however_long() -> None:
    world = World(execution_retention=1.0)
    _, process = world.start(max_execution_minutes=1440)
    world.start()[1].end()
    world.clock.advance(86_000)
    assert [e.id for e in world.executions.listed()] == [1]
    process.end()
    assert world.result(1)["exit_code"] == 0


def test_the_oldest_results_are_dropped_when_their_output_is_too_large() -> None:
    world = World(permits=9, retention_max_bytes=4 * MIB)
    for _ in range(5):
        _, process = world.start()
        process.write(STDOUT, b"x" * MIB)
        process.end()
    assert [e.id for e in world.executions.listed()] == [5, 4, 3]
    world.clock.advance(301)
    assert list(world.executions.listed()) == []
    for number in range(3):
        _, process = world.start()
        process.write(STDERR, b"x" * MIB)
        process.write(LOG, json.dumps({"level": "info", "n": number}).encode() + b"\n")
        process.end()
    assert [e.id for e in world.executions.listed()] == [8, 7, 6], "what was dropped is forgotten"


def test_the_newest_result_is_kept_however_large() -> None:
    world = World(retention_max_bytes=1000)
    _, process = world.start()
    process.write(STDOUT, b"x" * MIB)
    process.end()
    assert len(world.result(1)["stdout"]) == MIB
    world.start()[1].end()
    assert [e.id for e in world.executions.listed()] == [2]


def test_results_without_output_are_bounded_too() -> None:
    world = World(retention_max_bytes=100_000)
    for _ in range(200):
        world.start(capture_output=False)[1].end()
    assert 1 <= len(list(world.executions.listed())) < 100


def test_the_list_is_newest_first_and_bounded() -> None:
    world = World(permits=3)
    world.start()
    for _ in range(LISTED_FINISHED + 50):
        world.start(capture_output=False)[1].end()
    last = LISTED_FINISHED + 52
    world.start()
    ids = [e.id for e in world.executions.listed()]
    assert ids == [last, 1, *range(last - 1, last - 1 - LISTED_FINISHED, -1)]


# --- pacing ---


def take_turn(clock: Clock) -> None:
    """Run what is due now, but, as a reactor does, not what that schedules."""
    for call in [call for call in clock.calls if call.getTime() <= clock.seconds()]:
        work = functools.partial(call.func, *call.args, **call.kw)
        call.cancel()
        work()


def test_many_starts_leave_the_reactor_time_in_between() -> None:
    world = World(permits=100)
    asked = [outcome(world.ask_at_once()) for _ in range(50)]
    for started in range(1, 51):
        assert len(world.spawner.processes) == started
        take_turn(world.clock)
    assert [result[0].id for result in asked] == list(range(1, 51)), "in order"
    assert world.gate.in_use == 50
    assert len(world.clock.getDelayedCalls()) == 50, "only the deadlines are left"


@pytest.mark.parametrize("event", ["cancel", "disconnect", "shutdown"])
def test_a_run_that_has_permits_but_no_process_yet_can_end(event: str) -> None:
    world = World(permits=100)
    clients = [world.ask_at_once() for _ in range(5)]
    results = [outcome(client) for client in clients]
    take_turn(world.clock)
    assert [len(result) for result in results] == [1, 1, 0, 0, 0]
    assert world.gate.in_use == 5
    closed: list[Any] = []
    if event == "cancel":
        assert world.stop(4) == [None]
        assert isinstance(results[3][0], ExecutionCancelled)
    elif event == "disconnect":
        clients[3].cancel()
        assert isinstance(results[3][0], CancelledError)
    else:
        closed = outcome(world.executions.close(0.7))
        assert [type(result[0]) for result in results[2:]] == [Draining] * 3
    assert world.gate.in_use == (2 if event == "shutdown" else 4)
    world.clock.pump([0] * 5)
    for process in world.spawner.processes:
        process.end()
    assert world.gate.in_use == 0
    if event == "shutdown":
        assert len(world.spawner.processes) == 2
        assert closed == [None]
    else:
        assert [command[-1] for command in world.spawner.commands] == [
            f"--cookie={n}" for n in (1, 2, 3, 5)
        ]
    world.executions.dispose()
    assert world.clock.getDelayedCalls() == []


# --- captured output ---


def captured(capture: Capture) -> dict[str, Any]:
    """Return what a capture adds to a result."""
    data: dict[str, Any] = json.loads(b"{" + b"".join(capture.json_pieces()) + b"}")
    return data


@given(
    st.lists(
        st.sampled_from(
            [
                "é".encode(),
                "€".encode(),
                "😀".encode(),
                b"a",
                b'"\\\n',
                b"\x80",
                b"\xf0\x9f",
                b"\xff",
            ]
        )
    ).map(b"".join),
    st.integers(min_value=0, max_value=20),
    st.integers(min_value=1, max_value=7),
)
@example("😀😀".encode(), 7, 3)
def test_output_is_the_last_bytes_as_text(data: bytes, limit: int, step: int) -> None:
    capture = Capture(limit)
    for at in range(0, len(data), step):
        capture.add(STDOUT, data[at : at + step])
    capture.end()
    tail = data[max(0, len(data) - limit) :]
    if len(data) > limit:
        # A character that was cut at its start is left out, not shown as garbage.
        for _ in range(3):
            if tail[:1] and tail[0] & 0xC0 == 0x80:
                tail = tail[1:]
    result = captured(capture)
    assert result["stdout"] == tail.decode("utf-8", "replace")
    assert result["stderr"] == ""
    assert capture.truncated == (["stdout"] if len(data) > limit else [])


@pytest.mark.parametrize("text", ["é", "€", "😀", "a€"])
@pytest.mark.parametrize("shift", range(4))
def test_characters_across_pieces_of_a_large_result_are_whole(text: str, shift: int) -> None:
    data = (b"x" * shift + (text * 60_000).encode())[: 2 * MIB]
    capture = Capture(4 * MIB)
    capture.add(STDERR, data)
    capture.end()
    assert captured(capture)["stderr"] == data.decode()
    assert capture.truncated == []
    assert max(map(len, capture.json_pieces())) < MIB, "the reactor gets its turns"


def test_a_character_that_is_cut_at_the_end_is_replaced() -> None:
    capture = Capture(100)
    capture.add(STDOUT, "ab😀".encode()[:-1])
    capture.end()
    assert captured(capture)["stdout"] == "ab\ufffd"


def test_the_ends_of_four_mebibytes_are_kept() -> None:
    world = World(capture_max_bytes=4 * MIB)
    _, process = world.start()
    for number in range(100):
        process.write(STDOUT, b"%03d" % number + b"x" * 99_997)
    process.write(STDERR, b"short")
    process.end()
    result = world.result(1)
    assert len(result["stdout"]) == 4 * MIB
    assert result["stdout"].endswith("099" + "x" * 99_997)
    assert (result["stderr"], result["truncated"]) == ("short", ["stdout"])


def test_without_capture_the_log_goes_to_ours_and_the_result_is_empty() -> None:
    world = World()
    events: list[dict[str, Any]] = []
    with observing(events.append):
        _, process = world.start(capture_output=False)
        process.write(LOG, b'{"level": "warn", "message": "m", "x": 1}\nlast')
        process.end()
    forwarded = [event for event in events if "level_name" in event]
    assert [(event["level_name"], event["text"]) for event in forwarded] == [
        ("warn", "m"),
        ("info", "genvm log"),
    ]
    assert [event["genvm_id"] for event in forwarded] == [1, 1]
    result = world.result(1)
    assert (result["stdout"], result["stderr"], result["genvm_log"]) == ("", "", [])
    assert result["truncated"] == []


# --- log records ---


def records_of(data: bytes, step: int = 1 << 16) -> tuple[list[Any], Sequence[str]]:
    capture = Capture(1000)
    for at in range(0, len(data), step):
        capture.add(LOG, data[at : at + step])
    capture.end()
    return captured(capture)["genvm_log"], capture.truncated


OTHER_LINES = [
    *("plain", "[1]", "null", '"text"', '{"level": "info"', '{"level": "info", "n": NaN}'),
    *('{"level": "info", "n": [-Infinity]}', "\ufeff{}", "{'level': 1}", "\x00"),
]


@pytest.mark.parametrize(
    ("line", "record"),
    [
        (b'{"level": "warn", "n": [1]}', {"level": "warn", "n": [1]}),
        (b'{"message": "m"}', {"level": "info", "message": "m"}),
        (b'{"level": "info"}\r', {"level": "info"}),
        (b"{}", {"level": "info"}),
        (b"\xff\xfe", {"level": "info", "message": "genvm log", "line": "\ufffd\ufffd"}),
        *(
            (line.encode(), {"level": "info", "message": "genvm log", "line": line})
            for line in OTHER_LINES
        ),
    ],
)
@pytest.mark.parametrize("newline", [b"\n", b""])
def test_each_line_is_a_record(line: bytes, record: object, newline: bytes) -> None:
    assert records_of(b"\n \n" + line + newline, step=3) == ([record], [])


def test_a_line_that_is_nested_without_end_is_a_record() -> None:
    line = b'{"level":' + b"[" * 100_000
    ((record,), truncated) = records_of(line + b"\n")
    assert (record["message"], truncated) == ("genvm log", [])


@pytest.mark.parametrize(("members", "is_read"), [(50_000, True), (50_001, False)])
def test_a_line_of_more_values_than_are_read_is_kept_as_text(members: int, is_read: bool) -> None:
    """Reading six megabytes of them would hold the reactor for half a second."""
    line = b'{"level":"warn","n":[%s]}' % b",".join([b"{}"] * members)
    ((record,), truncated) = records_of(line + b"\n")
    assert truncated == []
    if is_read:
        assert (record["level"], len(record["n"])) == ("warn", members)
    else:
        assert record == {"level": "info", "message": "genvm log", "line": line.decode()}


@given(st.lists(st.binary(max_size=30)))
@example([b'{"level": 1e999}'])
@example([b'{"level": "a", "level": "b"}'])
@example([b'{"level": "\\ud800"}'])
@example([b'\xef\xbb\xbf{"level": "a"}'])
def test_any_bytes_make_a_result_that_is_json(lines: list[bytes]) -> None:
    records, _ = records_of(b"\n".join(lines))
    assert all(isinstance(record, dict) and "level" in record for record in records)


def test_the_last_ten_thousand_records_are_kept() -> None:
    count = LOG_MAX_RECORDS + 5
    records, truncated = records_of(
        b"".join(b'{"level": "info", "n": %d}\n' % number for number in range(count))
    )
    assert [record["n"] for record in records] == list(range(5, count))
    assert truncated == ["genvm_log"]
    records, truncated = records_of(b'{"level": "info"}\n' * LOG_MAX_RECORDS)
    assert (len(records), truncated) == (LOG_MAX_RECORDS, [])


def test_the_last_sixteen_mebibytes_of_records_are_kept() -> None:
    line = b'{"level": "info", "x": "%s"}\n' % (b"x" * MIB)
    records, truncated = records_of(line * 20)
    assert (len(records), truncated) == (15, ["genvm_log"])


def test_a_very_long_record_is_kept_whole() -> None:
    line = b'{"level": "info", "x": "%s"}' % (b"x" * (LOG_LINE_MAX_BYTES - 100))
    records, truncated = records_of(line)
    assert (records, truncated) == ([json.loads(line)], [])


def test_a_longer_line_keeps_its_head() -> None:
    records, truncated = records_of(
        b'{"level": "info", "x": "' + b"x" * LOG_LINE_MAX_BYTES + b'"}\n{"level": "warn"}'
    )
    assert truncated == ["genvm_log"]
    assert [record["level"] for record in records] == ["info", "warn"]
    assert len(records[0]["line"]) == LOG_LINE_MAX_BYTES


@pytest.mark.parametrize(
    ("filling", "is_cut"), [(b"\xff", True), (b"\x01", True), (b'"', False), ("é".encode(), False)]
)
def test_the_bound_holds_for_what_grows_when_it_becomes_json(filling: bytes, is_cut: bool) -> None:
    records = LogRecords()
    records.add((filling * LOG_LINE_MAX_BYTES)[:LOG_LINE_MAX_BYTES], False)
    kept = b"".join(records.json_pieces())
    line = json.loads(kept)[0]["line"]
    assert records.size <= LOG_MAX_BYTES
    assert len(kept) <= LOG_MAX_BYTES + 2
    assert records.truncated is is_cut
    assert is_cut or len(line.encode()) == LOG_LINE_MAX_BYTES, "what fits is kept whole"


def read_all(records: LogRecords) -> list[bytes]:
    """Return all records that are kept, read one after the other."""
    found, at = list[bytes](), records.start
    while record := records.read(at):
        found.append(record)
        at += len(record) + 1
    return found


RECORD = b'{"level": "info", "message": "a message"}'
#: Two records that stand on two lines, and one of them on both.
ASTRIDE = b'{"level": 1}{"level": 2, "x": [{}', b"{}]}"


@given(
    st.lists(
        st.sampled_from(
            (
                *(RECORD, *ASTRIDE, RECORD * 2, b" " + RECORD, RECORD + b"\r", b"", b"text", b"{}"),
                *(b'{"level": 1, "x": {', b"}, {", b'"x": 1}}', b'["level"]', b'{"level": "\xff"}'),
                *(b'{"level": %s}' % (b"1" * 5000), b'{"level": [%s1]}' % (b"1," * 60_000)),
            )
        )
    )
)
@example([*ASTRIDE])
@example([RECORD, *ASTRIDE, RECORD])
def test_lines_that_come_together_are_kept_as_those_that_come_alone(lines: list[bytes]) -> None:
    alone, together = Capture(10), Capture(10)
    for line in lines:
        alone.add(LOG, line)
        alone.add(LOG, b"\n")
    together.add(LOG, b"".join(line + b"\n" for line in lines))
    for capture in (alone, together):
        capture.end()
    assert captured(together) == captured(alone)
    assert together.kept == alone.kept
    assert together.truncated == alone.truncated


@pytest.mark.parametrize(
    ("lines", "are_taken"),
    [
        ((RECORD,) * 3, True),
        (('{"level": "é"}'.encode(),) * 2, True),
        (ASTRIDE, False),
        ((RECORD, b"{}"), False),
        ((RECORD, b'{"level": "\xff"}'), False),
        ((RECORD, b"", RECORD), False),
    ],
)
def test_records_are_taken_together(lines: tuple[bytes, ...], are_taken: bool) -> None:
    records = LogRecords()
    assert records.add_together(b"\n".join(lines)) is are_taken
    kept = lines if are_taken else ()
    assert b"".join(records.json_pieces()) == b"[" + b",".join(kept) + b"]"
    assert read_all(records) == [*kept]


def test_the_oldest_of_records_that_came_together_are_forgotten() -> None:
    records, model = LogRecords(), deque[bytes](maxlen=LOG_MAX_RECORDS)
    for number in range(LOG_MAX_RECORDS // 30):
        lines = [b'{"level": "%s"}' % (b"x" * ((number + n) % 50)) for n in range(1 + number % 67)]
        model.extend(lines)
        assert records.add_together(b"\n".join(lines))
        assert records.size == sum(map(len, model))
    assert records.first > 0 and records.truncated
    assert read_all(records) == [*model]
    assert b"".join(records.json_pieces()) == b"[" + b",".join(model) + b"]"


@pytest.mark.parametrize("sizes", [(20, 60), (3_000, 40_000), (1, 2 * PIECE_BYTES)])
def test_records_are_what_the_last_lines_were(sizes: tuple[int, int]) -> None:
    rng = random.Random(3)
    records, model, size, seen = LogRecords(), deque[bytes](), 0, 0
    for number in range(LOG_MAX_RECORDS + 2_000):
        line = b'{"level":"info","n":"%s"}' % (b"%07d" % number * (rng.randint(*sizes) // 7))
        records.add(line, False)
        model.append(line)
        seen, size = seen + len(line), size + len(line)
        while len(model) > LOG_MAX_RECORDS or size > LOG_MAX_BYTES:
            size -= len(model.popleft())
        if number % 2999 == 7 or number == LOG_MAX_RECORDS:
            assert read_all(records) == [*model]
            assert records.start == records.first + records.dropped
            assert records.read(records.start + size + len(model) + 7) == b""
            assert b"".join(records.json_pieces()) == b"[" + b",".join(model) + b"]"
            assert records.size == size == seen - records.dropped
            assert sys.getsizeof(records._kept_lines) <= 1.2 * size + 3 * PIECE_BYTES
    assert records.first + len(model) == LOG_MAX_RECORDS + 2_000
    assert records.truncated


def test_many_small_records_are_few_objects() -> None:
    def blocks() -> int:
        gc.collect()
        return sys.getallocatedblocks()

    records, before = LogRecords(), blocks()
    for _ in range(LOG_MAX_RECORDS):
        records.add(b'{"level":"info","message":"some words about what happens"}', False)
    assert blocks() - before < 200, "what lies between many small objects is not given back"


def test_times_of_a_result_are_milliseconds_since_the_epoch() -> None:
    world = World()
    world.start()[1].end()
    finished = datetime.fromtimestamp(world.result(1)["finished_at"] / 1000, UTC)
    assert finished == datetime(2025, 6, 15, 15, 6, 40, tzinfo=UTC)


def test_the_listing_is_made_again_whenever_something_has_changed() -> None:
    world = World(permits=2)

    def listing() -> dict[str, Any]:
        found = json.loads(world.executions.listing())
        assert world.executions.listing() is world.executions.listing(), "made once"
        fresh = {str(e.id): json.loads(e.summary_json()) for e in world.executions.listed()}
        assert found == fresh
        assert [*found] == [*fresh]
        return {key: entry["state"] for key, entry in found.items()}

    assert listing() == {}
    _, first = world.start()
    assert listing() == {"1": "running"}
    world.start()
    assert listing() == {"2": "running", "1": "running"}
    asked = world.ask()
    asked.addErrback(lambda _: None)
    assert listing() == {"3": "waiting", "2": "running", "1": "running"}
    asked.cancel()
    assert listing() == {"2": "running", "1": "running"}
    world.stop(2)
    assert listing() == {"2": "stopping", "1": "running"}
    first.exit()
    assert listing() == {"2": "stopping", "1": "exited"}
    first.close()
    assert listing() == {"2": "stopping", "1": "finished"}
    world.executions.note_reading(world.executions.get(1))
    assert listing() == {"2": "stopping"}
    world.spawner.processes[-1].end()
    assert listing() == {"2": "finished"}
    world.clock.advance(world.config.execution_retention)
    assert listing() == {}


def test_what_is_finished_is_kept_in_few_objects() -> None:
    """Each that the collector of garbage finds in use costs time in every one of its looks."""
    world = World()
    execution, process = world.start(message=msgspec.Raw(b'{"v": "%s"}' % (b"x" * 1000)))
    process.write(STDOUT, b"said")
    process.end()
    del process, world.spawner.processes[:]
    gc.collect()
    found, new = set[int](), [execution]
    while new:
        found.update(map(id, new))
        new = [
            each
            for each in gc.get_referents(*new)
            if gc.is_tracked(each)
            and not isinstance(each, type | enum.Enum | Event)
            and id(each) not in found
        ]
    assert len(found) <= 12
