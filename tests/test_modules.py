"""How modules are supervised, where events come in an order of our choice."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path
from typing import Any, cast

import pytest
from twisted.internet.defer import Deferred

from genvm_manager import (
    MODULE_LINE_BYTES,
    MODULE_QUICK_DEATHS,
    MODULE_READY_SECONDS,
    MODULE_STOP_SECONDS,
    MODULE_TRANSITIONS,
    STDERR,
    STDOUT,
    Config,
    LogObserver,
    Module,
    ModuleFailed,
    ModuleState,
    Variables,
    bind_listener,
    listener_address,
)

from .support import (
    FakeProcess,
    FakeSpawner,
    ThreadlessReactor,
    observing,
    outcome,
    without_spare_threads,
)


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read when these tests say so."""
    without_spare_threads(monkeypatch)


READY = b'{"event": "ready"}\n'
ANY_PORT = "127.0.0.1:0"


class ServiceProcess(FakeProcess):
    """A built-in module's process, which is written to."""

    def write(self, *arguments: Any) -> None:
        """Take what the manager says, or let the process write."""
        if len(arguments) == 2:
            super().write(*arguments)

    def get_ready(self) -> None:
        """Let the process accept connections."""
        self.write(STDOUT, READY)


class ServiceSpawner(FakeSpawner):
    """Starts such processes."""

    process_class = ServiceProcess


class Supervised:
    """A module under supervision, and everything it is made of."""

    def __init__(self, root: Path, command: tuple[str, ...] | None = None) -> None:
        self.reactor = ThreadlessReactor()
        self.spawner = ServiceSpawner(self.reactor)
        config = Config(root=root, modules={} if command is None else {"llm": command})
        self.log: list[bytes] = []
        self.observer = LogObserver(Config(), write=self.log.append)
        self.redactor = self.observer.redactor
        spawner = cast(Any, self.spawner)
        self.variables = variables = Variables(root / "config")
        self.module = Module("llm", config, self.reactor, spawner, variables, self.observer)

    def ask(self, operation: Deferred[Any]) -> list[Any]:
        """Return where the outcome of an operation will be, once its threads have worked."""
        result = outcome(operation)
        self.reactor.work()
        return result

    def start(self, **config: Any) -> list[Any]:
        return self.ask(self.module.start({"bind_address": ANY_PORT, **config}, False))

    def restart(self, **config: Any) -> list[Any]:
        return self.ask(self.module.restart({"bind_address": ANY_PORT, **config}, False))

    @property
    def state(self) -> str:
        return self.module.state.value

    @property
    def newest(self) -> ServiceProcess:
        return cast(ServiceProcess, self.spawner.processes[-1])

    def run(self) -> None:
        """Start the module, which must work."""
        result = self.start()
        self.newest.get_ready()
        assert result == [None]

    def die_quickly(self, times: int) -> None:
        """Let the module die, and be started again each time."""
        for _ in range(times):
            dying = self.newest
            dying.end(1)
            self.reactor.advance(60)
            self.reactor.work()
            assert self.newest is not dying
            self.newest.get_ready()

    def finish(self) -> None:
        """Stop the module; nothing of it may be left."""
        stopped = self.ask(self.module.stop())
        for process in self.spawner.processes:
            if process.alive:
                cast(ServiceProcess, process).end()
        assert len(stopped) == 1
        assert self.state == "stopped"
        assert self.module.address is None
        assert self.reactor.getDelayedCalls() == []


@pytest.fixture
def supervised(tmp_path: Path) -> Supervised:
    return Supervised(tmp_path)


def failure_of(result: list[Any]) -> str:
    (error,) = result
    assert isinstance(error, ModuleFailed), error
    return error.message


def test_the_fifth_quick_death_while_its_successor_starts(supervised: Supervised) -> None:
    """The successor serves; whether the module has failed is not for its predecessor to say."""
    supervised.run()
    supervised.die_quickly(MODULE_QUICK_DEATHS - 1)
    old = supervised.newest
    restarted = supervised.restart(name="new")
    old.end(1)
    supervised.newest.get_ready()
    assert restarted == [True]
    assert supervised.state == "running"
    assert (supervised.module.address or "").startswith("127.0.0.1:")
    supervised.finish()


def test_the_fifth_quick_death_while_its_successor_starts_in_vain(supervised: Supervised) -> None:
    supervised.run()
    supervised.die_quickly(MODULE_QUICK_DEATHS - 1)
    old = supervised.newest
    restarted = supervised.restart(name="new")
    old.end(1)
    supervised.newest.end(2)
    assert "exit code 2" in failure_of(restarted)
    assert supervised.state == "failed"
    assert supervised.module.address is None
    supervised.finish()


def test_a_death_while_its_successor_starts_in_vain(supervised: Supervised) -> None:
    """The one that worked before comes back."""
    supervised.run()
    old = supervised.newest
    restarted = supervised.restart(name="new")
    old.end(1)
    assert supervised.state == "starting"
    supervised.newest.end(2)
    assert "exit code 2" in failure_of(restarted)
    supervised.reactor.advance(3)
    supervised.newest.get_ready()
    assert supervised.state == "running"
    assert supervised.restart() == [False]
    supervised.finish()


