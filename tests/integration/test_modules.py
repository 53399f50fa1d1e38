"""Sections 2.18 and 2.19: how the manager supervises modules, seen from outside.

What a module's process does by itself is in test_module_service.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from genvm_manager import MODULE_QUICK_DEATHS, MODULE_STOP_SECONDS, own_command

from .conftest import Start
from .executor_client import HELLO, Client, ok, prompt
from .fake_providers import KEY, Provider
from .support import (
    PARENT,
    SOURCE,
    WAIT,
    Daemon,
    Host,
    Reply,
    Root,
    alive,
    cpu_of,
    eventually,
    free_port,
    kill,
    processes_with,
    report,
    serving,
    timed,
    watched,
    within,
)

ANY_PORT = "127.0.0.1:0"


def start_module(daemon: Daemon, config: Any, kind: str = "llm", **extra: Any) -> None:
    """Start a module that must start."""
    body = {"module_type": kind, "config": config, **extra}
    assert daemon.post("/module/start", body) == {"result": "module_started"}


def restart(daemon: Daemon, config: Any, kind: str = "llm") -> dict[str, Any]:
    """Restart a module that must restart."""
    answer = daemon.post("/module/restart", {"module_type": kind, "config": config})
    assert answer["result"] == "module_restarted"
    return dict(answer)


def stop_module(daemon: Daemon, kind: str = "llm") -> str:
    return str(daemon.post("/module/stop", {"module_type": kind})["result"])


def refused(reply: Reply, *parts: str, code: str = "module_failed") -> str:
    """Check the answer to a request that fails, and return its text."""
    assert reply.status == 500
    assert reply.json["code"] == code, reply.json
    text = str(reply.json["error"])
    for part in parts:
        assert part in text
    return text


def try_start(daemon: Daemon, config: Any, kind: str = "llm") -> Reply:
    return daemon.request("POST", "/module/start", {"module_type": kind, "config": config})


def status(daemon: Daemon, kind: str = "llm") -> dict[str, Any]:
    whole = daemon.get("/status")
    one = dict(whole["modules"][kind])
    assert whole[f"{kind}_module"] == one["state"]
    return one


def place(daemon: Daemon, kind: str = "llm") -> tuple[str, int]:
    host, _, port = status(daemon, kind)["address"].rpartition(":")
    return host, int(port)


def connect(address: tuple[str, int]) -> Client:
    client = Client(address)
    client.send(HELLO)
    return client


def answer_at(address: tuple[str, int], text: str = "x") -> str:
    """Return the answer to a prompt on a connection of its own."""
    client = connect(address)
    try:
        answer = client.prompt(text)
        assert answer == ok(answer["Ok"]["data"])
        return str(answer["Ok"]["data"])
    finally:
        client.close()


def kill_module(daemon: Daemon) -> dict[str, Any]:
    """Kill a module; return its status once the manager knows: it waits, or has begun anew."""
    pid = status(daemon)["pid"]
    kill(pid)
    return eventually(lambda: (now := status(daemon))["pid"] != pid and now) or {}


def is_free(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, WAIT).close()
    except ConnectionRefusedError:
        socket.create_server(address).close()
        return True
    except ConnectionResetError:
        pass  # it is being closed at this very moment
    return False


def ends_on_sigterm(daemon: Daemon, what: str) -> None:
    """End the manager, which takes all it has started along; print how long it took."""
    begin = time.monotonic()
    daemon.signal(signal.SIGTERM)
    assert daemon.process.wait(WAIT) == 0
    timed(what, time.monotonic() - begin, 1.0)
    assert processes_with(daemon.marker) == []


def stopped_at_the_end(daemon: Daemon) -> Iterator[Daemon]:
    """Yield the daemon; see that no module is left, and that the next test does not suffer."""
    yield daemon
    for kind in ("llm", "web"):
        stop_module(daemon, kind)
    try:
        eventually(lambda: not daemon.descendants(), what="no process is left")
    finally:
        for pid in daemon.descendants():
            kill(pid)


@pytest.fixture
def manager(shared_daemon: Daemon) -> Iterator[Daemon]:
    """The daemon of this file, with built-in modules."""
    yield from stopped_at_the_end(shared_daemon)


# --- start and stop ---


def test_start_and_stop(manager: Daemon, provider: Provider) -> None:
    before = status(manager)
    assert before["state"] == "stopped"
    assert before["pid"] is before["address"] is None
    start_module(manager, provider.config("echo"))
    address = place(manager)
    assert answer_at(address, "at once") == "at once"
    now = status(manager)
    assert now["state"] == "running"
    assert now["generation"] == before["generation"] + 1
    assert alive(now["pid"])
    assert now["last_error"] is None
    text = refused(try_start(manager, provider.config("echo")), code="module_already_running")
    assert text == "module_already_running"
    advice = try_start(manager, provider.config("echo")).json["advice"]
    assert advice == "the llm module is running; stop or restart it"
    # No executor has got hold of the listening socket.
    genvm_id = manager.run("sleep 600")
    eventually(lambda: len(manager.descendants()) == 2)
    assert stop_module(manager) == "module_stopped"
    assert not alive(now["pid"])
    assert is_free(address)
    manager.request("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms=0")
    after = status(manager)
    assert after["state"] == "stopped"
    assert after["pid"] is after["address"] is None
    assert stop_module(manager) == "module_not_running"
    assert stop_module(manager, "web") == "module_not_running"


def test_any_letter_case(manager: Daemon, provider: Provider) -> None:
    start_module(manager, provider.config("echo"), kind="Llm")
    assert restart(manager, provider.config("echo"), kind="LLM")["changed"] is False
    assert stop_module(manager, "lLM") == "module_stopped"


def test_two_starts_at_once(manager: Daemon, provider: Provider) -> None:
    body = {"module_type": "llm", "config": provider.config("echo")}
    pending = [manager.send("POST", "/module/start", body) for _ in range(3)]
    replies = [one.reply() for one in pending]
    assert sorted(reply.status for reply in replies) == [200, 500, 500]
    assert {r.json["code"] for r in replies if r.status == 500} == {"module_already_running"}
    assert answer_at(place(manager)) == "x"


def test_two_starts_while_it_stops(manager: Daemon, provider: Provider) -> None:
    """One of them starts it; the other one does no harm."""
    start_module(manager, provider.config("named:old"))
    old = status(manager)["pid"]
    kill(old, signal.SIGSTOP)
    begin = time.monotonic()
    stopping = manager.send("POST", "/module/stop", {"module_type": "llm"})
    eventually(lambda: status(manager)["state"] != "running")
    config = provider.config("named:new", bind_address=f"127.0.0.1:{free_port()}")
    body = {"module_type": "llm", "config": config}
    pending = [manager.send("POST", "/module/start", body) for _ in range(2)]
    for _ in range(3):
        state = status(manager)["state"]
        assert state == "stopping" or time.monotonic() - begin > MODULE_STOP_SECONDS
    kill(old, signal.SIGCONT)
    assert stopping.reply().json == {"result": "module_stopped"}
    replies = [one.reply() for one in pending]
    assert not alive(old)
    assert sorted(reply.status for reply in replies) == [200, 500], [r.json for r in replies]
    refused(max(replies, key=lambda r: r.status), code="module_already_running")
    now = status(manager)
    assert now["state"] == "running"
    assert answer_at(place(manager)) == "new"


def bad_configs() -> Iterator[tuple[Any, str, str]]:
    able = {"supports_json": True, "supports_image": True}
    good = {"host": "http://x", "provider": "openai-compatible", "key": KEY, "models": {"m": able}}
    failed, wrong = "module_failed", "invalid address of the llm module"
    yield {"bind_address": ANY_PORT}, failed, "backends: none can be used"
    unknown = {"backends": {"a": {**good, "provider": "oracle"}}, "bind_address": ANY_PORT}
    yield unknown, failed, 'unknown "oracle"'
    for key, reason in (
        ("", "it has no key"),
        ("${ENV[NOT_SET]}", "NOT_SET may not be used in a request"),
        ("${ENV[PATH]}", "PATH may not be used in a request"),
        ("${NO_SUCH}", "NO_SUCH"),
    ):
        backends = {"a": {**good, "key": key}}
        yield {"backends": backends, "bind_address": ANY_PORT}, failed, reason
    for address in ("nonsense", "127.0.0.1:99999", "127.0.0.1:x", ":3031", 5, None):
        yield {"backends": {"a": good}, "bind_address": address}, failed, wrong
    yield {"backends": {"a": good}, "port": 3031}, failed, wrong
    yield {"backends": {"a": good}, "host": "127.0.0.1"}, failed, wrong
    yield {"backends": {"a": good}, "bind_address": "192.0.2.1:9"}, failed, "192.0.2.1:9 cannot be"
    yield "text", "invalid_request", "config: "
    yield [], "invalid_request", "config: "


@pytest.mark.parametrize(("config", "code", "reason"), list(bad_configs()))
def test_bad_configurations(manager: Daemon, config: Any, code: str, reason: str) -> None:
    text = refused(try_start(manager, config), reason, code=code)
    assert KEY not in text
    now = status(manager)
    assert now["state"] == "stopped"
    assert now["pid"] is now["address"] is None
    if code == "module_failed":
        assert reason in now["last_error"]
    assert manager.descendants() == []


PLACES: list[dict[str, Any]] = [
    {"bind_address": "${ENV[AN_ADDRESS]}"},
    {"bind_address": "x${ENV[AN_ADDRESS]}:1"},
    {"lua_script_path": "/${ENV[AN_ADDRESS]}.lua"},
    {"timeout": "${ENV[AN_ADDRESS]}"},
    {"backends": {"a": {"host": "${ENV[AN_ADDRESS]}"}}},
    {"backends": {"a": {"provider": "some ${ENV[AN_ADDRESS]}"}}},
    {"backends": {"a": {"models": {"m": {"timeout": "${ENV[AN_ADDRESS]}"}}}}},
    {"backends": {"a": {"meta": {"priority": "${ENV[AN_ADDRESS]}"}}}},
    {"prompt_templates": {"eq_comparative": {"system": ["${ENV[AN_ADDRESS]}"]}}},
]


@pytest.mark.parametrize("length", [20, 400])
def test_what_a_template_inserted_is_not_shown(start: Start, length: int) -> None:
    """Neither what stands in the wrong place, nor the part of it that a message would show."""
    daemon = start("--log-level", "trace")
    value = "".join(f"{number:04x}" for number in range(0xABCD, 0xABCD + length // 4))
    daemon.post("/env", {"key": "AN_ADDRESS", "value": value})
    good = {"host": "http://x", "provider": "openai-compatible", "key": KEY, "models": {"m": {}}}
    for place in PLACES:
        config = {"bind_address": ANY_PORT, "backends": {"a": good}, **place}
        if "backends" in place:
            config["backends"] = {"a": {**good, **place["backends"]["a"]}}
        reply = try_start(daemon, config)
        assert reply.status in (200, 500)
        said = reply.raw.decode() + json.dumps(daemon.get("/status"))
        daemon.post("/module/stop", {"module_type": "llm"})
        assert value[:12] not in said, place
    daemon.stop()
    assert value[:12] not in daemon.text
    # The end of a message, or of what it shows, is no better.
    assert all(value[at : at + 12] not in daemon.text for at in range(length - 12))


@pytest.mark.parametrize("kind", ["gpu", "", None, 1])
def test_unknown_modules(manager: Daemon, kind: Any) -> None:
    for path in ("start", "stop", "restart"):
        reply = manager.request("POST", f"/module/{path}", {"module_type": kind})
        refused(reply, "module_type: expected llm or web", code="invalid_request")


def test_the_configuration_in_a_file(
    manager: Daemon, shared_root: Root, provider: Provider
) -> None:
    path = shared_root.path / "config" / "genvm-module-llm.yaml"
    try:
        refused(try_start(manager, None), "genvm-module-llm.yaml")
        path.write_text(f"backends:\n  a: {{key: {KEY}, [}}\n")
        text = refused(try_start(manager, None), "genvm-module-llm.yaml: not YAML: line 2: ")
        assert KEY not in text + manager.text + json.dumps(manager.get("/status"))
        path.write_text("- 1\n")
        refused(try_start(manager, None), "genvm-module-llm.yaml: expected a mapping")
        manager.post("/env", {"key": "KEY_FROM_ENV", "value": KEY})
        config = json.dumps(provider.config("echo")).replace(KEY, "${ENV[KEY_FROM_ENV]}")
        path.write_text(config)
        answer = manager.post("/module/start", {"module_type": "llm"})
        assert answer == {"result": "module_started"}
        assert answer_at(place(manager)) == "x"
        assert restart(manager, None)["changed"] is False
    finally:
        path.unlink(missing_ok=True)


def test_empty_backends_are_allowed_on_request(manager: Daemon) -> None:
    start_module(manager, {"bind_address": ANY_PORT}, allow_empty_backends=True)
    client = connect(place(manager))
    assert "NO_PROVIDER_FOR_PROMPT" in client.prompt("x")["FatalError"]
    client.close()


def test_an_address_in_use(manager: Daemon, provider: Provider) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        for taken in (address, manager.address):
            begin = time.monotonic()
            reply = try_start(manager, provider.config("echo", bind_address=taken))
            timed("an address in use is an error", time.monotonic() - begin, 0.2)
            refused(reply, taken, "in use")
            assert status(manager)["state"] == "stopped"
    start_module(manager, provider.config("echo", bind_address=address))


def test_host_and_port(manager: Daemon, provider: Provider) -> None:
    config = {**provider.config("echo"), "host": "127.0.0.1", "port": free_port()}
    del config["bind_address"]
    start_module(manager, config)
    assert place(manager) == ("127.0.0.1", config["port"])
    assert answer_at(place(manager)) == "x"


# --- what /status and the log say ---


def test_statistics(manager: Daemon, provider: Provider) -> None:
    start_module(manager, provider.config("echo"))
    answer_at(place(manager))

    def counted() -> Any:
        return status(manager)["stats"].get("backends", {}).get("b0", {}).get("echo", {})

    # What it tells each second may tell of the request before it has an answer.
    eventually(lambda: counted().get("total_tokens") == 21, what="statistics")
    assert counted()["requests"] == 1


def test_the_log_level_reaches_the_module(manager: Daemon, provider: Provider) -> None:
    start_module(manager, provider.config("echo"))

    def from_module(record: dict[str, Any]) -> bool:
        return record.get("cookie") == "debugged" and record.get("module") == "llm"

    manager.post("/log/level", {"level": "debug"})
    try:

        def seen() -> bool:
            # The order and the connection take different ways to the module.
            client = Client(place(manager))
            client.send({**HELLO, "cookie": "debugged"})
            assert client.prompt("x") == ok("x")
            client.close()
            return any(from_module(record) for record in list(manager.records))

        eventually(seen, what="debug lines of the module")
    finally:
        manager.post("/log/level", {"level": "info"})
    assert manager.wait_log(from_module)["level"] == "debug"


def test_a_warning_where_a_run_may_need_a_module(manager: Daemon, provider: Provider) -> None:
    def warning(genvm_id: int) -> str:
        manager.result(genvm_id)
        manager.wait_log(
            lambda r: r.get("genvm_id") == genvm_id and r["message"] == "execution finished"
        )
        texts = [
            record["message"]
            for record in manager.records
            if record.get("genvm_id") == genvm_id and record["level"] == "warn"
        ]
        return " ".join(text for text in texts if "started without modules" in text)

    assert "llm, web" in warning(manager.run(is_sync=False))
    assert warning(manager.run(is_sync=True)) == ""
    start_module(manager, provider.config("echo"))
    assert warning(manager.run(is_sync=False)).endswith("it may need: web")


def test_no_secret_gets_out(start: Start, provider: Provider) -> None:
    daemon = start("--log-level", "trace")
    said = []
    bad = provider.config("echo")
    bad["backends"]["b0"]["key"] = KEY + "\n"
    said.append(try_start(daemon, bad).raw)
    bad["backends"]["b0"] |= {"key": KEY, "provider": KEY}
    said.append(try_start(daemon, bad).raw)
    start_module(daemon, provider.config("status:401"))
    client = connect(place(daemon))
    said.append(json.dumps(client.prompt("x")).encode())
    said.append(daemon.request("GET", "/status").raw)
    said.append(json.dumps(restart(daemon, provider.config("echo"))).encode())
    said.append(daemon.request("GET", "/status").raw)
    kill_module(daemon)
    said.append(daemon.request("GET", "/status").raw)
    client.close()
    assert daemon.stop() == 0
    assert any(r.get("module") == "llm" and "cookie" in r for r in daemon.records)
    everything = b"".join(said).decode() + daemon.text + daemon.errors
    assert KEY not in everything
    assert json.dumps(KEY)[1:-1] not in everything


# --- who asks and goes ---


def test_who_asks_need_not_wait(manager: Daemon, provider: Provider) -> None:
    body = {"module_type": "llm", "config": provider.config("echo")}
    asking = manager.send("POST", "/module/start", body)
    eventually(lambda: status(manager)["state"] != "stopped")
    asking.close()
    eventually(lambda: status(manager)["state"] == "running")
    assert answer_at(place(manager)) == "x"


# --- deaths ---


def test_killed_while_serving(manager: Daemon, provider: Provider) -> None:
    start_module(manager, provider.config("named:x"))
    address, before = place(manager), status(manager)
    held = connect(address)
    held.send(prompt("long"))
    provider.wait("held")
    begin = time.monotonic()
    down = kill_module(manager)
    assert held.socket.recv(1) == b""
    # Nobody is refused meanwhile: who comes now waits a little.
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(answer_at, address)
        if down["restarts"] == before["restarts"]:  # seen in time
            assert (down["state"], down["pid"]) == ("starting", None)
            assert "signal 9" in down["last_error"]
        eventually(lambda: status(manager)["state"] == "running")
        seconds = time.monotonic() - begin
        assert early.result(WAIT) == "x"
    report(f"running again {seconds:.2f} s after kill -9")
    assert seconds > 0.8, "it waits before it tries again"
    now = status(manager)
    assert now["restarts"] == before["restarts"] + 1
    assert now["generation"] == before["generation"] + 1
    assert now["pid"] != before["pid"]
    assert place(manager) == address
    assert answer_at(address) == "x"
    assert any(r["message"] == "module died" for r in manager.records)


def test_stop_and_start_while_it_waits_to_be_restarted(manager: Daemon, provider: Provider) -> None:
    start_module(manager, provider.config("echo"))
    kill_module(manager)
    refused(try_start(manager, provider.config("echo")), code="module_already_running")
    assert stop_module(manager) == "module_stopped"
    assert status(manager)["state"] == "stopped"
    start_module(manager, provider.config("echo"))
    kill_module(manager)
    assert restart(manager, provider.config("says:y"))["changed"] is True
    assert answer_at(place(manager)) == "y"


def test_unknown_keys_of_the_web_module(manager: Daemon) -> None:
    config = {"bind_address": ANY_PORT, "extra_tdl": ["internal"]}
    refused(try_start(manager, config, "web"), "extra_tdl: unknown key; did you mean extra_tld?")
    start_module(manager, {"bind_address": ANY_PORT, "color": "red"}, "web")
    manager.wait_log(lambda r: r["message"] == "color: unknown key: ignored")
    assert stop_module(manager, "web") == "module_stopped"


def test_a_start_that_fails_says_so_as_clients_know_it(manager: Daemon) -> None:
    text = refused(try_start(manager, {"bind_address": ANY_PORT, "backends": {}}))
    assert text.startswith("module_failed_to_start: the llm module did not start")


def test_an_old_generation_that_dies_is_not_missed(manager: Daemon, provider: Provider) -> None:
    start_module(manager, provider.config("named:old"))
    held = connect(place(manager))
    held.send(prompt("long"))
    provider.wait("held")
    old = status(manager)["pid"]
    restart(manager, provider.config("named:new"))
    before = status(manager)
    assert before["draining"] == 1
    kill(old)
    eventually(lambda: status(manager)["draining"] == 0)
    assert status(manager) == {**before, "draining": 0, "stats": status(manager)["stats"]}
    assert answer_at(place(manager)) == "new"
    held.close()


def test_killed_while_its_successor_starts(manager: Daemon, provider: Provider) -> None:
    start_module(manager, provider.config("says:old"))
    address, old = place(manager), status(manager)["pid"]
    body = {"module_type": "llm", "config": provider.config("says:new")}
    asked = manager.send("POST", "/module/restart", body)
    eventually(lambda: len(manager.descendants()) == 2 or status(manager)["pid"] != old)
    kill(old)
    assert asked.reply().json["changed"] is True
    assert answer_at(address) == "new"
    eventually(lambda: status(manager)["state"] == "running")
    assert len(manager.descendants()) == 1


# --- the manager's own end ---


def test_kill_9_of_the_manager(start: Start, provider: Provider) -> None:
    daemon = start()
    start_module(daemon, provider.config("named:x"))
    address, pid = place(daemon), status(daemon)["pid"]
    held = connect(address)
    held.send(prompt("long"))
    provider.wait("held")
    daemon.process.kill()
    within(1.0, lambda: not alive(pid), "the module is gone after kill -9 of the manager")
    held.close()
    eventually(lambda: processes_with(daemon.marker) == [])
    # The last thread of a killed process may outlive its leader by a moment, and the socket too.
    eventually(lambda: is_free(address), what="the address is free")


def test_sigterm_of_the_manager(start: Start, provider: Provider) -> None:
    daemon = start()
    start_module(daemon, provider.config("named:x"))
    address = place(daemon)
    clients = [connect(address) for _ in range(5)]
    clients[0].send(prompt("long"))
    provider.wait("held")
    assert clients[1].prompt("x") == ok("x")
    ends_on_sigterm(daemon, "SIGTERM of the manager with a module and 5 connections")
    assert is_free(address)
    for client in clients:
        client.close()
    daemon.wait()
    assert daemon.errors == ""
    assert not [r for r in daemon.records if r["level"] == "error"], "its end is no accident"


# --- restarts ---


def test_the_same_configuration_changes_nothing(manager: Daemon, provider: Provider) -> None:
    start_module(manager, provider.config("echo"))
    before = status(manager)
    assert restart(manager, provider.config("echo")) == {
        "result": "module_restarted",
        "changed": False,
        "generation": before["generation"],
    }
    assert status(manager)["pid"] == before["pid"]


def test_restart_starts_what_is_stopped(manager: Daemon, provider: Provider) -> None:
    assert restart(manager, provider.config("echo"))["changed"] is True
    assert answer_at(place(manager)) == "x"


def test_a_restart_that_fails_changes_nothing(manager: Daemon, provider: Provider) -> None:
    start_module(manager, provider.config("says:old"))
    before, address = status(manager), place(manager)
    kept = connect(address)
    no_model = {**provider.config("echo"), "backends": {}}
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        for config, reason in (
            (no_model, "backends: none can be used"),
            (provider.config("echo", bind_address=taken), "in use"),
            (provider.config("echo", bind_address="x"), "invalid address of the"),
            (None, "genvm-module-llm.yaml"),
        ):
            body = {"module_type": "llm", "config": config}
            refused(manager.request("POST", "/module/restart", body), reason)
            assert answer_at(address) == "old"
    now = status(manager)
    assert {k: now[k] for k in ("state", "pid", "generation", "address", "restarts")} == {
        k: before[k] for k in ("state", "pid", "generation", "address", "restarts")
    }
    assert now["draining"] == 0
    assert kept.prompt("x") == ok("old")
    kept.close()
    # What it falls back to when it dies is still the old one.
    kill(now["pid"])
    eventually(lambda: status(manager)["pid"] not in (None, now["pid"]))
    assert answer_at(address) == "old"


def test_restart_at_another_address(manager: Daemon, provider: Provider) -> None:
    start_module(manager, provider.config("named:old"))
    old = place(manager)
    held = connect(old)
    held.send(prompt("long"))
    provider.wait("held")
    config = provider.config("named:new", bind_address=f"127.0.0.1:{free_port()}")
    assert restart(manager, config)["changed"] is True
    new = place(manager)
    assert f"{new[0]}:{new[1]}" == config["bind_address"]
    assert answer_at(new) == "new"
    assert status(manager)["draining"] == 1

    eventually(lambda: is_free(old), what="the old address is free")
    provider.open_gate()
    assert held.receive() == ok("old")
    held.close()
    eventually(lambda: status(manager)["draining"] == 0)


def test_stop_lets_conversations_finish(manager: Daemon, provider: Provider) -> None:
    """The port is free at once: what is started there is another generation."""
    start_module(manager, provider.config("named:old"))
    address, old = place(manager), status(manager)["pid"]
    held = connect(address)
    held.send(prompt("long"))
    provider.wait("held")
    begin = time.monotonic()
    assert stop_module(manager) == "module_stopped"
    timed("a stop with an open conversation", time.monotonic() - begin, 0.2)
    assert is_free(address)
    now = status(manager)
    assert (now["state"], now["draining"], now["pid"]) == ("stopped", 1, None)
    assert stop_module(manager) == "module_not_running"
    at_the_same = provider.config("named:new", bind_address=f"{address[0]}:{address[1]}")
    start_module(manager, at_the_same)
    assert answer_at(address) == "new"
    provider.open_gate()
    assert held.receive() == ok("old")
    held.close()
    eventually(lambda: not alive(old), what="the old generation ends with its last conversation")
    assert (status(manager)["state"], status(manager)["draining"]) == ("running", 0)


def test_restart_under_load(manager: Daemon, provider: Provider) -> None:
    """50 connections a second, restarts and long requests: nothing is refused or lost."""
    seconds, rate, most = 6, 50, 64
    start_module(manager, provider.config("named:0"))
    address = place(manager)
    in_force: list[float] = [0.0]
    stale: list[float] = []
    long: list[tuple[Client, int]] = []
    over = threading.Event()
    places = threading.Semaphore(most)

    def attempt() -> None:
        try:
            begin, known = time.monotonic(), len(in_force)
            got = int(answer_at(address))
            if got < known - 1:
                stale.append(begin - in_force[got + 1])
        finally:
            places.release()

    def keep_restarting() -> int:
        number = 0
        while not over.is_set():
            clients = [connect(address) for _ in range(3)]
            for client in clients:
                client.send(prompt("long"))
                long.append((client, number))
                provider.wait("held", len(long))
            number += 1
            assert restart(manager, provider.config(f"named:{number}"))["changed"] is True
            in_force.append(time.monotonic())
            over.wait(0.7)
        return number

    with ThreadPoolExecutor(most + 1) as pool:
        restarts = pool.submit(keep_restarting)
        begin = time.monotonic()
        attempts: list[Future[None]] = []
        # Longer on a machine that is so busy that it has not seen three restarts by then.
        while time.monotonic() - begin < seconds or (len(in_force) <= 3 and not restarts.done()):
            places.acquire()
            attempts.append(pool.submit(attempt))
            time.sleep(1 / rate)
        paced = time.monotonic() - begin
        over.set()
        errors = [repr(e) for one in attempts if (e := one.exception(WAIT)) is not None]
        done = restarts.result(WAIT)
    draining = status(manager)["draining"]
    # Those that still have a conversation accept no other.
    eventually(lambda: {answer_at(address) for _ in range(20)} == {str(done)})
    provider.open_gate()
    for client, number in long:
        answer = client.receive()
        # A connection made while two generations accept may reach either.
        assert answer in (ok(str(number)), ok(str(number - 1))), number
        client.close()
    report(
        f"{len(attempts)} connections in {paced:.1f} s, {done} restarts, {draining} draining, "
        f"{len(long)} long requests; {len(stale)} reached the old one after the restart's answer, "
        f"at most {max(stale, default=0.0) * 1000:.0f} ms after"
    )
    assert errors == []
    assert done >= 3
    eventually(lambda: status(manager)["draining"] == 0, what="old generations end")


def test_status_is_quick_meanwhile(manager: Daemon, provider: Provider) -> None:
    """While modules start, stop and drain."""
    files = len(os.listdir(f"/proc/{manager.pid}/fd"))

    def use_modules() -> None:
        for number in range(2):
            start_module(manager, provider.config(f"named:{number}"))
            held = connect(place(manager))
            held.send(prompt("long"))
            restart(manager, provider.config(f"named:again-{number}"))
            assert status(manager)["draining"] == 1
            held.close()
            assert stop_module(manager) == "module_stopped"

    watched(manager, "modules that start, stop and drain", use_modules)
    eventually(lambda: len(os.listdir(f"/proc/{manager.pid}/fd")) <= files, what="no open files")


# --- external commands ---

EXTERNAL = """
import base64, hashlib, json, os, socket, sys, time
with open(sys.argv[1]) as file:
    config = json.load(file)
