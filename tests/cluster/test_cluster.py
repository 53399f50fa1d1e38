"""Three managers behind HAProxy, as README has it: where requests go, and what an end costs.

HAProxy's state is awaited by its own command, the managers' by what they answer.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from genvm_manager import MAX_WAIT_SECONDS, own_command, parse_duration

from ..integration.support import (
    TIMESTAMP,
    WAIT,
    Daemon,
    Pending,
    eventually,
    message,
    report,
    run_body,
    shell,
)
from ..integration.test_client import flags
from .support import (
    FRONT,
    HAPROXY,
    INSTANCES,
    MANAGERS,
    NAME,
    Cluster,
    Proxy,
    answer_of,
    events_of,
    is_retryable,
    of,
    readme_configuration,
)

pytestmark = pytest.mark.skipif(
    HAPROXY is None and "GENVM_REQUIRE_HAPROXY" not in os.environ, reason="needs haproxy"
)
FULL = shell("exec sleep 600", is_sync=False)
"""A run that takes two of a manager's four permits until somebody ends it."""


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[Cluster]:
    """The cluster of all tests but those of the token."""
    made = Cluster("--allowed-hosts", NAME)
    yield made
    made.close()


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Cluster:
    """The cluster as at its start, whatever the test before has left."""
    shared_cluster.settle()
    return shared_cluster


@pytest.fixture
def hasty_proxy(cluster: Cluster, tmp_path: Path) -> Iterator[Proxy]:
    """Another HAProxy before the cluster, with README's time for a health check."""
    made = Proxy.start(tmp_path, [m.address for m in cluster.managers], is_hasty=True)
    yield made
    made.close()


def post(daemon: Daemon, changes: dict[str, object], **headers: str) -> Pending:
    """Ask for an execution."""
    names = {name.replace("_", "-"): text for name, text in headers.items()}
    body = run_body(**{"max_execution_minutes": 30, **changes})
    return daemon.send("POST", "/genvm/run", body, names)


def run(daemon: Daemon, changes: dict[str, object], **headers: str) -> int:
    """Start an execution that must start, and return its id."""
    return int(answer_of(post(daemon, changes, **headers).reply())["id"])


def fill(cluster: Cluster, *instances: int) -> dict[int, list[int]]:
    """Take all permits of some managers; returns once HAProxy knows; gives the runs."""
    held = {i: [run(cluster.managers[i], FULL) for _ in range(2)] for i in instances}
    cluster.proxy.wait_up("genvm", *(i for i in INSTANCES if i not in instances))
    return held


def waiting(cluster: Cluster) -> list[int]:
    """Return how many runs wait at each manager."""
    return [manager.permits()["waiting"] for manager in cluster.managers]


# --- what README says ---


def test_the_configuration_is_short_and_waits_for_longer_than_anybody_may_ask() -> None:
    text = readme_configuration()
    assert len(text.splitlines()) <= 40
    assert text.count(FRONT) == 1
    assert [text.count(address) for address in MANAGERS] == [4, 4, 4]
    limits = dict(re.findall(r"timeout (client|server) +(\w+)", text))
    for side in ("client", "server"):
        days, unit = limits[side][:-1], limits[side][-1]
        seconds = int(days) * 86400 if unit == "d" else parse_duration(limits[side])
        assert seconds > MAX_WAIT_SECONDS + 15, side


# --- where requests go ---


def test_who_waits_at_a_terminal_need_not_be_told_how_far_it_is(cluster: Cluster) -> None:
    """HAProxy passes no lists on, by which a terminal is told."""
    main, side = os.openpty()
    try:
        words = flags("print hello", timestamp=TIMESTAMP)
        command = own_command(
            "run", *words, "--wait", "--server", f"http://{cluster.proxy.address}"
        )
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=side, text=True, timeout=WAIT, check=False
        )
    finally:
        os.close(main)
        os.close(side)
    assert (done.returncode, done.stdout) == (5, "hello\n"), "it has no host to report to"


