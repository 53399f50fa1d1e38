"""The end of the manager, by request or by force: nothing of it is left."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import pytest

from .conftest import Start
from .support import (
    WAIT,
    Daemon,
    Root,
    alive,
    eventually,
    kill,
    processes_with,
    run_body,
    shell,
    timed,
    within,
)

RUNS = 20
#: How long the end may take for those who read slowly, and after a second signal.
PATIENT = {"SHUTDOWN_SECONDS": 60, "LAST_SECONDS": 60}


def start_runs(daemon: Daemon, root: Root, count: int = RUNS, stubborn: int = 0) -> list[int]:
    """Start executions, some of which ignore SIGTERM; return once each has begun."""
    root.script('eval "$data"')
    ids = []
    for number in range(count):
        trap = 'trap "" TERM; ' if number < stubborn else ""
        command = f"{trap}touch {root.path}/up-{number}; exec sleep 600"
        ids.append(daemon.run(host_data=command))
    ups = [root.path / f"up-{number}" for number in range(count)]
    eventually(lambda: all(up.exists() for up in ups), what="all executors run")
    return ids


def assert_nothing_left(daemon: Daemon, what: str) -> None:
    """Wait until no process of the daemon is left, and print how long it took; goal 1 s."""
    within(1.0, lambda: not processes_with(daemon.marker), f"{what}: nothing is left")


def ends_with_status_0(daemon: Daemon, what: str, goal: float = 1.0) -> None:
    """Wait for the end of a manager that was asked to end, and print how long it took."""
    begin = time.monotonic()
    assert daemon.process.wait(WAIT) == 0
    timed(f"{what}: exit", time.monotonic() - begin, goal)
    assert processes_with(daemon.marker) == []


def test_killed_with_twenty_executors(root: Root, start: Start) -> None:
    daemon = start("--permits", "50")
    guardian = daemon.guardian()
    start_runs(daemon, root, stubborn=5)
    daemon.process.kill()
    assert_nothing_left(daemon, "kill -9 with 20 executors")
    eventually(lambda: not alive(guardian), what="the guardian ends too")


def test_killed_with_twenty_executors_and_their_grandchildren(root: Root, start: Start) -> None:
    daemon = start("--permits", "50")
    for number in range(RUNS):
        step = "grandchild-session 300" if number % 2 else "grandchild 300"
        daemon.run(step, "ignore-sigterm", "sleep 600", capture_output=number % 3 != 0)
    eventually(lambda: len(daemon.descendants()) == 2 * RUNS)
    daemon.process.kill()
    assert_nothing_left(daemon, "kill -9 with 20 executors and 20 grandchildren")


def test_killed_while_it_starts_executors(root: Root, start: Start) -> None:
    """Executors that are being spawned at that very moment are found as well."""
    root.script("sleep 300")
    daemon = start("--permits", "200")
    pending = [daemon.send("POST", "/genvm/run", run_body()) for _ in range(100)]
    pending[30].reply()
    daemon.process.kill()
    assert_nothing_left(daemon, "kill -9 while it starts executors")
    for one in pending:
        one.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: str(n.name))
def test_asked_to_end_with_twenty_executors(root: Root, start: Start, number: int) -> None:
    """Exit status 0 in under a second, although 5 of the 20 ignore SIGTERM."""
    daemon = start("--permits", "50")
    guardian = daemon.guardian()
    ids = start_runs(daemon, root, stubborn=5)
    daemon.signal(number)
    ends_with_status_0(daemon, f"signal {number} with 20 executors, 5 of them stubborn")
    daemon.wait()
    eventually(lambda: not alive(guardian), what="the guardian ends too")
    ends = [r for r in daemon.records if r["message"] == "execution finished"]
    assert sorted(r["genvm_id"] for r in ends) == ids, "each ends exactly once"
    assert {r["cause"] for r in ends} == {"shutdown"}
    by_id = {r["genvm_id"]: r["signal"] for r in ends}
    assert [by_id[one] for one in ids[:5]] == [signal.SIGKILL] * 5
    # On a busy machine one may die of SIGTERM too late.
    assert signal.SIGTERM in [by_id[one] for one in ids[5:]]
    assert daemon.records[-1]["message"] == "stopped"
    assert daemon.errors == ""


def test_asked_to_end_while_idle(start: Start) -> None:
    daemon = start()
    daemon.signal(signal.SIGTERM)
    ends_with_status_0(daemon, "SIGTERM while idle")


def test_the_group_is_signalled(root: Root, start: Start) -> None:
    """Ctrl-C in a terminal reaches every process of the group: the order of things is the same."""
    daemon = start("--permits", "50")
    start_runs(daemon, root, 5, stubborn=2)
    for pid in daemon.descendants():
        kill(pid, signal.SIGINT)
    kill(daemon.guardian(), signal.SIGINT)
    daemon.signal(signal.SIGINT)
    ends_with_status_0(daemon, "SIGINT to the group")


def test_a_second_signal_kills_at_once(root: Root, start: Start) -> None:
    daemon = start("--permits", "50", "--shutdown-grace", "60s", constants=PATIENT)
    start_runs(daemon, root, 5, stubborn=3)
    daemon.signal(signal.SIGTERM)
    daemon.wait_log(lambda r: r["message"] == "shutting down")
    eventually(lambda: len(daemon.descendants()) == 3, what="the others end by themselves")
    daemon.signal(signal.SIGINT)
    ends_with_status_0(daemon, "a second signal")


def test_two_signals_in_one_moment(root: Root, start: Start) -> None:
    daemon = start("--permits", "50", "--shutdown-grace", "60s", constants=PATIENT)
    start_runs(daemon, root, 5, stubborn=3)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        daemon.signal(number)
    ends_with_status_0(daemon, "four signals in one moment")
    daemon.wait()
    assert daemon.errors == ""
    assert not [r for r in daemon.records if r["level"] in ("error", "critical")]


def test_grace_is_configurable(root: Root, start: Start) -> None:
    """An executor that needs its time to end has it."""
    root.script(f"trap 'sleep 1.2; touch {root.path}/ended; exit 0' TERM; sleep 600 & wait")
    daemon = start("--shutdown-grace", "10s")
    daemon.run()
    eventually(lambda: len(daemon.descendants()) == 2)
    daemon.signal(signal.SIGTERM)
    ends_with_status_0(daemon, "an executor that takes 1.2 s to end", 1.3)
    assert (root.path / "ended").exists()


def test_who_waits_gets_an_answer(root: Root, start: Start) -> None:
    """Long polls get the result, stops their answer, waiting runs 503; then it ends."""
    daemon = start("--permits", "3")
    ids = start_runs(daemon, root, 3, stubborn=1)
    polls = [daemon.send("GET", f"/genvm/{genvm_id}?wait=60s") for genvm_id in ids]
    stop = daemon.send("DELETE", f"/genvm/{ids[0]}?wait_timeout_ms=30000")
    eventually(lambda: daemon.get("/status")["executions"][str(ids[0])]["state"] == "stopping")
    queued = [daemon.send("POST", "/genvm/run", run_body("exit 0")) for _ in range(10)]
    daemon.waiting(10)
    newest = next(iter(daemon.get("/status")["executions"]))
    queued_poll = daemon.send("GET", f"/genvm/{newest}?wait=60s")
    daemon.get("/status")
    daemon.signal(signal.SIGTERM)
    for reply in (one.reply() for one in queued):
        assert (reply.status, reply.json["code"]) == (503, "draining")
        assert "retry-after" in reply.headers
    answers = [one.reply().json["status"] for one in polls]
    assert [answer["cause"] for answer in answers] == ["cancelled", "shutdown", "shutdown"]
    assert answers[0]["signal"] == 9
    status = queued_poll.reply().json["status"]
    assert (status["cause"], status["started_at"]) == ("shutdown", None)
    assert stop.reply().json["code"] == "shutdown_timeout"
    assert daemon.wait() == 0


def test_no_new_runs_while_it_ends(root: Root, start: Start) -> None:
    """New connections are refused, new runs on an open connection get 503."""
    daemon = start("--permits", "5", "--shutdown-grace", "30s")
    (genvm_id,) = start_runs(daemon, root, 1, stubborn=1)
    with daemon.connect() as peer:
        request = b"GET /permits HTTP/1.1\r\nHost: localhost\r\n\r\n"
        peer.sendall(request)
        assert peer.recv(65536).startswith(b"HTTP/1.1 200")
        daemon.signal(signal.SIGTERM)
        daemon.wait_log(lambda r: r["message"] == "shutting down")
        eventually(lambda: refuses_connections(daemon))
        body = json.dumps(run_body("exit 0")).encode()
        head = b"POST /genvm/run HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
        peer.sendall(head % len(body) + body)
        assert peer.recv(65536).startswith(b"HTTP/1.1 503")
        peer.sendall(request)
        assert peer.recv(65536).startswith(b"HTTP/1.1 200")
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    ends = [r["genvm_id"] for r in daemon.records if r["message"] == "execution finished"]
    assert ends == [genvm_id], "no other was started"


def refuses_connections(daemon: Daemon) -> bool:
    """Tell whether nobody listens any more."""
    try:
        daemon.connect().close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        pass  # it stood in line when the listener was closed
    return False


def test_what_hides_does_not_outlive_a_shutdown(root: Root) -> None:
    """A grandchild in a session of its own, without our marker in its environment."""
    root.add_shell()
    daemon = Daemon.serve(root)
    left = root.path / "left"
    hide = f"env -i setsid /bin/sh -c 'echo $$ >{left}.new; mv {left}.new {left}; exec sleep 300'"
    daemon.run(**shell(f"{hide} & sleep 300"))
    eventually(left.exists)
    pid = int(left.read_text())
    try:
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        assert not alive(pid)
    finally:
        kill(pid)
        daemon.close()


def test_it_ends_although_clients_stay_connected(start: Start) -> None:
    """Idle connections, half requests and clients that do not read hold up nothing."""
    daemon = start()
    genvm_id = daemon.run("spam stdout 4000000", "exit 0")
    daemon.result(genvm_id)
    peers = [daemon.connect() for _ in range(30)]
    for number, peer in enumerate(peers):
        if number % 3 == 0:
            peer.sendall(b"GET /genvm/%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % genvm_id)
        elif number % 3 == 1:
            peer.sendall(
                b"POST /genvm/run HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
            )
    daemon.get("/status")
    daemon.signal(signal.SIGTERM)
    ends_with_status_0(daemon, "SIGTERM with 30 connections")
    for peer in peers:
        peer.close()


def test_a_large_result_is_sent_whole_before_it_ends(root: Root, start: Start) -> None:
    daemon = start(constants=PATIENT)
    (genvm_id,) = [daemon.run("spam stdout 4000000", f"touch {root.path}/up", "sleep 600")]
    eventually((root.path / "up").exists)
    poll = daemon.send("GET", f"/genvm/{genvm_id}?wait=60s")
    daemon.get("/status")
    daemon.signal(signal.SIGTERM)
    status = poll.reply().json["status"]
    assert (status["cause"], len(status["stdout"])) == ("shutdown", 4_000_000)
    assert daemon.wait() == 0


def test_the_guardian_is_started_again(root: Root, start: Start) -> None:
    """Killed once, it comes back, and protects as before."""
    daemon = start("--permits", "50")
    first = daemon.guardian()
    kill(first)
    second = eventually(lambda: daemon.guardian() != first and daemon.guardian())
    start_runs(daemon, root, 5, stubborn=5)
    daemon.process.kill()
    assert_nothing_left(daemon, "kill -9 with a second guardian")
    eventually(lambda: not alive(second), what="the guardian ends too")


def test_the_guardian_leaves_others_alone(root: Root, start: Start) -> None:
    """Two managers of the same root: the death of one is nothing to the other."""
    one, other = start("--permits", "10"), start()
    start_runs(one, root, 3)
    staying = other.run(host_data="exec sleep 600")
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        one.process.kill()
        assert_nothing_left(one, "kill -9 of one of two managers")
        assert other.get(f"/genvm/{staying}") == {"genvm_id": staying, "status": None}
        assert len(other.descendants()) == 1
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_executors_of_a_twistd_that_is_killed(root: Root) -> None:
    daemon = Daemon.twistd(root, PERMITS="10")  # not what memory allows
    try:
        daemon.wait_until_listening()
        start_runs(daemon, root, 5, stubborn=2)
        daemon.process.kill()
        assert_nothing_left(daemon, "kill -9 of twistd with 5 executors")
    finally:
        daemon.close()


def test_a_log_that_is_closed_does_not_matter(start: Start) -> None:
    """Whoever read the log is gone: the manager goes on."""
    daemon = start("--log-level", "trace", read_log=False)
    assert daemon.process.stdout is not None
    daemon.process.stdout.close()
    for _ in range(3):
        assert daemon.result(daemon.run("spam log 100000", "exit 0", capture_output=False))
    daemon.signal(signal.SIGTERM)
    ends_with_status_0(daemon, "SIGTERM with a log that is closed")