def say(text):
    print(text, file=sys.stderr, flush=True)
behaviour = config["behaviour"]
say(config.get("says", "begun"))
print(config.get("prints", ""), flush=True)
if behaviour == "exit":
    sys.exit(3)
if behaviour == "stubborn":
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.path.exists(config.get("fails_if", "")):
    sys.exit(4)
host, _, port = config["bind_address"].rpartition(":")
listener = socket.create_server((host, int(port)))
while True:
    peer, _ = listener.accept()
    if behaviour == "websocket":
        head = peer.recv(4096).decode()
        key = head.split("Sec-WebSocket-Key: ")[1].split("\\r\\n")[0]
        digest = hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()
        accept = base64.b64encode(digest).decode()
        peer.sendall((
            "HTTP/1.1 101 Switching Protocols\\r\\nUpgrade: websocket\\r\\nConnection: Upgrade"
            f"\\r\\nSec-WebSocket-Accept: {accept}\\r\\n\\r\\n"
        ).encode())
        frame = peer.recv(100)
        farewell = bytes(a ^ b for a, b in zip(frame[6:], frame[2:6]))
        peer.sendall(b"\\x88\\x02" + farewell)
        say(f"{frame[:2].hex()} {farewell.hex()} then {peer.recv(100)!r}")
    if behaviour == "brief":
        try:
            peer.recv(1)  # until the manager has seen that it is ready, and hangs up
        except OSError:
            pass
        say(config["says"])
        os._exit(5)
    try:
        peer.sendall(config.get("name", "?").encode())
    except OSError:
        pass
    peer.close()