def test_what_is_asked_of_an_execution_comes_to_its_manager(cluster: Cluster) -> None:
    proxy = cluster.proxy
    for instance, manager in enumerate(cluster.managers):
        assert manager.get("/status")["instance"] == instance
        go = cluster.root.path / f"go{instance}"
        os.mkfifo(go)
        genvm_id = run(manager, shell(f"echo first; cat {go}; exec sleep 600"))
        assert of(genvm_id) == instance
        others = [m for m in cluster.managers if m is not manager]
        assert {m.request("GET", f"/genvm/{genvm_id}").status for m in others} == {404}
        assert proxy.get(f"/genvm/{genvm_id}")["status"] is None
        stream = events_of(proxy, f"/genvm/{genvm_id}/events")
        assert "first" in next(line for line in stream if line.startswith("data"))
        go.write_text("second\n")  # which comes at once, not when a buffer is full
        assert "second" in next(line for line in stream if line.startswith("data"))
        held = proxy.send("GET", f"/genvm/{genvm_id}?wait=60s")
        stopped = proxy.request("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms=20000")
        assert stopped.json == {"result": "shutdown_completed", "genvm_id": genvm_id}
        assert answer_of(held.reply())["status"]["stdout"] == "first\nsecond\n"
        assert "event: finished" in [*stream]
        unknown = proxy.request("GET", f"/genvm/{genvm_id + 100}")
        assert (unknown.status, unknown.json["code"]) == (404, "execution_not_found")
    assert is_retryable(proxy.request("GET", "/genvm/99")), "no manager has this instance"


def test_new_runs_go_where_permits_are_free_and_else_wait_in_the_managers(cluster: Cluster) -> None:
    proxy = cluster.proxy
    held = fill(cluster, 0, 1)
    assert {of(run(proxy, FULL)) for _ in range(2)} == {2}, "as many as fit"
    proxy.wait_up("genvm")
    queued = [post(proxy, shell("exec sleep 600")) for _ in range(3)]
    eventually(lambda: waiting(cluster) == [1, 1, 1], what="they wait, and share the queues")
    queued.pop(0).close()
    eventually(lambda: sum(waiting(cluster)) == 2, what="one that left is gone from its queue")
    for instance in (0, 1):
        for genvm_id in held[instance]:
            answer_of(proxy.request("DELETE", f"/genvm/{genvm_id}"))
    eventually(lambda: waiting(cluster)[:2] == [0, 0], what="their turn has come")
    ids = [int(answer_of(pending.reply())["id"]) for pending in queued]
    assert 2 not in map(of, ids), "who waited where nothing got free has moved"
    proxy.wait_up("genvm", 0, 1)
    later = [run(proxy, shell("exec sleep 600")) for _ in range(2)]
    assert 2 not in map(of, later), "nobody goes where all is taken while others are free"


def test_the_more_permits_are_free_the_more_new_runs_come(cluster: Cluster) -> None:
    """One after the other, so that no manager has more requests under way than another."""
    for manager, (permits, held) in zip(cluster.managers, ((8, 0), (8, 4), (40, 38)), strict=True):
        manager.post("/permits", {"permits": permits})
        for _ in range(held):
            run(manager, shell("exec sleep 600"))
    cluster.proxy.wait_weights(8, 4, 2)
    ids = []
    for _ in range(42):
        ids.append(run(cluster.proxy, shell("true")))
        cluster.proxy.result(ids[-1])
    counts = Counter(map(of, ids))
    assert counts[0] > counts[1] > counts[2] > 0, counts
    assert counts[0] > 42 * 0.45, "about 24, 12, 6"
    report(f"of 42 runs, with 8, 4 and 2 free permits: {counts}")


def test_a_burst_for_more_permits_than_there_are(cluster: Cluster) -> None:
    """HAProxy may not know yet that a manager has few; those too many there move to another."""
    proxy, managers = cluster.proxy, cluster.managers
    for manager, permits in zip(managers, (40, 20, 0), strict=True):
        manager.post("/permits", {"permits": permits})
    proxy.wait_weights(40, 20, 0)
    managers[0].post("/permits", {"permits": 2})
    begin = time.monotonic()
    pending = [post(proxy, FULL) for _ in range(11)]
    ids = [int(answer_of(one.reply())["id"]) for one in pending]
    report(
        f"11 runs on 2 and 20 permits: the last one started after {time.monotonic() - begin:.2f} s"
    )
    assert Counter(map(of, ids)) == {0: 1, 1: 10}
    assert waiting(cluster) == [0, 0, 0]


def test_who_waits_moves_to_where_permits_get_free(cluster: Cluster) -> None:
    proxy = cluster.proxy
    fill(cluster, *INSTANCES)
    queued = [post(proxy, shell("exec sleep 600")) for _ in range(9)]
    eventually(lambda: min(waiting(cluster)) > 0, what="they wait at all")
    begin = time.monotonic()
    cluster.managers[1].post("/permits", {"permits": 100})
    ids = [int(answer_of(pending.reply())["id"]) for pending in queued]
    report(f"9 runs that waited at 3 managers move within {time.monotonic() - begin:.2f} s")
    assert {*map(of, ids)} == {1}


