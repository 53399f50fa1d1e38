"""What the manager tells of itself: events in order, and figures that add up."""

from __future__ import annotations

import json
from typing import Any, cast

import msgspec
import pytest

from genvm_manager import (
    EVENTS_KEPT,
    PIECE_BYTES,
    Config,
    DrainEvent,
    EventFeed,
    FeedReader,
    Happening,
    LogObserver,
    ManagerEvent,
    Metrics,
    Module,
    ModuleState,
    OutputReader,
    PermitsEvent,
    Spawner,
    Variables,
    __version__,
)

from .test_executions import LOG, MINUTE, STDERR, STDOUT, World


def feed() -> EventFeed:
    return EventFeed("0123456789abcdef", now=lambda: 0.0)


def named(kind: str) -> type[Happening]:
    """Return the class of events of a kind."""
    return cast(
        type[Happening],
        msgspec.defstruct(
            kind, [], bases=(Happening,), namespace={"kind": kind}, frozen=True, kw_only=True
        ),
    )


def plain(event: ManagerEvent) -> Any:
    """Return the data of an event as a client reads it."""
    return json.loads(event.text.partition(b"data: ")[2])


# --- events ---


def test_events_are_numbered_and_reach_every_follower() -> None:
    events = feed()
    seen: list[ManagerEvent] = []
    events.followers[seen.append] = None
    events.tell(DrainEvent, draining=True)
    events.tell(PermitsEvent, permits=3)
    kinds = {event.id: event.told.kind for event in seen}
    assert kinds == {"01234567-1": "drain", "01234567-2": "permits"}
    assert plain(seen[1]) == {"time": "1970-01-01T00:00:00.000Z", "permits": 3}
    assert seen[1].text.startswith(b"id: 01234567-2\nevent: permits\ndata: {")


def test_a_follower_may_leave_while_an_event_is_told() -> None:
    events = feed()
    seen: list[str] = []

    def once(event: ManagerEvent) -> None:
        seen.append(event.told.kind)
        del events.followers[once]

    events.followers[once] = None
    events.followers[lambda event: seen.append("other")] = None
    events.tell(named("a"))
    events.tell(named("b"))
    assert seen == ["a", "other", "other"]


def read(reader: FeedReader) -> list[tuple[str, str]]:
    """Return kind and id of the events that there are."""
    found = []
    while (event := reader.next()) is not None:
        lines = dict(line.split(": ", 1) for line in event.decode().splitlines() if line)
        found.append((lines["event"], lines.get("id", "")))
    return found


def test_who_comes_back_gets_what_it_has_missed() -> None:
    events = feed()
    for kind in "abc":
        events.tell(named(kind))
    reader = FeedReader(events, "01234567-1")
    assert read(reader) == [("b", "01234567-2"), ("c", "01234567-3")]
    events.tell(named("d"))
    assert read(reader) == [("d", "01234567-4")]
    assert read(FeedReader(events, "01234567-4")) == []
    assert read(FeedReader(events, None)) == []


@pytest.mark.parametrize(
    "last", ["", "7", "01234567-", "01234567-x", "76543210-1", "01234567-4", f"01234567-{'9' * 30}"]
)
def test_who_names_what_is_not_kept_is_told_so(last: str) -> None:
    events = feed()
    for kind in "abc":
        events.tell(named(kind))
    assert [kind for kind, _ in read(FeedReader(events, last))] == ["missed", "a", "b", "c"]


def test_the_oldest_events_go() -> None:
    events = feed()
    late = FeedReader(events, None)
    for _ in range(EVENTS_KEPT + 5):
        events.tell(named("e"))
    found = read(FeedReader(events, "01234567-5"))
    assert (found[0], len(found)) == (("e", "01234567-6"), EVENTS_KEPT)
    found = read(FeedReader(events, "01234567-4"))
    assert (found[:2], len(found)) == ([("missed", ""), ("e", "01234567-6")], EVENTS_KEPT + 1)
    assert read(late) == found, "who reads too slowly is told, too"


def world_with_events(**settings: Any) -> tuple[World, list[ManagerEvent]]:
    events = feed()
    seen: list[ManagerEvent] = []
    events.followers[seen.append] = None
    return World(**settings, tell=events.tell), seen


def test_the_life_of_an_execution() -> None:
    world, seen = world_with_events(permits=1)
    _, process = world.start()
    world.ask()
    world.clock.advance(2)
    process.write(STDOUT, b"out")
    process.end()
    kinds = [(event.told.kind, plain(event)["genvm_id"]) for event in seen]
    assert kinds == [("started", 1), ("queued", 2), ("started", 2), ("finished", 1)]
    assert plain(seen[2])["waited_ms"] == 2000
    assert plain(seen[3]) == {
        "time": "1970-01-01T00:00:00.000Z",
        "genvm_id": 1,
        "version": "v0.2.3",
        "cause": "exited",
        "exit_code": 0,
        "signal": None,
        "ran_ms": 2000,
        "captured_bytes": 3,
        "dropped_bytes": 0,
    }


def test_an_executor_that_cannot_be_started() -> None:
    world, seen = world_with_events()
    world.spawner.problem = "not found"
    world.ask().addErrback(lambda failure: None)
    assert [(event.told.kind, plain(event)["code"]) for event in seen] == [
        ("failed", "spawn_failed")
    ]