"""


@pytest.fixture(scope="module")
def external_root() -> Iterator[Root]:
    made = Root()
    script = made.path / "module.py"
    script.write_text(EXTERNAL)
    commands = {
        "llm": {"command": [sys.executable, "-IS", str(script), "{config_file}"]},
        "web": {"command": ["sleep", "600"]},
    }
    settings = json.dumps({"modules": commands})
    (made.path / "config" / "genvm-manager.yaml").write_text(settings)
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared_external(external_root: Root) -> Iterator[Daemon]:
    daemon = Daemon.serve(external_root)
    yield daemon
    daemon.close()


@pytest.fixture
def external(shared_external: Daemon) -> Iterator[Daemon]:
    """A daemon whose modules are commands: llm is EXTERNAL, web never listens."""
    yield from stopped_at_the_end(shared_external)


def command(behaviour: str = "serve", **more: Any) -> dict[str, Any]:
    return {"behaviour": behaviour, "bind_address": f"127.0.0.1:{free_port()}", **more}


def name_at(address: tuple[str, int]) -> str:
    with socket.create_connection(address, WAIT) as peer:
        return peer.recv(100).decode()


def config_file_of(pid: int) -> Path:
    """Return the file that a command was given as its last argument; see that it has no name."""
    path = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[-2].decode()
    file = Path(path.replace("self", str(pid)))
    assert file.stat().st_nlink == 0, os.readlink(file)
    return file


def open_files(pid: int) -> list[str]:
    """Return what the descriptors of a process lead to."""
    links = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links.append(os.readlink(link))
    return links


def test_a_command(external: Daemon) -> None:
    config = command(name="first", token=KEY)
    start_module(external, config)
    address = place(external)
    assert f"127.0.0.1:{address[1]}" == config["bind_address"]
    assert name_at(address) == "first"
    path = config_file_of(status(external)["pid"])
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text()) == config
    first = os.readlink(path)
    refused(try_start(external, config), code="module_already_running")
    assert restart(external, config)["changed"] is False
    assert restart(external, {**config, "name": "second"})["changed"] is True
    assert name_at(address) == "second"
    again = config_file_of(status(external)["pid"])
    assert json.loads(again.read_text())["name"] == "second"
    # The manager has let go of both: they are gone with their processes.
    links = open_files(external.pid)
    assert not {first, os.readlink(again)} & set(links)
    assert stop_module(external) == "module_stopped"
    assert is_free(address)


def test_the_readiness_probe_is_a_whole_conversation(external: Daemon) -> None:
    """The module would log an error for a connection that ends without a word."""
    start_module(external, command("websocket"))
    external.wait_log(lambda r: r["message"] == "8882 03e8 then b''")
    assert stop_module(external) == "module_stopped"


STAND_IN = r"""
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
/* As genvm-modules: KIND --config FILE [--allow-empty-backends], the flag for llm only. */
int main(int argc, char **argv) {
    char config[4096] = "";
    int more = argc == 5 && !strcmp(argv[1], "llm") && !strcmp(argv[4], "--allow-empty-backends");
    if ((argc != 4 && !more) || strcmp(argv[2], "--config")) return 2;
    FILE *file = fopen(argv[3], "r");
    if (!file) return 3;
    fread(config, 1, sizeof config - 1, file);
    char *address = strstr(config, "127.0.0.1:");
    if (!address) return 4;
    struct sockaddr_in place = {.sin_family = AF_INET, .sin_port = htons(atoi(address + 10))};
    place.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int listener = socket(AF_INET, SOCK_STREAM, 0), peer, yes = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(listener, (struct sockaddr *)&place, sizeof place) || listen(listener, 9)) return 5;
    const char *name = more ? "allowed" : argv[1];
    while ((peer = accept(listener, 0, 0)) >= 0) {
        write(peer, name, strlen(name));
        close(peer);
    }
    return 6;
}
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program in the place of GenVM's own."""
    program = tmp_path_factory.mktemp("cc") / "genvm-modules"
    source = program.with_suffix(".c")
    source.write_text(STAND_IN)
    subprocess.run(["cc", "-w", "-o", str(program), str(source)], check=True)
    return program