def test_who_may_not_move_waits_as_long_as_it_takes(cluster: Cluster) -> None:
    large = {**message(), "more": "x" * 300_000}
    said = [
        post(cluster.proxy, changes, **headers).reply().headers.get("preference-applied")
        for changes, headers in (
            (shell("true"), {}),
            (shell("true", message=large), {}),
            (shell("true"), {"Idempotency_Key": "one"}),
        )
    ]
    assert said == ["wait=1", None, None]


def test_where_all_refuse_the_client_hears_it_soon(cluster: Cluster) -> None:
    for manager in cluster.managers:
        manager.post("/drain")
    reply = post(cluster.proxy, shell("true")).reply()
    assert is_retryable(reply)
    assert reply.json["code"] == "draining"


def test_a_key_finds_its_run_also_where_a_manager_drains(cluster: Cluster) -> None:
    proxy = cluster.proxy

    def ask(number: int) -> int:
        return run(proxy, shell("true"), Idempotency_Key=f"key {number}")

    with ThreadPoolExecutor(16) as pool:
        twice = [*pool.map(ask, [n // 2 for n in range(48)])]  # pairs of requests at one time
    ids = twice[::2]
    assert ids == twice[1::2]
    assert {*map(of, ids)} == {*INSTANCES}, "keys are spread"
    cluster.managers[1].post("/drain")
    assert [ask(number) for number in range(24)] == ids, "the first's manager still answers"
    fresh = [ask(number) for number in range(100, 124)]
    assert 1 not in map(of, fresh)
    assert [ask(number) for number in range(100, 124)] == fresh


def test_a_manager_that_drains_gets_no_new_runs_and_ends_its_old_ones(cluster: Cluster) -> None:
    proxy, manager = cluster.proxy, cluster.managers[1]
    go = cluster.root.path / "old"
    os.mkfifo(go)
    old = run(manager, shell(f"cat {go}"))
    drained = manager.send("POST", "/drain?wait=60s")
    eventually(lambda: manager.get("/status")["draining"], what="it drains")
    # HAProxy does not know yet: what the manager refuses is started by another, large or small.
    padding = {**message(), "more": "x" * 100_000}
    new = [run(proxy, shell("true", message=padding)) for _ in range(9)]
    assert 1 not in map(of, new)
    proxy.wait_up("genvm", 0, 2)
    assert {of(run(proxy, shell("true"))) for _ in range(4)} == {0, 2}
    assert proxy.get(f"/genvm/{old}")["status"] is None
    go.write_text("to the end")
    assert proxy.result(old)["stdout"] == "to the end"
    assert answer_of(drained.reply()) == {"result": "drained"}


# --- ends ---


def test_one_that_is_killed(cluster: Cluster) -> None:
    proxy, manager = cluster.proxy, cluster.managers[2]
    (held, _), *_ = fill(cluster, 2).values()
    pending = [proxy.send("GET", f"/genvm/{held}?wait=60s"), proxy.send("GET", f"/genvm/{held}")]
    assert pending.pop().reply().status == 200
    queued = post(manager, shell("true"))
    manager.waiting(1)
    manager.signal(signal.SIGKILL)
    manager.wait()
    queued.close()
    assert is_retryable(pending[0].reply())
    assert {of(run(proxy, shell("true"))) for _ in range(6)} == {0, 1}
    assert is_retryable(proxy.request("GET", f"/genvm/{held}"))
    proxy.wait_up("keyed", 0, 1)
    keyed = {of(run(proxy, shell("true"), Idempotency_Key=f"dead {n}")) for n in range(12)}
    assert keyed == {0, 1}
    cluster.restart(2)
    proxy.wait_up("genvm", *INSTANCES)
    proxy.wait_up("keyed", *INSTANCES)
    gone = proxy.request("GET", f"/genvm/{held}")
    assert (gone.status, gone.json["code"]) == (404, "execution_not_found")


def test_one_that_hangs(cluster: Cluster, hasty_proxy: Proxy) -> None:
    proxy, manager = hasty_proxy, cluster.managers[0]
    proxy.wait_up("genvm", *INSTANCES)
    held = run(manager, FULL)
    assert proxy.get(f"/genvm/{held}")["status"] is None
    pending = proxy.send("GET", f"/genvm/{held}?wait=110s")
    manager.signal(signal.SIGSTOP)
    try:
        assert is_retryable(pending.reply()), "it is cut off within the time of the health check"
        proxy.wait_up("genvm", 1, 2)
        assert 0 not in {of(run(proxy, shell("true"))) for _ in range(4)}
    finally:
        manager.signal(signal.SIGCONT)
    eventually(lambda: proxy.request("GET", f"/genvm/{held}").status == 200, what="it is back")


class Load:
    """Clients that run one execution after the other, and do again what can be done again."""

    def __init__(self, proxy: Daemon) -> None:
        self._proxy = proxy
        self.over = threading.Event()
        self.ids: list[int] = []
        self.retried: Counter[str] = Counter()
        self.lost: list[object] = []

    def beyond(self, count: int) -> list[int]:
        """Return the ids of what has ended after so many others."""
        return self.ids[count:]

    def ask(self, send: Callable[[], Pending]) -> dict[str, object]:
        """Return the answer to a request, tried again where an error says that it can be."""
        deadline = time.monotonic() + WAIT
        while True:
            reply = send().reply()
            if reply.status == 200:
                return dict(reply.json)
            assert is_retryable(reply), reply.raw
            assert time.monotonic() < deadline, reply.raw
            self.retried[reply.json["error"]] += 1
            self.over.wait(float(reply.headers["retry-after"]))

    def client(self, name: str) -> None:
        """Run executions until it is over; each must be read with what it wrote."""
        number = 0
        while not self.over.is_set():
            number += 1
            word = f"{name}-{number}"
            key = {"Idempotency_Key": word} if number % 3 == 0 else {}
            run_of = shell(f"sleep 0.1; echo {word}")
            genvm_id = self.ask(partial(post, self._proxy, run_of, **key))["id"]
            assert isinstance(genvm_id, int)
            path = f"/genvm/{genvm_id}?wait=110s"
            status = self.ask(partial(self._proxy.send, "GET", path))["status"]
            self.ids.append(genvm_id)
            if not isinstance(status, dict) or status["stdout"] != f"{word}\n":
                self.lost.append((genvm_id, status))


def test_a_rolling_restart_under_load_loses_no_run(cluster: Cluster) -> None:
    proxy = cluster.proxy
    load = Load(proxy)
    with ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(load.client, f"c{number}") for number in range(6)]
        try:
            for instance in INSTANCES:
                eventually(partial(load.beyond, len(load.ids) + 6), what="runs")
                manager = cluster.managers[instance]
                assert manager.post("/drain?wait=60s") == {"result": "drained"}
                assert manager.stop() == 0
                cluster.restart(instance)
                proxy.wait_up("genvm", *INSTANCES)
                proxy.wait_up("keyed", *INSTANCES)
        finally:
            load.over.set()
        for client in clients:
            client.result(WAIT)
    assert load.lost == []
    assert {*map(of, load.ids)} == {*INSTANCES}
    print(f"[figure] {len(load.ids)} runs, tried again by their clients: {dict(load.retried)}")


# --- what passes ---


def test_what_passes_through(cluster: Cluster) -> None:
    proxy = cluster.proxy
    reply = proxy.request("GET", "/readyz", headers={"X-Request-Id": "mine-1"})
    assert (reply.json, reply.headers["x-request-id"]) == ({"result": "ready"}, "mine-1")
    headers = {"Deployment-Timestamp": "2025-06-01T00:00:00Z"}
    code = b"# v0.1.0\n" + b"#" * (20 << 20)
    reply = proxy.request("POST", "/contract/pre-deploy-writes", code, headers)
    assert len(json.dumps(answer_of(reply))) > 20 << 20
    genvm_id = run(proxy, shell("head -c 3000000 /dev/zero | tr '\\0' x"))
    assert proxy.result(genvm_id)["stdout"] == "x" * 3_000_000
    for host, status in ((NAME, 200), ("other.example", 403)):
        asked = proxy.request("POST", "/contract/detect-version", b"#", {**headers, "Host": host})
        assert (asked.status, "error" in asked.json) == (status, status != 200)
    for path in ("/status", "/permits", "/events", "/genvm"):
        refused = proxy.request("GET", path)
        assert (refused.status, refused.json["code"]) == (404, "endpoint_not_found")


def test_the_token_passes_through(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a token of some length")
    token.chmod(0o600)
    cluster = Cluster("--auth-token-file", str(token))
    try:
        asked = post(cluster.proxy, shell("echo it")).reply()
        assert (asked.status, asked.json["code"]) == (401, "unauthorized")
        bearer = f"Bearer {token.read_text()}"
        ids = [run(cluster.proxy, shell("echo it"), Authorization=bearer) for _ in INSTANCES]
        for genvm_id in ids:
            path = f"/genvm/{genvm_id}?wait=110s"
            reply = cluster.proxy.request("GET", path, headers={"Authorization": bearer})
            assert answer_of(reply)["status"]["stdout"] == "it\n"
    finally:
        cluster.close()