def test_the_fifth_quick_death_before_there_is_a_successor(supervised: Supervised) -> None:
    """While an address is looked up for that."""
    supervised.run()
    supervised.die_quickly(MODULE_QUICK_DEATHS - 1)
    old = supervised.newest
    restarted = outcome(supervised.module.restart({"bind_address": "127.0.0.2:0"}, False))
    old.end(1)
    assert supervised.state == "failed"
    supervised.reactor.work()
    supervised.newest.get_ready()
    assert (restarted, supervised.state) == ([True], "running")
    supervised.finish()


def test_stop_also_stops_a_restart_that_is_about_to_start_it(
    tmp_path: Path, supervised: Supervised
) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "genvm-module-llm.yaml").write_text(f"bind_address: {ANY_PORT}")
    restarted = outcome(supervised.module.restart(None, True))
    stopped = outcome(supervised.module.stop())
    supervised.reactor.work()
    assert "stopped" in failure_of(restarted)
    assert (len(stopped), supervised.state, supervised.spawner.processes) == (1, "stopped", [])


def test_a_new_configuration_begins_to_count_anew(supervised: Supervised) -> None:
    supervised.run()
    supervised.die_quickly(MODULE_QUICK_DEATHS - 1)
    old = supervised.newest
    restarted = supervised.restart(name="new")
    supervised.newest.get_ready()
    old.end()
    assert restarted == [True]
    supervised.die_quickly(MODULE_QUICK_DEATHS - 1)
    assert supervised.state == "running"
    supervised.finish()


def test_one_that_starts_does_not_drain(supervised: Supervised) -> None:
    supervised.start()
    assert supervised.module.status().draining == 0
    supervised.newest.get_ready()
    old = supervised.newest
    supervised.restart(name="new")
    assert supervised.module.status().draining == 0
    supervised.newest.get_ready()
    assert supervised.module.status().draining == 1
    old.end()
    assert supervised.module.status().draining == 0
    supervised.finish()


def test_a_start_that_takes_long_tells_what_it_waits_for(supervised: Supervised) -> None:
    """A busy machine may take most of a minute."""
    assert supervised.module.status().waits_for is None
    started = supervised.start()
    supervised.newest.write(STDERR, b"one\nloading\n")
    supervised.reactor.advance(MODULE_READY_SECONDS - 0.5)
    assert started == []
    assert supervised.state == "starting"
    assert supervised.module.status().waits_for == (
        "generation 1 to accept connections, for 59.5 s of 60; it said last: loading"
    )
    supervised.newest.get_ready()
    assert started == [None]
    assert supervised.module.status().waits_for is None
    supervised.newest.end(1)
    assert "the next attempt to start, in " in str(supervised.module.status().waits_for)
    supervised.finish()


def test_a_start_that_takes_too_long(supervised: Supervised) -> None:
    started = supervised.start()
    supervised.newest.write(STDERR, b"loading\n")
    supervised.reactor.advance(MODULE_READY_SECONDS)
    assert supervised.newest.signals == ["KILL"]
    supervised.newest.end(-9)
    assert failure_of(started).endswith(
        "it accepted no connection within 60 s; its stderr ends: loading"
    )
    assert supervised.state == "stopped"
    assert supervised.reactor.getDelayedCalls() == []


def test_ready_while_the_manager_ends(supervised: Supervised) -> None:
    started = supervised.start()
    closed = outcome(Deferred.fromCoroutine(supervised.module.close(0.7)))
    supervised.newest.get_ready()
    supervised.newest.end()
    assert closed == [None]
    assert len(started) == 1
    assert supervised.state == "stopped"
    assert supervised.reactor.getDelayedCalls() == []


def test_a_command_is_asked_to_end_and_killed_after_a_while(tmp_path: Path) -> None:
    """It is stopped when it is gone: its address and its conversations go with it."""
    supervised = Supervised(tmp_path, ("module",))
    started = supervised.start()
    supervised.module._starting.ready.fire(None)  # type: ignore[union-attr]  # as the probe does
    assert started == [None]
    stopped = supervised.ask(supervised.module.stop())
    supervised.reactor.advance(MODULE_STOP_SECONDS - 0.1)
    assert (supervised.newest.signals, stopped) == (["TERM"], [])
    supervised.reactor.advance(0.1)
    assert supervised.newest.signals == ["TERM", "KILL"]
    supervised.newest.end(-9)
    assert (stopped, supervised.state) == ([True], "stopped")


def test_nothing_is_started_while_the_manager_ends(supervised: Supervised) -> None:
    """Not even where what it waits for is only an old generation that drains."""
    supervised.run()
    old = supervised.newest
    stopped = supervised.ask(supervised.module.stop())
    old.write(STDOUT, b'{"event": "draining"}\n')
    assert (stopped, supervised.state, old.alive) == ([True], "stopped", True)
    closed = outcome(Deferred.fromCoroutine(supervised.module.close(0.7)))
    assert "shutting down" in failure_of(supervised.start())
    assert "shutting down" in failure_of(supervised.restart())
    old.end()
    assert (closed, supervised.state) == ([None], "stopped")
    assert supervised.spawner.processes == [old]


