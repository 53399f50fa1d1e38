"""Memory that was used comes back: nothing waits for a garbage collection; the system gets it.

The garbage collector is off in the processes that are looked at here, and what it would have had to
free is counted.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ..integration.conftest import Start
from ..integration.executor_client import HELLO, Client
from ..integration.support import (
    Daemon,
    Root,
    eventually,
    memory_of,
    report,
    run_body,
    shell,
)
from ..soak.acts import CONTRACT, HEADER
from .support import times

COUNTER = """
import gc, json, os, signal

def is_spent(thing):
    # Klein's resource leaves each request in a cycle of its own functions; by then it has neither
    # a connection nor a body nor what it would send.
    if type(thing).__name__ != "ApiRequest":
        return False
    held = vars(thing)
    content = held.get("content")
    return not (held.get("channel") or held.get("producer")) and (
        content is None or content.closed)

def count(*_):
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    kinds = [type(thing).__name__ for thing in gc.garbage
             if type(thing).__module__ == "genvm_manager" and not is_spent(thing)]
    gc.set_debug(0)
    gc.garbage.clear()
    gc.collect()
    path = os.path.join(os.environ["GARBAGE"], str(os.getpid()))
    with open(path + ".new", "w") as file:
        json.dump({kind: kinds.count(kind) for kind in kinds}, file)
    os.rename(path + ".new", path)

