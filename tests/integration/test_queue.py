"""Many executions at once: permits, order, the queue, clients that leave or ask again."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from genvm_manager import ID_STEP

from .conftest import Start
from .support import WAIT, Daemon, Pending, Reply, Root, eventually, report, run_body, timed

# Each run appends a line when it starts and one when it ends; one write each, in order.
RECORDER = """
weight=2; [ "$sync" ] && weight=1
echo "start $id $weight" >> {events}
sleep 0.02
echo "end $id $weight" >> {events}
"""


def record_runs(root: Root) -> Path:
    """Install an executor that writes down when it runs, and return where."""
    events = root.path / "events"
    events.touch()
    root.script(RECORDER.format(events=events))
    return events


def consecutive(ids: list[int], count: int) -> bool:
    """Tell whether these are so many ids, each the next one to that before it."""
    return ids == [ids[0] + index * ID_STEP for index in range(count)]


def replay(events: Path, limit: int) -> tuple[int, list[int]]:
    """Check the records against a limit; return the highest weight seen and the order of starts.

    An execution that started shows that all earlier ones had their permits by then, even if they
    had no time yet to write that they started: ids are given in the order of the queue. So this
    checks the limit and the order together.
    """
    lines = [line.split() for line in events.read_text().splitlines()]
    weights = {int(line[1]): min(int(line[2]), limit) for line in lines if line[0] == "start"}
    held: set[int] = set()
    ended: set[int] = set()
    highest = 0
    order = []
    for line in lines:
        genvm_id = int(line[1])
        if line[0] == "end":
            ended.add(genvm_id)
            held.discard(genvm_id)
            continue
        order.append(genvm_id)
        held |= {other for other in weights if other <= genvm_id} - ended
        total = sum(weights[other] for other in held)
        assert total <= limit, f"{sorted(held)} hold {total} permits of {limit}"
        highest = max(highest, total)
    assert ended == set(weights)
    return highest, order


def test_two_hundred_at_once_on_three_permits(root: Root, start: Start) -> None:
    """Two-permit runs among one-permit runs: never more than 3 permits, in order, all end."""
    events = record_runs(root)
    daemon = start("--permits", "3")
    begin = time.monotonic()
    pending = [
        daemon.send("POST", "/genvm/run", run_body(is_sync=number % 3 != 0), timeout=2 * WAIT)
        for number in range(200)
    ]
    ids = [one.reply().json["id"] for one in pending]
    assert consecutive(sorted(ids), 200)
    assert all(daemon.result(genvm_id)["cause"] == "exited" for genvm_id in ids)
    report(f"200 runs of 20 ms on 3 permits: {time.monotonic() - begin:.2f} s")
    highest, order = replay(events, 3)
    assert consecutive(sorted(order), 200)
    assert highest == 3, "all permits were used"
    assert daemon.permits() == {"permits": 3, "available": 3, "in_use": 0, "waiting": 0}


def test_two_hundred_while_permits_change(root: Root, start: Start) -> None:
    """Permits go from 3 to 1, to 0, and back to 5, in the middle of 200 runs."""
    events = record_runs(root)
    daemon = start("--permits", "3")
    pending = [
        daemon.send("POST", "/genvm/run", run_body(is_sync=number % 3 != 0), timeout=2 * WAIT)
        for number in range(200)
    ]

    def mark(text: str) -> None:
        with events.open("a") as file:
            file.write(f"{text} - -\n")

    def started() -> int:
        return events.read_text().count("start")

    eventually(lambda: started() >= 20)
    daemon.post("/permits", {"permits": 1})
    eventually(lambda: daemon.permits()["in_use"] <= 1)
    mark("one")
    count = started()
    eventually(lambda: started() >= count + 10)
    mark("one-ends")
    daemon.post("/permits", {"permits": 0})
    eventually(lambda: daemon.permits()["in_use"] == 0)
    eventually(lambda: not daemon.descendants())
    mark("zero")
    waiting = daemon.permits()["waiting"]
    assert waiting > 0
    for _ in range(50):
        assert daemon.permits() == {"permits": 0, "available": 0, "in_use": 0, "waiting": waiting}
    mark("zero-ends")
    daemon.post("/permits", {"permits": 5})
    ids = [one.reply().json["id"] for one in pending]
    assert consecutive(sorted(ids), 200)
    began = [daemon.result(genvm_id)["started_at"] for genvm_id in sorted(ids)]
    assert began == sorted(began), "in the order of the queue, whatever the number of permits"

    phase, running, order, highest = "", dict[str, int](), list[int](), 0
    for name, genvm_id, weight in (line.split() for line in events.read_text().splitlines()):
        if name == "start":
            running[genvm_id] = int(weight)
            order.append(int(genvm_id))
            highest = max(highest, sum(running.values()))
            assert phase != "zero", "nothing starts without permits"
            assert phase != "one" or len(running) == 1
        elif name == "end":
            del running[genvm_id]
        else:
            phase = name
    assert not running
    assert highest <= 6, "five permits, and a two-permit run that started with one"
    assert consecutive(sorted(order), 200)
    assert daemon.permits() == {"permits": 5, "available": 5, "in_use": 0, "waiting": 0}


def test_order_is_that_of_the_requests(root: Root, start: Start) -> None:
    events = record_runs(root)
    daemon = start("--permits", "0")
    pending = []
    for number in range(30):
        pending.append(daemon.send("POST", "/genvm/run", run_body(is_sync=number % 2 == 0)))
        daemon.waiting(number + 1)
    daemon.post("/permits", {"permits": 1})
    ids = [one.reply().json["id"] for one in pending]
    assert consecutive(ids, 30)
    eventually(daemon.idle)
    assert replay(events, 1)[1] == ids


class Queue(NamedTuple):
    """Two permits: one run holds one until ``go`` exists, two others wait behind it."""

    go: Path
    first: int
    heavy: Pending
    light: Pending


@pytest.fixture
def queue(daemon: Daemon, tmp_path: Path) -> Iterator[Queue]:
    """A heavy run that waits, and a light one behind it."""
    daemon.post("/permits", {"permits": 2})
    go = tmp_path / "go"
    first = daemon.run(f"wait-file {go}", "exit 0")
    heavy = daemon.send("POST", "/genvm/run", run_body("exit 0", is_sync=False))
    daemon.waiting(1)
    light = daemon.send("POST", "/genvm/run", run_body("exit 0"))
    daemon.waiting(2)
    yield Queue(go, first, heavy, light)
    daemon.post("/permits", {"permits": 8})


def test_a_heavy_run_is_not_overtaken(daemon: Daemon, queue: Queue) -> None:
    """With one permit free, a light run behind a heavy one waits for its turn."""
    assert daemon.permits() == {"permits": 2, "available": 1, "in_use": 1, "waiting": 2}
    queue.go.touch()
    ids = [queue.first, queue.heavy.reply().json["id"], queue.light.reply().json["id"]]
    results = [daemon.result(genvm_id) for genvm_id in ids]
    assert [result["started_at"] for result in results] == sorted(
        result["started_at"] for result in results
    )
    assert ids == sorted(ids)


def test_queue_in_status(daemon: Daemon) -> None:
    daemon.post("/permits", {"permits": 0})
    pending = daemon.send("POST", "/genvm/run", run_body("exit 0"))
    daemon.waiting(1)
    eventually(lambda: daemon.get("/status")["queue"]["oldest_wait_ms"] > 0)
    status = daemon.get("/status")
    assert status["queue"]["length"] == status["permits"]["waiting"] == 1
    ((_, entry),) = [item for item in status["executions"].items() if item[1]["result"] is None]
    assert (entry["state"], entry["started_at"], entry["strict_deadline"]) == (
        *("waiting", None, None),
    )
    daemon.post("/permits", {"permits": 8})
    daemon.result(pending.reply().json["id"])


def test_the_end_of_an_executor_is_noticed_at_once(root: Root, start: Start) -> None:
    """Exit to result readable, permit free and next run started: nobody asks meanwhile.

    The executor ends when a named pipe is closed; the goal is 50 ms, without polling.
    """
    pipe = root.path / "pipe"
    os.mkfifo(pipe)
    root.script(f'[ "$sync" ] && read line < {pipe}; exit 0')
    daemon = start("--permits", "1")
    figures = []
    for _ in range(20):
        genvm_id = daemon.run(is_sync=True)
        poll = daemon.send("GET", f"/genvm/{genvm_id}?wait=60s")
        queued = daemon.send("POST", "/genvm/run", run_body(is_sync=False))
        daemon.waiting(1)
        with pipe.open("w"):
            begin = time.perf_counter()
        following = queued.reply().json["id"]
        admitted = time.perf_counter() - begin
        assert poll.reply().json["status"]["exit_code"] == 0
        figures.append((admitted, time.perf_counter() - begin))
        daemon.result(following)
        assert daemon.permits()["available"] == 1
    admitted = statistics.median(first for first, _ in figures)
    readable = statistics.median(second for _, second in figures)
    timed("exit to next run started, median of 20", admitted, 0.05)
    timed("exit to result in the hands of a client, median of 20", readable, 0.05)


# --- clients that leave ---


def test_a_client_that_leaves_while_queued_leaves_no_run(root: Root, start: Start) -> None:
    events = record_runs(root)
    daemon = start("--permits", "0")
    kept = [daemon.send("POST", "/genvm/run", run_body())]
    daemon.waiting(1)
    leaver = daemon.send("POST", "/genvm/run", run_body(is_sync=False))
    daemon.waiting(2)
    kept.append(daemon.send("POST", "/genvm/run", run_body()))
    daemon.waiting(3)
    leaver.close()
    daemon.waiting(2)
    third, first = map(int, daemon.get("/status")["executions"])
    assert third == first + 2 * ID_STEP
    assert daemon.request("GET", f"/genvm/{first + ID_STEP}").status == 404
    daemon.post("/permits", {"permits": 1})
    assert [one.reply().json["id"] for one in kept] == [first, third]
    eventually(daemon.idle)
    assert replay(events, 1)[1] == [first, third]


def test_a_heavy_client_that_leaves_lets_others_pass(daemon: Daemon, queue: Queue) -> None:
    queue.heavy.close()
    assert daemon.result(queue.light.reply().json["id"])["exit_code"] == 0
    queue.go.touch()
    daemon.result(queue.first)


def test_a_hundred_clients_that_leave(start: Start) -> None:
    daemon = start("--permits", "0")
    pending = [daemon.send("POST", "/genvm/run", run_body("exit 0")) for _ in range(100)]
    daemon.waiting(100)
    for one in pending:
        one.close()
    daemon.waiting(0)
    assert daemon.get("/status")["executions"] == {}
    daemon.post("/permits", {"permits": 1})
    genvm_id = daemon.run("exit 0")
    assert list(daemon.get("/status")["executions"]) == [str(genvm_id)]
    daemon.result(genvm_id)


def test_a_client_that_leaves_a_running_execution_does_not_end_it(
    daemon: Daemon, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    genvm_id = daemon.run(f"wait-file {go}", "exit 6")
    daemon.send("GET", f"/genvm/{genvm_id}?wait=10s").close()
    assert daemon.get(f"/genvm/{genvm_id}?wait=100ms")["status"] is None
    go.touch()
    assert daemon.result(genvm_id)["exit_code"] == 6


# --- the limit of the queue ---


@pytest.mark.parametrize("limit", [0, 2])
def test_queue_limit(start: Start, limit: int) -> None:
    daemon = start("--permits", "0", "--queue-limit", str(limit))
    pending = [daemon.send("POST", "/genvm/run", run_body("exit 0")) for _ in range(limit)]
    daemon.waiting(limit)
    for _ in range(3):
        reply = daemon.request("POST", "/genvm/run", run_body("exit 0"))
        assert (reply.status, reply.json["code"]) == (503, "queue_full")
        assert reply.json["retryable"] is True
        assert int(reply.headers["retry-after"]) >= 1
    assert daemon.permits()["waiting"] == limit
    daemon.post("/permits", {"permits": 2})
    for one in pending:
        assert daemon.result(one.reply().json["id"])["exit_code"] == 0
    daemon.result(daemon.run("exit 0", is_sync=False))


# --- the time that a client gives it ---


def no_permit(reply: Reply, seconds: int) -> None:
    """Check that an answer says that there was no permit within so many seconds."""
    assert (reply.status, reply.json["code"]) == (503, "no_permit")
    assert reply.json["retryable"] is True
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.headers["preference-applied"] == f"wait={seconds}"


def test_a_client_that_waits_for_so_long(start: Start) -> None:
    daemon = start("--permits", "1")
    long = daemon.run("sleep 600")
    begin = time.monotonic()
    pending = daemon.send("POST", "/genvm/run", run_body("exit 0"), {"Prefer": "wait=1"})
    at_once = daemon.request("POST", "/genvm/run", run_body("exit 0"), {"Prefer": "wait=0"})
    no_permit(at_once, 0)
    no_permit(pending.reply(), 1)
    assert time.monotonic() - begin >= 1
    assert [*daemon.get("/status")["executions"]] == [str(long)]
    assert daemon.permits()["waiting"] == 0
    schema = {"Deployment-Timestamp": "2025-06-01T00:00:00Z", "Prefer": "wait=0"}
    no_permit(daemon.request("POST", "/genvm/run/readonly", b"# v0.1.0\n", schema), 0)
    left = daemon.send("POST", "/genvm/run", run_body("exit 0"), {"Prefer": "wait=50"})
    daemon.waiting(1)
    left.close()
    eventually(lambda: daemon.permits()["waiting"] == 0, what="one that left is gone")
    stopped = daemon.send("POST", "/genvm/run", run_body("exit 0"), {"Prefer": "wait=50"})
    daemon.waiting(1)
    waiting = next(i for i in daemon.get("/status")["executions"] if i != str(long))
    assert daemon.request("DELETE", f"/genvm/{waiting}").status == 200
    assert stopped.reply().json["code"] == "execution_cancelled"
    served = daemon.send("POST", "/genvm/run", run_body("exit 7"), {"Prefer": "wait=50"})
    daemon.waiting(1)
    daemon.request("DELETE", f"/genvm/{long}")
    reply = served.reply()
    assert reply.headers["preference-applied"] == "wait=50"
    assert daemon.result(reply.json["id"])["exit_code"] == 7


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("wait=0", 0),
        ("Wait = 0", 0),
        ('respond-async, wait="0"', 0),
        ('other="a, wait=7\\"", wait=00; more=1', 0),
        ("wait=0, wait=9", 0),
        ("respond-async", None),
        ("wait", None),
        ("wait=", None),
        ("wait=-1", None),
        ("wait=1.5", None),
        ("wait=soon, wait=0", None),
        ("wait=\u0661", None),
        ('other="wait=0', None),
        ("x-wait=0", None),
        ("wait=" + "9" * 5000, 86400),
        ("", None),
    ],
)
def test_what_a_client_may_say_of_its_time(daemon: Daemon, given: str, seconds: int | None) -> None:
    headers = {"Prefer": given.encode().decode("latin-1")}
    reply = daemon.request("POST", "/genvm/run", run_body("exit 0"), headers)
    said = None if seconds is None else f"wait={seconds}"
    assert (reply.status, reply.headers.get("preference-applied")) == (200, said)


def test_permits_that_come_when_the_time_is_over(root: Root, start: Start) -> None:
    """Each is started once and answered so, or not at all; no permit is lost."""
    events = record_runs(root)
    daemon = start("--permits", "0")
    prefer = {"Prefer": "wait=1"}
    pending = []
    for number in range(60):  # whose times end one after the other, while permits come
        body = run_body(is_sync=number % 2 == 0)
        pending.append(daemon.send("POST", "/genvm/run", body, prefer))
    eventually(lambda: daemon.permits()["waiting"] < 50, what="the first ones give up")
    daemon.post("/permits", {"permits": 3})
    replies = [one.reply() for one in pending]
    started = [reply.json["id"] for reply in replies if reply.status == 200]
    for reply in replies:
        if reply.status != 200:
            no_permit(reply, 1)
    for genvm_id in started:
        assert daemon.result(genvm_id)["exit_code"] == 0
    assert sorted(replay(events, 3)[1]) == sorted(started)
    assert daemon.permits() == {"permits": 3, "available": 3, "in_use": 0, "waiting": 0}
    report(f"60 runs: {len(started)} started, the others gave up")


# --- the same request again ---


def test_a_repeated_request_is_one_process(root: Root, start: Start) -> None:
    events = record_runs(root)
    daemon = start()
    headers = {"Idempotency-Key": "block 7, tx 3"}
    answers = [daemon.request("POST", "/genvm/run", run_body(), headers) for _ in range(3)]
    assert {answer.raw for answer in answers} == {answers[0].raw}
    first = answers[0].json["id"]
    assert daemon.result(first)["exit_code"] == 0
    answers.append(daemon.request("POST", "/genvm/run", run_body(), headers))
    assert [answer.json["id"] for answer in answers] == [first] * 4
    other = daemon.request("POST", "/genvm/run", run_body(), {"Idempotency-Key": "another"})
    second = other.json["id"]
    assert second > first
    daemon.result(second)
    assert replay(events, 8)[1] == [first, second]


def test_concurrent_repeated_requests_are_one_process(root: Root, start: Start) -> None:
    """Also when the first of the clients leaves while the run waits."""
    events = record_runs(root)
    daemon = start("--permits", "0")
    headers = {"Idempotency-Key": "key"}
    pending = [daemon.send("POST", "/genvm/run", run_body(), headers) for _ in range(20)]
    daemon.waiting(1)
    # Requests are read in the order of their arrival: the last of them was seen once a later one
    # is answered.
    assert daemon.get("/status")["queue"]["length"] == 1
    pending.pop(0).close()
    daemon.post("/permits", {"permits": 5})
    (genvm_id,) = {one.reply().json["id"] for one in pending}
    daemon.result(genvm_id)
    assert replay(events, 5)[1] == [genvm_id]


def test_a_repeated_key_with_another_body(daemon: Daemon) -> None:
    headers = {"Idempotency-Key": "other body"}
    first = daemon.request("POST", "/genvm/run", run_body("exit 0"), headers)
    second = daemon.request("POST", "/genvm/run", run_body("exit 1"), headers)
    assert first.status == 200
    assert (second.status, second.json["code"]) == (500, "invalid_request")
    assert "Idempotency-Key" in second.json["error"]
    assert daemon.result(first.json["id"])["exit_code"] == 0


def test_a_key_is_free_again_after_retention(start: Start) -> None:
    daemon = start("--execution-retention", "100ms")
    headers = {"Idempotency-Key": "short"}
    first = daemon.request("POST", "/genvm/run", run_body("exit 0"), headers).json["id"]
    eventually(lambda: daemon.request("GET", f"/genvm/{first}").status == 404)
    second = daemon.request("POST", "/genvm/run", run_body("exit 1"), headers)
    assert (second.status, second.json["id"]) == (200, first + ID_STEP)


def test_a_key_is_free_again_after_a_failed_start(root: Root, start: Start) -> None:
    path = root.script("exit 0")
    path.chmod(0o644)
    daemon = start()
    headers = {"Idempotency-Key": "again"}
    assert daemon.request("POST", "/genvm/run", run_body(), headers).json["code"] == "spawn_failed"
    path.chmod(0o755)
    assert daemon.request("POST", "/genvm/run", run_body(), headers).status == 200
