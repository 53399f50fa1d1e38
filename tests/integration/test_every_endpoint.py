"""Every endpoint, its success and its failures, and some of them for each way to start the manager.

What each of them does in detail is in the other files, on a daemon that listens on TCP.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from .support import TIMESTAMP, VERSION, Daemon, Root, eventually, run_body

MOMENT = {"Deployment-Timestamp": TIMESTAMP}
BROKEN = "v1.0.0"
SETTINGS = {"PERMITS": "2", "QUEUE_LIMIT": "1", "MAX_BODY_BYTES": "100000"}
MODULE: dict[str, Any] = {"module_type": "web", "config": {"bind_address": "127.0.0.1:0"}}


@pytest.fixture(scope="module")
def made_root() -> Iterator[Root]:
    """A root with the practice executor, and an executor of major 1 that cannot be started."""
    root = Root()
    root.practice()
    root.script("exit 0", BROKEN).chmod(0o644)
    root.write_manifest(dict.fromkeys((VERSION, BROKEN), "2025-01-01T00:00:00Z"))
    yield root
    root.close()


@contextlib.contextmanager
def started_by(way: str, root: Root) -> Iterator[Daemon]:
    """The manager, started in one of the ways, with 2 permits; at the end nothing is left of it."""
    command, _, listener = way.partition(" ")
    path = root.path / f"{command}.sock"
    if command == "twistd":
        listen = {"PORT": "", "SOCKET": str(path)} if listener == "unix" else {}
        started = Daemon.twistd(root, **SETTINGS, **listen)
        started.wait_until_listening()
    else:
        flags = ("--socket", str(path)) if listener == "unix" else ("--port", "0")
        environ = {f"GENVM_MANAGER_{name}": text for name, text in SETTINGS.items()}
        started = Daemon.serve(root, command=command, listen=flags, environ=environ)
    try:
        assert started.address.startswith("unix://" if listener == "unix" else "127.0.0.1:")
        yield started
        assert started.stop() == 0
        assert started.descendants() == []
        assert not path.exists()
    finally:
        started.close()


@pytest.fixture(scope="module")
def daemon(made_root: Root) -> Iterator[Daemon]:
    """The manager; each test leaves it idle and with 2 permits."""
    with started_by("serve tcp", made_root) as started:
        yield started


@pytest.mark.parametrize("way", ["serve unix", "manager tcp", "twistd tcp", "twistd unix"])
def test_another_way_to_start_it(made_root: Root, way: str) -> None:
    """All of it is assembled: runs, modules, contracts; its settings hold; errors are answered."""
    with started_by(way, made_root) as daemon:
        limits = {"max": 2, "current": 2, "in_use": 0, "waiting": 0}
        assert daemon.get("/status")["permits"] == limits
        result = daemon.result(daemon.run("print hello", "exit 3"))
        assert (result["stdout"], result["exit_code"], result["cause"]) == ("hello\n", 3, "exited")
        second = daemon.run("sleep 600", is_sync=False)
        assert daemon.request("DELETE", f"/genvm/{second}").status == 200
        assert daemon.post("/module/start", MODULE) == {"result": "module_started"}
        assert daemon.post("/module/stop", MODULE) == {"result": "module_stopped"}
        reply = daemon.request("POST", "/contract/detect-version", b"# v0.1.0\n", MOMENT)
        assert (reply.status, set(reply.json)) == (200, {"specified_major"}), reply.raw
        for body, status, code in (
            (run_body(major=1), 500, "spawn_failed"),
            (b" " * 100_001, 413, "body_too_large"),
        ):
            reply = daemon.request("POST", "/genvm/run", body)
            assert (reply.status, reply.json["code"]) == (status, code), reply.raw


def test_successes(daemon: Daemon) -> None:
    status = daemon.get("/status")
    assert status["permits"] == {"max": 2, "current": 2, "in_use": 0, "waiting": 0}
    genvm_id = daemon.run("print hello", "exit 3")
    result = daemon.result(genvm_id)
    assert (result["stdout"], result["exit_code"], result["cause"]) == ("hello\n", 3, "exited")
    second = daemon.run("sleep 600", is_sync=False)
    assert daemon.get(f"/genvm/{second}") == {"genvm_id": second, "status": None}
    reply = daemon.request("DELETE", f"/genvm/{second}")
    assert reply.json == {"result": "shutdown_completed", "genvm_id": second}
    assert daemon.result(second)["cause"] == "cancelled"
    assert daemon.get("/permits") == {"permits": 2, "available": 2, "in_use": 0, "waiting": 0}
    body: Any
    for path, body, answer in (
        ("/permits", {"permits": 2}, {"result": "permits_set", "permits": 2}),
        ("/log/level", {"level": "INFO"}, {"result": "log_level_set", "level": "info"}),
        ("/manifest/reload", None, {"result": "manifest_reloaded"}),
        ("/env", {"key": "A_KEY", "value": "v"}, {"result": "env_var_set", "key": "A_KEY"}),
        ("/drain", None, {"result": "draining"}),
        ("/undrain", None, {"result": "accepting"}),
        ("/llm/check", {"configs": [], "test_prompts": []}, []),
        ("/module/start", MODULE, {"result": "module_started"}),
        ("/module/stop", MODULE, {"result": "module_stopped"}),
        ("/module/stop", MODULE, {"result": "module_not_running"}),
    ):
        assert daemon.post(path, body) == answer
    assert daemon.post("/module/restart", MODULE)["result"] == "module_restarted"
    assert daemon.post("/module/stop", MODULE) == {"result": "module_stopped"}
    code = b'# v0.1.0\non schema\nreturn "{}"\n'
    for path, key in (
        ("/contract/detect-version", "specified_major"),
        ("/contract/pre-deploy-writes", "writes"),
        ("/genvm/run/readonly", "schema"),
    ):
        reply = daemon.request("POST", path, code, MOMENT)
        assert (reply.status, set(reply.json)) == (200, {key}), reply.raw


FAILURES: list[tuple[str, str, Any, dict[str, str], int, str]] = [
    ("GET", "/nothing", None, {}, 404, "endpoint_not_found"),
    ("POST", "/status", None, {}, 405, "method_not_allowed"),
    ("GET", "/status", None, {"Origin": "http://evil.example"}, 403, "cross_site_request"),
    ("POST", "/genvm/run", b"{", {}, 500, "invalid_request"),
    ("POST", "/genvm/run", {}, {}, 500, "invalid_request"),
    ("POST", "/genvm/run", run_body(major=7), {}, 500, "version_not_available"),
    ("POST", "/genvm/run", run_body(major=1), {}, 500, "spawn_failed"),
    ("POST", "/genvm/run", b" " * 100_001, {}, 413, "body_too_large"),
    ("GET", "/genvm/999999", None, {}, 404, "execution_not_found"),
    ("GET", "/genvm/999999?wait=soon", None, {}, 404, "execution_not_found"),
    ("DELETE", "/genvm/999999", None, {}, 404, "execution_not_found"),
    ("POST", "/permits", {"permits": True}, {}, 500, "invalid_request"),
    ("POST", "/log/level", {"level": "loud"}, {}, 500, "invalid_request"),
    ("POST", "/env", {"key": "PATH", "value": "x"}, {}, 500, "environment_refused"),
    ("POST", "/llm/check", {"configs": 1, "test_prompts": []}, {}, 500, "invalid_request"),
    ("POST", "/module/start", {"module_type": "gpu"}, {}, 500, "invalid_request"),
    ("POST", "/module/start", {"module_type": "web"}, {}, 500, "module_failed"),
    ("POST", "/module/stop", {}, {}, 500, "invalid_request"),
    ("POST", "/module/restart", {"module_type": "web"}, {}, 500, "module_failed"),
    ("POST", "/contract/detect-version", b"x", {}, 500, "invalid_request"),
    ("POST", "/contract/pre-deploy-writes", b"", MOMENT, 500, "invalid_request"),
    ("POST", "/contract/pre-deploy-writes", b"# v1.0.0", MOMENT, 500, "unsupported_major"),
    ("POST", "/genvm/run/readonly", b"# v0.1.0\nnonsense", MOMENT, 500, "contract_failed"),
]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "code"),
    FAILURES,
    ids=[f"{method} {path} {code}" for method, path, _, _, _, code in FAILURES],
)
def test_failures(
    daemon: Daemon,
    method: str,
    path: str,
    body: Any,
    headers: dict[str, str],
    status: int,
    code: str,
) -> None:
    reply = daemon.request(method, path, body, headers)
    assert (reply.status, reply.json["code"]) == (status, code), reply.raw
    assert reply.json["error"]
    assert reply.json["retryable"] is False
    assert daemon.permits() == {"permits": 2, "available": 2, "in_use": 0, "waiting": 0}


def test_failures_that_depend_on_what_goes_on(daemon: Daemon, made_root: Root) -> None:
    # A bad manifest.
    good = made_root.manifest.read_text()
    made_root.manifest.write_text("executor_versions:\n  v0.2.0: {available_after: soon}\n")
    try:
        reply = daemon.request("POST", "/manifest/reload")
    finally:
        made_root.manifest.write_text(good)
    assert (reply.status, reply.json["code"]) == (500, "manifest_invalid")
    # An executor that has to be killed, and one that was asked for in a wrong way.
    up = made_root.path / "up"
    genvm_id = daemon.run("ignore-sigterm", f"touch {up}", "sleep 600")
    eventually(up.exists)
    up.unlink()
    reply = daemon.request("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms=soon")
    assert (reply.status, reply.json["code"]) == (500, "invalid_request")
    reply = daemon.request("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms=50")
    assert (reply.status, reply.json["code"]) == (500, "shutdown_timeout")
    # A full queue; whoever waits is told when it is taken off.
    daemon.post("/permits", {"permits": 0})
    queued = daemon.send("POST", "/genvm/run", run_body("exit 0"))
    daemon.waiting(1)
    reply = daemon.request("POST", "/genvm/run", run_body("exit 0"))
    assert (reply.status, reply.json["code"]) == (503, "queue_full")
    waiting = next(iter(daemon.get("/status")["executions"]))
    assert daemon.request("DELETE", f"/genvm/{waiting}").status == 200
    reply = queued.reply()
    assert (reply.status, reply.json["code"]) == (500, "execution_cancelled")
    # A client that leaves the queue.
    leaver = daemon.send("POST", "/genvm/run", run_body("exit 0"))
    daemon.waiting(1)
    leaver.close()
    daemon.waiting(0)
    daemon.post("/permits", {"permits": 2})
    # A drain.
    daemon.post("/drain")
    for path, body in (("/genvm/run", run_body("exit 0")), ("/genvm/run/readonly", b"# v0.1.0")):
        reply = daemon.request("POST", path, body, MOMENT)
        assert (reply.status, reply.json["code"]) == (503, "draining")
        assert int(reply.headers["retry-after"]) >= 1
    daemon.post("/undrain")
    # A module that runs already.
    daemon.post("/module/start", MODULE)
    reply = daemon.request("POST", "/module/start", MODULE)
    assert (reply.status, reply.json["code"]) == (500, "module_already_running")
    daemon.post("/module/stop", MODULE)
    assert daemon.idle()