def test_text_is_whole_whatever_is_cut() -> None:
    """A character that is cut is one replacement, and nothing is told without a text."""
    world = World(capture_max_bytes=4)
    execution, process = world.start()
    reader = OutputReader(execution)
    process.write(STDOUT, b"ab\xc3")
    assert reader.next() == ("stdout", b'{"text":"ab"}')
    process.write(STDOUT, b"\xa4")
    assert reader.next() == ("stdout", '{"text":"ä"}'.encode())
    process.write(STDOUT, b"\xc3")
    assert reader.next() is None
    process.write(STDOUT, b"12345")
    assert reader.next() == ("missed", b'{"stream":"stdout","bytes":1}')
    assert reader.next() == ("stdout", b'{"text":"2345"}')
    process.write(STDOUT, b"\xe2\x82")
    assert reader.next() is None
    process.end()
    assert reader.next() == ("stdout", '{"text":"\ufffd"}'.encode())
    assert (reader.next() or ("",))[0] == "finished"
    assert reader.next() is None


def test_a_character_that_begins_at_the_end_of_what_is_kept_together() -> None:
    """What follows it is told, too, although the piece before it has no text of its own."""
    world = World()
    execution, process = world.start()
    reader = OutputReader(execution)
    process.write(STDOUT, b"\xc3")
    process.write(STDOUT, b"\xa4" + b"x" * (PIECE_BYTES - 1))
    process.end()
    assert reader.next() == ("stdout", '{"text":"ä%s"}'.encode() % (b"x" * (PIECE_BYTES - 1)))
    assert (reader.next() or ("",))[0] == "finished"


# --- metrics ---


class Figures:
    """The metrics of a world."""

    def __init__(self, **settings: Any) -> None:
        events = feed()
        self.world = World(**settings, tell=events.tell)
        self.observer = LogObserver(Config(), write=lambda line: None)
        config, spawner = self.world.config, cast(Spawner, self.world.spawner)
        variables = Variables(config.root / "config")
        self.modules = {
            kind: Module(kind, config, self.world.clock, spawner, variables, self.observer)
            for kind in ("llm", "web")
        }
        self.metrics = Metrics(
            self.world.clock, self.observer, self.world.gate, self.world.executions, self.modules
        )
        events.followers[self.metrics.note_event] = None

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


def test_figures_of_executions() -> None:
    figures = Figures(permits=1, capture_max_bytes=10)
    about = {"version": __version__, "instance": "0"}
    assert figures.value("genvm_manager_info", **about) == 1
    _, process = figures.world.start()
    figures.world.ask()
    assert figures.value("genvm_permits") == figures.value("genvm_permits_in_use") == 1
    assert figures.value("genvm_queue_length") == 1
    assert figures.value("genvm_executions", state="running") == 1
    assert figures.value("genvm_executions", state="waiting") == 1
    figures.world.clock.advance(3)
    process.write(STDOUT, b"x" * 15)
    process.write(STDERR, b"y" * 10)
    process.write(LOG, b'{"level": "info"}\n')
    process.end()
    ended = {"cause": "exited", "version": "v0.2.3"}
    assert figures.value("genvm_executions_finished_total", **ended) == 1
    assert figures.value("genvm_captured_bytes_total") == 10 + 10 + 17
    assert figures.value("genvm_dropped_bytes_total") == 5
    assert figures.value("genvm_execution_seconds_sum") == 3
    assert figures.value("genvm_queue_wait_seconds_count") == 2
    assert figures.value("genvm_queue_wait_seconds_sum") == 3
    assert figures.value("genvm_executions", state="finished") == 1
    assert figures.value("genvm_kept_bytes", **{}) == figures.world.executions.kept_bytes > 0
    figures.world.clock.advance(20 * MINUTE)
    deadline = {"cause": "deadline", "version": "v0.2.3"}
    figures.world.spawner.processes[-1].end()
    assert figures.value("genvm_executions_finished_total", **deadline) == 1


def test_figures_of_failures_and_requests() -> None:
    figures = Figures()
    figures.world.spawner.problem = "not found"
    figures.world.ask().addErrback(lambda failure: None)
    assert figures.value("genvm_spawn_failures_total", reason="spawn_failed") == 1
    figures.metrics.note_request("/genvm/<int:genvm_id>", "GET", 200, 0.25)
    labels = {"route": "/genvm/<int:genvm_id>", "method": "GET", "status": "200"}
    assert figures.value("genvm_http_request_seconds_sum", **labels) == 0.25


def test_figures_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = Figures()
    counts = {
        "requests": 5,
        "errors": {"TIMEOUT": 2},
        "prompt_tokens": 7,
        "completion_tokens": 8,
        "latency_count": 4,
        "latency_sum_ms": 1500,
    }
    found = {
        "llm": {"backends": {"b": {"m": counts}}},
        "web": {"connections": 1, "renders": counts},
    }
    monkeypatch.setattr(Module, "statistics", property(lambda self: found[self.kind]))
    assert figures.value("genvm_module_state", module="llm", state="stopped") == 1
    assert figures.value("genvm_module_state", module="llm", state="running") == 0
    names = {"backend": "b", "model": "m"}
    assert figures.value("genvm_llm_requests_total", **names, outcome="success") == 3
    assert figures.value("genvm_llm_requests_total", **names, outcome="TIMEOUT") == 2
    assert figures.value("genvm_llm_tokens_total", **names, kind="completion") == 8
    assert figures.value("genvm_llm_request_seconds_sum", **names) == 1.5
    assert figures.value("genvm_web_requests_total", kind="renders", outcome="success") == 3
    assert all(state.value in figures.metrics.text().decode() for state in ModuleState)


def test_the_lag_of_the_reactor() -> None:
    figures = Figures()
    clock = figures.world.clock
    figures.metrics.start()
    clock.advance(1)
    clock.advance(3.5)
    assert figures.value("genvm_reactor_lag_seconds_count") == 2
    assert figures.value("genvm_reactor_lag_seconds_sum") == 2.5
    figures.metrics.stop()
    assert clock.getDelayedCalls() == []