gc.disable()
signal.signal(signal.SIGRTMIN, count)
"""

#: A provider that is not there.
CLOSED = {"host": "http://127.0.0.1:1", "provider": "ollama", "model": "m", "key": "none-needed"}


class Counted:
    """A daemon without garbage collection, as are its modules."""

    def __init__(self, root: Root, folder: Path) -> None:
        (folder / "sitecustomize.py").write_text(COUNTER)
        self._folder = folder
        self.daemon = Daemon.serve(
            root,
            *("--permits", "2", "--retention-max-bytes", "1"),
            environ={"PYTHONPATH": str(folder), "GARBAGE": str(folder)},
        )

    def garbage(self, pid: int) -> dict[str, int]:
        """Return how many things of ours only a collection of garbage frees, by their kind."""
        path = self._folder / str(pid)
        os.kill(pid, signal.SIGRTMIN)
        eventually(path.exists, what="the garbage is counted")
        found = json.loads(path.read_text())
        path.unlink()
        return dict(found)

    def nothing_left(self, what: str) -> None:
        """Check that no garbage is left of something, once the daemon has had a turn."""
        for _ in range(3):
            self.daemon.get("/permits")
        assert self.garbage(self.daemon.pid) == {}, what


@pytest.fixture
def counted(root: Root, tmp_path: Path) -> Iterator[Counted]:
    root.add_shell()
    counted = Counted(root, tmp_path)
    counted.nothing_left("the start")
    yield counted
    counted.daemon.close()


def test_what_has_ended_is_freed_at_once(counted: Counted) -> None:
    daemon = counted.daemon
    for captured in (True, False):
        for _ in range(3):
            daemon.result(daemon.run(**shell("echo x; echo y >&2", capture_output=captured)))
        counted.nothing_left(f"runs, {captured=}")
    for body in (run_body(is_sync=3), run_body(major=7), {}):
        assert daemon.request("POST", "/genvm/run", body).status == 500
    counted.nothing_left("requests that are refused")
    for path in ("genvm/run/readonly", "contract/detect-version", "contract/pre-deploy-writes"):
        for code in (CONTRACT, b"no contract"):
            for _ in range(3):
                daemon.request("POST", f"/{path}", code, HEADER)
            counted.nothing_left(f"{path} of {code!r}")
    check = {"configs": [CLOSED], "test_prompts": [{"user_message": "x"}] * 2}
    for _ in range(3):
        assert len(daemon.post("/llm/check", check)) == 2
    counted.nothing_left("checks of a provider")


def test_a_run_that_cannot_be_spawned_is_freed_at_once(counted: Counted, root: Root) -> None:
    daemon = counted.daemon
    (root.path / "executor" / "v0.1.0" / "bin" / "genvm").unlink()
    for _ in range(3):
        assert daemon.request("POST", "/genvm/run", run_body()).json["code"] == "spawn_failed"
    counted.nothing_left("runs that cannot be spawned")


def test_a_request_that_waits_no_more_is_freed_at_once(counted: Counted) -> None:
    daemon = counted.daemon
    daemon.post("/permits", {"permits": 1})
    running = daemon.run(**shell("sleep 300"))

    polls = [daemon.send("GET", f"/genvm/{running}?wait=60s") for _ in range(3)]
    daemon.get(f"/genvm/{running}?wait=10ms")
    for poll in polls:
        poll.close()
    counted.nothing_left("polls that are abandoned")

    waiting = [daemon.send("POST", "/genvm/run", run_body()) for _ in range(4)]
    daemon.waiting(4)
    for request in waiting[:2]:
        request.close()
    daemon.waiting(2)
    counted.nothing_left("waiting runs that are abandoned")

    for genvm_id in daemon.get("/status")["executions"]:
        daemon.request("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms=0")
    for request in waiting[2:]:
        assert request.reply().json["code"] == "execution_cancelled"
    daemon.run(**shell("exit 0"))
    eventually(daemon.idle)
    counted.nothing_left("runs that are ended")


def test_generations_and_conversations_are_freed_at_once(counted: Counted) -> None:
    daemon = counted.daemon
    module: dict[str, Any] = {"module_type": "llm", "allow_empty_backends": True}
    for number in range(2):
        config = {"bind_address": "127.0.0.1:0", "backends": {}, "number": number}
        daemon.post("/module/restart", {**module, "config": config})

    def module_status() -> Any:
        return daemon.get("/status")["modules"]["llm"]

    state = module_status()
    host, _, port = state["address"].rpartition(":")
    assert counted.garbage(state["pid"]) == {}, "the start of a module"

    def connections(count: int) -> Callable[[], bool]:
        return lambda: module_status()["stats"].get("connections") == count

    for leaving in (True, False):
        client = Client((host, int(port)))
        client.send(HELLO)
        assert "FatalError" in client.prompt("anything")
        eventually(connections(1), what="the module saw the client")
        client.leave() if leaving else client.close()
        eventually(connections(0), what="the module saw it leave")
        assert counted.garbage(state["pid"]) == {}, "a conversation"
    daemon.post("/module/stop", {"module_type": "llm"})
    counted.nothing_left("a module")


def test_memory_comes_back_when_results_are_dropped(root: Root, start: Start) -> None:
    """8 MiB a run: the results that are kept are within their limit, and then they expire."""
    root.add_shell()
    kept, most = 64 << 20, 30 << 20
    daemon = start(
        *("--permits", "4", "--retention-max-bytes", str(kept), "--execution-retention", "20s")
    )
    zeros = "head -c 4194304 /dev/zero | tr '\\0' x"

    def run(_: int) -> None:
        status = daemon.result(daemon.run(**shell(f"{zeros}; {zeros} >&2")))
        assert len(status["stdout"]) == len(status["stderr"]) == 4 << 20

    def resident() -> int:
        return memory_of(daemon.pid, "VmRSS")

    daemon.result(daemon.run(**shell("exit 0")))
    before = resident()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(times(60, 600))))
    loaded = resident()
    assert loaded < before + kept + 3 * most, "what is dropped is given back meanwhile"
    eventually(lambda: resident() < before + most, 90.0, "memory is as it was before the load")
    report(f"resident MiB: {before >> 20} before, {loaded >> 20} loaded, {resident() >> 20} after")


def test_memory_comes_back_after_large_requests(root: Root, start: Start) -> None:
    """Read-only runs, deployment writes, checks and messages, each of some MiB."""
    daemon = start("--permits", "4", "--execution-retention", "5s")
    header = {"Deployment-Timestamp": "2025-06-01T00:00:00Z"}
    large = CONTRACT + b"\n#" + b"x" * (10 << 20)

    def ask(number: int) -> None:
        if number % 4 == 0:
            assert daemon.request("POST", "/genvm/run/readonly", large, header).status == 200
        elif number % 4 == 1:
            assert (
                daemon.request("POST", "/contract/pre-deploy-writes", large, header).status == 200
            )
        elif number % 4 == 2:
            body = {"configs": [], "test_prompts": [{"user_message": "x" * (10 << 20)}]}
            assert daemon.request("POST", "/llm/check", body).status in (200, 500)
        else:
            body = run_body("exit 0", major=7, message={"x": "x" * (10 << 20)})
            assert daemon.request("POST", "/genvm/run", body).status == 500

    def resident() -> int:
        return memory_of(daemon.pid, "VmRSS")

    for number in range(4):
        ask(number)
    before = resident()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(times(40, 400))))
    loaded = resident()
    eventually(lambda: resident() < before + (30 << 20), 90.0, "memory is as it was before")
    report(f"resident MiB: {before >> 20} before, {loaded >> 20} loaded, {resident() >> 20} after")


#: Of one run: as much as the kernel passes on.
TEXTS = {"extra_args": ["x" * 131_000] * 10}


def test_the_texts_of_finished_runs_are_not_kept(root: Root, start: Start) -> None:
    """1.4 MB a run, of which nothing is needed once it has been started."""
    root.script("exit 0")
    daemon = start("--permits", "4", "--retention-max-bytes", str(1 << 30))

    def run(number: int) -> int:
        headers = {"Idempotency-Key": f"{number}-{'k' * 100}"}
        reply = daemon.request("POST", "/genvm/run", run_body(**TEXTS), headers)
        assert reply.status == 200, reply.raw
        daemon.result(reply.json["id"])
        return int(reply.json["id"])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(20)))
        before = memory_of(daemon.pid, "VmRSS")
        ids = list(pool.map(run, range(100, 100 + times(240, 1000))))
    grown = memory_of(daemon.pid, "VmRSS") - before
    report(f"{len(ids)} finished runs of 1.3 MB: {grown / (1 << 20):.1f} MiB more")
    assert daemon.get(f"/genvm/{ids[0]}")["status"]["exit_code"] == 0, "it is kept"
    assert grown < 40 << 20
    # Who asks again still gets his run, and nobody another's.
    assert run(100) == ids[0]
    other = run_body(**{**TEXTS, "extra_args": ["x" * 131_000] * 9})
    reply = daemon.request("POST", "/genvm/run", other, {"Idempotency-Key": f"100-{'k' * 100}"})
    assert "already used with a different request" in reply.json["error"]


def test_waiting_runs_have_only_so_many_bytes(root: Root, start: Start) -> None:
    """A client that fills the queue with large requests is refused; small ones still wait."""
    root.script("exit 0")
    daemon = start("--permits", "0", "--queue-max-bytes", str(16 << 20))
    daemon.get("/status")
    before = memory_of(daemon.pid, "VmRSS")
    body = run_body(**TEXTS)
    pending = [daemon.send("POST", "/genvm/run", body) for _ in range(12)]
    daemon.waiting(12)
    for _ in range(times(100, 1000)):
        reply = daemon.request("POST", "/genvm/run", body)
        assert (reply.status, reply.json["code"]) == (503, "queue_full")
        assert reply.json["retryable"] is True
    pending.append(daemon.send("POST", "/genvm/run", run_body()))
    daemon.waiting(13)
    grown = memory_of(daemon.pid, "VmRSS") - before
    report(f"12 waiting runs of 1.3 MB: {grown / (1 << 20):.1f} MiB more")
    assert grown < 64 << 20
    daemon.request("DELETE", f"/genvm/{max(daemon.get('/status')['executions'], key=int)}")
    pending.pop().reply()
    daemon.post("/permits", {"permits": 4})
    for one in pending:
        assert daemon.result(one.reply().json["id"])["exit_code"] == 0
    # What has started does not count any more.
    daemon.post("/permits", {"permits": 0})
    again = [daemon.send("POST", "/genvm/run", body) for _ in range(12)]
    daemon.waiting(12)
    for one in again:
        one.close()
    daemon.waiting(0)
    daemon.post("/permits", {"permits": 4})
    assert daemon.result(daemon.run(**TEXTS))["exit_code"] == 0


def test_bodies_of_waiting_runs_are_not_kept(root: Root, start: Start) -> None:
    """A body may have more than what a run is made of: fields that are not known are ignored."""
    root.script("exit 0")
    daemon = start("--permits", "0")
    daemon.get("/status")
    before = memory_of(daemon.pid, "VmRSS")
    body = run_body(padding="x" * 60_000)
    pending = [daemon.send("POST", "/genvm/run", body) for _ in range(600)]
    daemon.waiting(600)
    grown = memory_of(daemon.pid, "VmRSS") - before
    report(f"600 waiting runs with bodies of 60 kB: {grown / (1 << 20):.1f} MiB more")
    assert grown < 24 << 20
    for one in pending:
        one.close()
    daemon.waiting(0)