def test_a_root_with_genvms_own_modules(root: Root, start: Start, stand_in: Path) -> None:
    (root.path / "bin").mkdir()
    shutil.copy(stand_in, root.path / "bin")
    daemon = start()
    config = {"bind_address": f"127.0.0.1:{free_port()}", "lua_script_path": "own.lua"}
    for kind, allow, name in (
        ("llm", False, "llm"),
        ("llm", True, "allowed"),
        ("web", True, "web"),
    ):
        start_module(daemon, config, kind, allow_empty_backends=allow)
        host, _, port = config["bind_address"].rpartition(":")
        assert name_at((host, int(port))) == name
        assert stop_module(daemon, kind) == "module_stopped"


@pytest.mark.parametrize("chosen", ["built-in", "auto"])
def test_the_built_in_modules_beside_it(
    root: Root, start: Start, stand_in: Path, chosen: str
) -> None:
    (root.path / "bin").mkdir()
    program = root.path / "bin" / "genvm-modules"
    if chosen == "built-in":
        shutil.copy(stand_in, program)
    else:  # our own file in its place, or anything else that is no program of GenVM's
        program.write_text("#!/bin/sh\nexit 9\n")
        program.chmod(0o755)
    daemon = start("--modules", f"{{llm: {chosen}, web: {chosen}}}")
    for kind in ("llm", "web"):
        for path in ("/opt/genvm/config/greybox.lua", f"genvm-{kind}-default.lua.mine"):
            config = {"bind_address": ANY_PORT, "lua_script_path": path}
            reply = try_start(daemon, config, kind)
            refused(reply, f'cannot run "{path}"', "bin/genvm-modules", f"modules.{kind}")
        config["lua_script_path"] = f"/opt/genvm/config/genvm-{kind}-default.lua"
        start_module(daemon, config, kind, allow_empty_backends=True)
        assert stop_module(daemon, kind) == "module_stopped"