def test_every_state_can_be_left_and_reached() -> None:
    reached = {state for following in MODULE_TRANSITIONS.values() for state in following}
    assert reached == set(MODULE_TRANSITIONS) == set(ModuleState)
    assert all(state not in following for state, following in MODULE_TRANSITIONS.items())


def test_stop_after_it_has_failed_ends_what_drains(supervised: Supervised) -> None:
    supervised.run()
    drains = supervised.newest
    supervised.restart(name="new")
    supervised.newest.get_ready()
    supervised.die_quickly(MODULE_QUICK_DEATHS - 1)
    supervised.newest.end(1)
    assert supervised.state == "failed"
    assert drains.alive
    stopped = supervised.ask(supervised.module.stop())
    assert stopped == []
    supervised.reactor.advance(MODULE_STOP_SECONDS)
    assert drains.signals[-1] == "KILL"
    drains.end()
    assert stopped == [False]
    assert supervised.reactor.getDelayedCalls() == []


def test_stop_before_there_is_a_process(supervised: Supervised) -> None:
    """Nothing is started only to be stopped; what is asked for later is done."""
    started = outcome(supervised.module.start({"bind_address": ANY_PORT}, False))
    stopped = outcome(supervised.module.stop())
    again = outcome(supervised.module.restart({"bind_address": ANY_PORT}, False))
    supervised.reactor.work()
    assert "stopped" in failure_of(started)
    assert len(stopped) == 1
    assert len(supervised.spawner.processes) == 1
    supervised.newest.get_ready()
    assert again == [True]
    supervised.finish()


@pytest.mark.parametrize("address", ["a..b:1", "x" * 64 + ".example:1"])
def test_addresses_that_cannot_be(supervised: Supervised, address: str) -> None:
    assert "cannot be used" in failure_of(supervised.start(bind_address=address))
    assert supervised.state == "stopped"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 2025-01-01", "put a date in quotes"),
        ("a: !!binary aGk=", "put a date in quotes"),
        ("a: &a [*a]", "nested too deeply"),
        ("- sk-secret", "expected a mapping, got an array"),
        ("sk-secret", "expected a mapping, got a string"),
        ("", "expected a mapping, got null"),
        ("2025-01-01", "expected a mapping, got a date"),
    ],
)
def test_files_that_are_no_configuration(
    supervised: Supervised, tmp_path: Path, text: str, reason: str
) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "genvm-module-llm.yaml").write_text(text)
    message = failure_of(supervised.ask(supervised.module.start(None, False)))
    assert reason in message
    assert "sk-" not in message
    assert supervised.spawner.processes == []
    assert supervised.state == "stopped"


def test_what_a_template_inserted_is_secret_as_long_as_the_module_runs(tmp_path: Path) -> None:
    supervised = Supervised(tmp_path)
    value = "a-value-of-a-variable"
    supervised.variables.set("ANYTHING", value)
    result = supervised.start(name="of ${ENV[ANYTHING]}")
    supervised.newest.get_ready()
    assert result == [None]
    with observing(supervised.observer):
        supervised.newest.write(STDERR, b"I am of a-value-of-a-variable\n")
    log = b"".join(supervised.log).decode()
    assert "I am of [redacted]" in log
    assert value not in log


def test_secrets_of_a_command_after_the_keys_of_many_checks(tmp_path: Path) -> None:
    """They do not push each other out; neither does a line that is cut show half of one."""
    supervised = Supervised(tmp_path, ("module",))
    secret = "s3cret-" + "0123456789" * 5
    result = supervised.start(api_key=secret)
    for number in range(1000):
        supervised.redactor.keep(number, [f"another key {number}"])
    line = b"x" * (MODULE_LINE_BYTES - 30) + secret.encode()
    with observing(supervised.observer):
        supervised.newest.write(STDERR, b"%b\n%b\n" % (line, secret.encode()))
        supervised.newest.end(1)
    assert secret[:12] not in failure_of(result)
    assert "[redacted]" in failure_of(result)
    assert len(supervised.log) > 0
    assert secret[:12] not in b"".join(supervised.log).decode()


def test_a_configuration_that_cannot_be_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervised = Supervised(tmp_path, ("module", "{config_file}"))
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
        result = supervised.start()
        assert "cannot be stored" in failure_of(result)
        assert supervised.state == "stopped"
    assert supervised.spawner.processes == []


@pytest.mark.parametrize("has_both", [True, False])
def test_an_ipv6_address_is_bound_wherever_there_is_ipv6(
    has_both: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_both:  # as on a system whose sockets take connections of one kind only
        monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with bind_listener("::1", 0) as listener:
        assert listener_address(listener).startswith("[::1]:")