@pytest.mark.parametrize(("allow", "said"), [(False, "[]"), (True, "[--allow-empty-backends]")])
def test_a_command_is_told_whether_backends_may_be_missing(
    root: Root, start: Start, allow: bool, said: str
) -> None:
    words = ["sh", "-c", 'echo "[$*]" >&2; exit 3', "sh", "{allow_empty_backends}"]
    daemon = start("--modules", json.dumps({"llm": {"command": words}}))
    body = {"module_type": "llm", "config": command(), "allow_empty_backends": allow}
    refused(daemon.request("POST", "/module/start", body), f"its stderr ends: {said}")


def run_alone(kind: str, *flags: str) -> tuple[Daemon, tuple[str, int]]:
    """Start a module without a manager below another process; returns that and the address."""
    argv = [sys.executable, str(SOURCE), kind, *flags]
    parent = Daemon([sys.executable, "-c", PARENT, *argv])

    def listening() -> Any:
        lines = [line for line in parent.errors.split("\n")[:-1] if line.startswith("{")]
        return next((r for r in map(json.loads, lines) if r["message"] == "listening"), None)

    host, _, port = eventually(listening, what="it listens")["address"].rpartition(":")
    return parent, (host, int(port))


def test_a_module_alone(provider: Provider, tmp_path: Path) -> None:
    path = tmp_path / "module.yaml"
    path.write_text(json.dumps(provider.config("echo")))
    parent, address = run_alone("llm", "--config", str(path), "--die-with-parent")
    try:
        assert answer_at(address, "by itself") == "by itself"
        parent.process.kill()
        eventually(lambda: not parent.descendants(), what="it ends with its parent")
    finally:
        parent.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_module_alone_ends_when_it_is_told(tmp_path: Path, number: int) -> None:
    path = tmp_path / "module.yaml"
    path.write_text(json.dumps({"bind_address": ANY_PORT, "backends": {}}))
    parent, _ = run_alone("llm", "--config", str(path), "--allow-empty-backends")
    try:
        (pid,) = parent.descendants()
        kill(pid, number)
        assert parent.wait() == 0
    finally:
        parent.close()


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("llm", '{"backends": {}}', "backends: none can be used"),
        ("web", '{"bind_address": "x"}', "expected host:port"),
        ("web", '{"lua_script_path": "x.lua", "bind_address": "127.0.0.1:0"}', "lua_script_path"),
        ("llm", "[]", "expected a mapping"),
    ],
)
def test_a_module_alone_refuses_what_is_wrong(
    kind: str, text: str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "module.yaml"
    path.write_text(text)
    argv = own_command(kind, "--config", str(path))
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=WAIT)
    assert (done.returncode, reason in done.stderr, done.stdout) == (1, True, "")


def test_kill_9_of_the_manager_leaves_no_configuration(external_root: Root, tmp_path: Path) -> None:
    daemon = Daemon.serve(external_root, environ={"TMPDIR": str(tmp_path)})
    try:
        start_module(daemon, command(name="first", token=KEY))
        pid = status(daemon)["pid"]
        assert json.loads(config_file_of(pid).read_text())["token"] == KEY
        daemon.process.kill()
        within(1.0, lambda: not alive(pid), "the module is gone")
        assert list(tmp_path.iterdir()) == []
    finally:
        daemon.close()


def test_a_command_that_exits_at_once(external: Daemon) -> None:
    begin = time.monotonic()
    refused(
        try_start(external, command("exit", says="no licence\nat all")), "exit code 3", "at all"
    )
    timed("a command that exits at once is an error", time.monotonic() - begin, 0.5)
    now = status(external)
    assert now["state"] == "stopped"
    assert "no licence" in now["last_error"]


def test_what_a_command_prints_is_log(external: Daemon) -> None:
    prints = json.dumps({"event": "ready", "message": "on stdout", "level": "warn"})
    refused(try_start(external, command("exit", prints=prints)), "exit code 3", "on stdout")
    record = external.wait_log(lambda r: r["message"] == "on stdout")
    assert (record["module"], record["level"]) == ("llm", "warn")


def test_a_command_at_an_address_in_use(external: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        refused(try_start(external, command(bind_address=taken)), taken, "in use")


def ask_everything_at_once(daemon: Daemon, configs: list[dict[str, Any]]) -> None:
    """Whatever is asked at once, each request is answered and what follows works."""
    pending = []
    for config in configs:
        for path in ("start", "restart", "stop", "start", "restart"):
            body = {"module_type": "llm", "config": config}
            pending.append(daemon.send("POST", f"/module/{path}", body))
    for one in pending:
        reply = one.reply()
        if reply.status != 200:
            assert reply.json["code"] in ("module_already_running", "module_failed"), reply.json
            assert "in use" not in reply.json["error"], reply.json
    assert status(daemon)["state"] in ("running", "stopped")
    pid = status(daemon)["pid"]
    eventually(lambda: daemon.descendants() == ([pid] if pid else []), what="one process at most")
    if pid is not None:
        assert stop_module(daemon) == "module_stopped"
    start_module(daemon, configs[0])


def test_many_requests_at_once(manager: Daemon, provider: Provider) -> None:
    port = free_port()
    configs = [provider.config(f"named:{n}", bind_address=f"127.0.0.1:{port}") for n in range(2)]
    ask_everything_at_once(manager, configs)
    assert answer_at(place(manager)) == "0"


def test_many_requests_to_a_command_at_once(external: Daemon) -> None:
    config = command()
    ask_everything_at_once(external, [{**config, "name": str(n)} for n in range(4)])
    assert name_at(place(external)) == "0"


def test_a_command_restarted_in_vain(external: Daemon) -> None:
    """What worked before is back, or never left."""
    config = command(name="old")
    start_module(external, config)
    address = place(external)
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        for bad in (command("exit"), command(bind_address=taken)):
            body = {"module_type": "llm", "config": bad}
            refused(external.request("POST", "/module/restart", body))
            assert status(external)["state"] == "running"
            assert place(external) == address
            assert name_at(address) == "old"


def test_a_command_restarted_in_vain_that_does_not_come_back(
    external: Daemon, external_root: Root
) -> None:
    """It is not left in a state in which nothing happens any more."""
    obstacle = external_root.path / "obstacle"
    config = command(name="old", fails_if=str(obstacle))
    start_module(external, config)
    address = place(external)
    obstacle.touch()
    try:
        body = {"module_type": "llm", "config": command("exit", says="new one fails")}
        refused(external.request("POST", "/module/restart", body), "exit code 3")
    finally:
        obstacle.unlink()
    now = status(external)
    if now["state"] in ("stopped", "failed"):
        start_module(external, config)
    eventually(lambda: status(external)["state"] == "running", what="it comes back")
    assert name_at(address) == "old"


def test_a_command_whose_address_is_taken_when_it_dies(external: Daemon) -> None:
    """Another's listener does not pass for the module's."""
    start_module(external, command(name="mine"))
    address = place(external)

    def take() -> socket.socket | None:
        try:
            return socket.create_server(address)
        except OSError:
            if (pid := status(external)["pid"]) is not None:
                kill(pid)
            return None

    other = eventually(take)
    assert other is not None
    with other:
        eventually(lambda: "in use" in (status(external)["last_error"] or ""))
        assert status(external)["state"] == "starting"
    eventually(lambda: status(external)["state"] == "running")
    assert name_at(address) == "mine"


def test_stop_while_it_starts(external: Daemon) -> None:
    body = {"module_type": "web", "config": command()}
    starting = external.send("POST", "/module/start", body)
    eventually(external.descendants)
    assert status(external, "web")["state"] == "starting"
    refused(try_start(external, command(), "web"), code="module_already_running")
    begin = time.monotonic()
    stop_module(external, "web")
    timed("a stop while it starts", time.monotonic() - begin, 0.5)
    refused(starting.reply(), "signal 9")
    assert status(external, "web")["state"] == "stopped"


def test_secrets_of_a_command_that_dies(external: Daemon) -> None:
    secret = "s3cret-which-a-command-tells"
    start_module(external, command("brief", says=f"bye {secret}", api_key=secret))
    eventually(lambda: "it died" in (status(external)["last_error"] or ""))
    assert secret not in external.request("GET", "/status").raw.decode()
    assert secret not in external.text


def test_secrets_of_a_command_that_does_not_start(external: Daemon) -> None:
    """They are masked as a whole even where only the end of a long text is kept."""
    secret = "s3cret-" + "0123456789" * 5
    for filler in (0, 4096 - 30):
        said = secret + "x" * filler
        text = refused(try_start(external, command("exit", says=said, api_key=secret)))
        for piece in (secret, secret[-25:]):
            assert piece not in text
            assert piece not in external.request("GET", "/status").raw.decode()
            assert piece not in external.text


def test_sigterm_of_the_manager_while_modules_start(external_root: Root) -> None:
    """One starts and never listens, the other one waits to be started again."""
    daemon = Daemon.serve(external_root)
    try:
        start_module(daemon, command())
        body = {"module_type": "web", "config": command()}
        starting = daemon.send("POST", "/module/start", body)
        eventually(lambda: status(daemon, "web")["state"] == "starting")
        kill_module(daemon)
        ends_on_sigterm(daemon, "SIGTERM of the manager while modules start")
        refused(starting.reply())
        daemon.wait()
        assert daemon.errors == ""
    finally:
        daemon.close()


def test_sigterm_of_the_manager_with_a_stubborn_command(external_root: Root) -> None:
    daemon = Daemon.serve(external_root)
    try:
        start_module(daemon, command("stubborn"))
        ends_on_sigterm(daemon, "SIGTERM of the manager with a stubborn command")
        assert processes_with(daemon.marker) == []
    finally:
        daemon.close()


def test_what_a_start_costs(manager: Daemon, provider: Provider) -> None:
    """Work of the processor until a module accepts connections, measured at its best."""
    costs = []
    for _ in range(3):
        start_module(manager, provider.config("named:x"))
        costs.append(cpu_of(status(manager)["pid"]))
        stop_module(manager)
    report(f"a start of the LLM module costs {min(costs):.2f} s of the processor")
    assert min(costs) < 2.0


def test_one_never_listens_and_one_keeps_dying(external_root: Root) -> None:
    """Both take their time, so they share it."""
    # Nobody gives up a module that does not listen; the other one is tried again four times.
    ready, shortest = 600, 0.2
    constants = {"MODULE_READY_SECONDS": ready, "MODULE_BACKOFF_SECONDS": (shortest, 60)}
    external = Daemon.serve(external_root, constants=constants)
    try:
        begin = time.monotonic()
        silent = external.send("POST", "/module/start", {"module_type": "web", "config": command()})
        eventually(lambda: status(external, "web")["waits_for"] is not None)
        before = status(external)
        start_module(external, command("brief", says="cannot go on"))
        eventually(lambda: status(external)["state"] == "failed", what="it has failed")
        assert time.monotonic() - begin > 0.9 * shortest * (1 + 2 + 4 + 8)
        now = status(external)
        assert now["restarts"] - before["restarts"] == MODULE_QUICK_DEATHS - 1
        assert "exit code 5" in now["last_error"]
        assert "cannot go on" in now["last_error"]
        assert now["pid"] is now["address"] is None
        # The other one.
        assert status(external, "web")["state"] == "starting"
        assert f"s of {ready}" in status(external, "web")["waits_for"]
        stop_module(external, "web")
        refused(silent.reply())
        assert status(external, "web")["state"] == "stopped"
        # It has failed, which is not for ever: it can be started, and begins to count anew.
        start_module(external, command(name="better"))
        kill_module(external)
        eventually(lambda: status(external)["state"] != "starting")
        assert status(external)["state"] == "running", status(external)["last_error"]
        assert name_at(place(external)) == "better"
    finally:
        external.close()


# --- all of it together ---


def test_contract_executor_module_provider_host(
    manager: Daemon, shared_root: Root, provider: Provider
) -> None:
    start_module(manager, provider.config("echo"))
    host, port = place(manager)
    manager.post("/env", {"key": "GENVM_LLM_MODULE", "value": f"ws://{host}:{port}"})
    manager.post("/log/level", {"level": "debug"})
    code = 'on method m\nask-llm Is it so?\nstore told "$last"\nreturn ["$storage.told"]\n'
    try:
        with serving(Host(shared_root.path / "host.sock", code)) as made:
            made.calls({"method": "m", "args": [], "kwargs": {}})
            host_data = json.dumps({"node_address": "0xaa", "tx_id": "0xbb"})
            genvm_id = manager.run(host=made.uri, host_data=host_data, is_sync=False)
            assert made.outcome() == ("return", ["Is it so?"])
            manager.result(genvm_id)
        record = manager.wait_log(
            lambda r: r["message"] == "an executor connected" and r.get("cookie") != "debugged"
        )
    finally:
        manager.post("/log/level", {"level": "info"})
    assert record["module"] == "llm"
    assert str(genvm_id) in (record.get("cookie"), str(record.get("genvm_id")))
    assert provider.requests[-1]["messages"][-1]["content"][0]["text"] == "Is it so?"
