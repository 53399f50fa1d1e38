"""Executors that misbehave, and what the manager makes of what they write."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from genvm_manager import ORPHAN_GRACE_SECONDS

from .conftest import Start
from .support import (
    MEMORY_LIMIT,
    SOURCE,
    Daemon,
    Root,
    alive,
    eventually,
    report,
    shell,
    state_of,
    timed,
    watched,
    within,
)

MIB = 1 << 20


@pytest.fixture(scope="module")
def shared_daemon(shared_root: Root) -> Iterator[Daemon]:
    """The daemon of this module: whatever its executors do, it stays small.

    What is retained of earlier tests does not count, so little is.
    """
    daemon = Daemon.serve(shared_root, "--permits", "8", "--retention-max-bytes", str(4 * MIB))
    yield daemon
    daemon.close()


@pytest.fixture(autouse=True)
def bounded_memory(daemon: Daemon) -> Iterator[None]:
    """Name the test that makes the manager grow beyond its limit."""
    before = daemon.peak_memory()
    yield
    peak = daemon.peak_memory()
    report(f"peak memory of the manager: {before / MIB:.0f} MiB before, {peak / MIB:.0f} MiB after")
    assert peak < MEMORY_LIMIT or before >= MEMORY_LIMIT


def test_a_hundred_megabytes_on_each_stream(daemon: Daemon) -> None:
    """The last 4 MiB of each are kept, and the status answers meanwhile."""
    command = (
        "yes 0123456789abcde | head -c 100000000 &\n"
        "yes FEDCBA987654321 | head -c 100000000 >&2 &\nwait; echo the end; echo the end >&2"
    )
    genvm_id = daemon.run(**shell(command))
    status = watched(daemon, "200 MB of output", lambda: daemon.result(genvm_id))
    for stream in ("stdout", "stderr"):
        assert len(status[stream]) == 4 * MIB
        assert status[stream].endswith("the end\n")
    assert set(status["truncated"]) == {"stdout", "stderr"}
    peak = daemon.peak_memory()
    report(f"peak memory after 200 MB of output: {peak / MIB:.0f} MiB")
    assert peak < MEMORY_LIMIT


@pytest.mark.parametrize("captured", [True, False])
def test_ten_megabytes_of_log(daemon: Daemon, captured: bool) -> None:
    """220000 lines: the last 10000 are kept, and the status answers meanwhile."""
    line = '{"level":"trace","message":"spam, spam, spam"}'
    command = f"yes '{line}' | head -n 220000 >&3"
    genvm_id = daemon.run(**shell(command, capture_output=captured))
    status = watched(daemon, f"10 MB of log ({captured=})", lambda: daemon.result(genvm_id))
    assert status["exit_code"] == 0
    if captured:
        assert len(status["genvm_log"]) == 10_000
        assert status["genvm_log"][-1]["message"] == "spam, spam, spam"
        assert status["truncated"] == ["genvm_log"]


@pytest.mark.parametrize(("flags", "nicer"), [((), 10), (("--executor-nice=0",), 0)])
def test_executors_are_nicer_than_the_manager(
    root: Root, start: Start, flags: tuple[str, ...], nicer: int
) -> None:
    daemon = start(*flags)
    expected = min(19, os.getpriority(os.PRIO_PROCESS, daemon.pid) + nicer)
    # It is told so once it runs, which may be after its first line on a busy machine.
    root.script(f'until [ "$(nice)" = {expected} ]; do :; done; (nice); sh -c nice')
    result = daemon.result(daemon.run())
    assert result["stdout"].split() == [str(expected)] * 2


def test_a_log_line_of_five_megabytes(daemon: Daemon) -> None:
    status = daemon.result(daemon.run("log-big 5000000", "log info after", "exit 0"))
    first, second = status["genvm_log"]
    assert first["message"] == "x" * 5_000_000
    assert second["message"] == "after"
    assert status["truncated"] == []


def test_a_log_line_of_five_megabytes_is_forwarded(start: Start) -> None:
    daemon = start()
    daemon.result(daemon.run("log-big 5000000", "log info after", "exit 0", capture_output=False))
    daemon.wait_log(lambda r: r["message"] == "after")
    daemon.stop()
    assert [len(r["message"]) for r in daemon.records if "x" * 1_000_000 in r["message"]] == [
        5_000_000
    ]


def test_a_log_line_beyond_every_limit(daemon: Daemon) -> None:
    """Its head arrives, marked as cut, and so do the lines after it."""
    status = daemon.result(daemon.run("log-big 30000000", "log info after", "exit 0"))
    first, second = status["genvm_log"]
    assert (first["level"], first["message"]) == ("info", "genvm log")
    assert first["line"].endswith("x" * 1_000_000)
    assert second["message"] == "after"
    assert status["truncated"] == ["genvm_log"]


def test_a_log_line_without_a_newline(daemon: Daemon) -> None:
    command = """printf '{"level":"warn","message":"last words"}' >&3"""
    status = daemon.result(daemon.run(**shell(command)))
    assert status["genvm_log"] == [{"level": "warn", "message": "last words"}]


def test_more_log_records_than_are_kept(daemon: Daemon) -> None:
    status = daemon.result(daemon.run("spam log 740000", "log info last", "exit 0"))
    assert len(status["genvm_log"]) == 10_000
    assert status["genvm_log"][-1]["message"] == "last"
    assert status["truncated"] == ["genvm_log"]


@pytest.mark.parametrize(
    "line",
    [
        '{"level": "info", "n": NaN}',
        '{"level": "info", "n": Infinity}',
        '{"level": "info"} trailing',
        '{"level": "info", "deep": ' + "[" * 5000 + "]" * 5000 + "}",
        '{"level": "info", "n": ' + "1" * 5000 + "}",
        "[1, 2]",
        "null",
        '"text"',
        "{",
        "}",
        "\\x00\\x01",
    ],
    ids=lambda line: line[:30],
)
@pytest.mark.parametrize("captured", [True, False])
def test_odd_log_lines(daemon: Daemon, line: str, captured: bool) -> None:
    """Whatever it is, it arrives as a record, and the result is JSON."""
    genvm_id = daemon.run(f"log-raw {line}", "log info after", "exit 0", capture_output=captured)
    status = daemon.result(genvm_id)
    assert status["exit_code"] == 0
    if captured:
        assert len(status["genvm_log"]) == 2
        assert status["genvm_log"][0]["level"] == "info"
        assert status["genvm_log"][1]["message"] == "after"
    else:
        daemon.wait_log(lambda r: r.get("genvm_id") == genvm_id and r["message"] == "after")
        first = next(r for r in daemon.records if r.get("genvm_id") == genvm_id)
        assert first["message"] != "after"


def test_log_lines_that_are_not_utf_8(daemon: Daemon) -> None:
    command = (
        """printf '{"level":"info","message":"\\377"}\\n\\n  \\n' >&3\n"""
        """printf '{"level":"warn","message":"\\303\\251"}\\r\\n' >&3"""
    )
    records = daemon.result(daemon.run(**shell(command)))["genvm_log"]
    assert [record["level"] for record in records] == ["info", "warn"]
    assert "\ufffd" in records[0]["line"]
    assert records[1]["message"] == "é"
    daemon.result(daemon.run(**shell(command, capture_output=False)))
    assert daemon.wait_log(lambda r: r["message"] == "é")["level"] == "warn"


def test_characters_at_the_edges_of_chunks(daemon: Daemon) -> None:
    """Characters split over two writes with a pause between, and over the pieces of a reply."""
    command = (
        "printf '\\342\\202'; sleep 0.1; printf '\\254|'; printf '\\377|\\303'\n"
        "printf 'x' >&2; yes '\N{PILE OF POO}' | head -c 400000 | tr -d '\\n' >&2"
    )
    status = daemon.result(daemon.run(**shell(command)))
    assert status["stdout"] == "€|\ufffd|\ufffd"
    assert status["stderr"].strip("\ufffd") == "x" + "\N{PILE OF POO}" * (400000 // 5)


@pytest.mark.parametrize("character", ["é", "€", "\N{PILE OF POO}"])
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_a_character_where_the_tail_is_cut(daemon: Daemon, character: str, offset: int) -> None:
    """Nothing but whole characters is left of a stream that was cut in the middle of one."""
    size = len(character.encode())
    lines = 8 * MIB // (size + 1)
    command = f"yes '{character}' | head -n {lines} | tr -d '\\n'; printf '%{offset + 1}s'"
    text = daemon.result(daemon.run(**shell(command)))["stdout"]
    assert text.endswith(" " * (offset + 1))
    assert set(text.rstrip(" ")) == {character}
    assert 4 * MIB - size < len(text.encode()) <= 4 * MIB


def test_binary_output(daemon: Daemon) -> None:
    data = bytes(range(256))
    status = daemon.result(daemon.run(f"print-hex {data.hex()}", "exit 0"))
    assert status["stdout"] == data.decode("utf-8", "replace")


def test_one_that_dies_before_it_connects(daemon: Daemon) -> None:
    for step, code, number in (("exit 9", 9, None), ("die KILL", None, 9), ("die SEGV", None, 11)):
        status = daemon.result(daemon.run("print last words", step))
        assert (status["exit_code"], status["signal"]) == (code, number)
        assert (status["cause"], status["stdout"]) == ("exited", "last words\n")


def test_one_that_ends_at_once(daemon: Daemon) -> None:
    for _ in range(100):
        status = daemon.result(daemon.run(**shell("exit 0", is_sync=False)))
        assert (status["exit_code"], status["cause"]) == (0, "exited")


def test_one_that_is_stopped(daemon: Daemon) -> None:
    """A process that is stopped (SIGSTOP) can still be ended."""
    genvm_id = daemon.run("die STOP", "exit 0")
    eventually(lambda: [*map(state_of, daemon.descendants())] == ["T"], what="it is stopped")
    reply = daemon.request("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms=200")
    assert reply.json["code"] == "shutdown_timeout"
    assert daemon.result(genvm_id)["signal"] == 9


def test_one_that_closes_its_streams_and_goes_on(daemon: Daemon, tmp_path: Path) -> None:
    up, go = tmp_path / "up", tmp_path / "go"
    command = f"exec >&- 2>&- 3>&-; touch {up}; while [ ! -e {go} ]; do sleep 0.01; done; exit 4"
    genvm_id = daemon.run(**shell(command))
    eventually(up.exists)
    assert daemon.permits()["in_use"] == 1
    assert daemon.get(f"/genvm/{genvm_id}?wait=100ms")["status"] is None
    go.touch()
    assert daemon.result(genvm_id)["exit_code"] == 4


@pytest.mark.parametrize("session", [False, True])
@pytest.mark.parametrize("captured", [True, False])
def test_one_that_leaves_a_grandchild(daemon: Daemon, session: bool, captured: bool) -> None:
    """It holds the pipes; the result is there within a second, and it is killed."""
    step = "grandchild-session 300" if session else "grandchild 300"
    genvm_id = daemon.run(step, "print parent", "exit 0", capture_output=captured)
    begin = time.monotonic()
    status = daemon.result(genvm_id)
    timed(f"result in spite of a grandchild ({step}, {captured=})", time.monotonic() - begin, 1.0)
    assert (status["exit_code"], status["cause"]) == (0, "exited")
    if captured:
        assert status["stdout"] == "parent\n"
        (record,) = status["genvm_log"]
        within(1.0, lambda: not alive(record["pid"]), "the grandchild is killed")
    within(1.0, lambda: not daemon.descendants(), "nothing is left")


def test_a_grandchild_does_not_hold_the_permits(daemon: Daemon) -> None:
    """The next run starts at the exit of the executor."""
    daemon.post("/permits", {"permits": 1})
    first = daemon.run(**shell('(trap "" TERM; exec sleep 300) & exit 0'))
    second = daemon.run(**shell("exit 0"))
    assert daemon.result(second)["exit_code"] == daemon.result(first)["exit_code"] == 0
    daemon.post("/permits", {"permits": 8})
    within(1.0, lambda: not daemon.descendants(), "nothing is left")


def test_grandchildren_of_a_killed_executor(daemon: Daemon, tmp_path: Path) -> None:
    up = tmp_path / "up"
    steps = [
        "grandchild 300",
        "grandchild-session 300",
        "ignore-sigterm",
        f"touch {up}",
        "sleep 600",
    ]
    genvm_id = daemon.run(*steps)
    eventually(up.exists)
    assert len(daemon.descendants()) == 3
    daemon.request("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms=0")
    within(1.0, lambda: not daemon.descendants(), "nothing is left")


def test_grandchildren_without_the_marker(daemon: Daemon, tmp_path: Path) -> None:
    """They may tidy up, as below the guardian, but not for long."""
    go, pids = tmp_path / "go", tmp_path / "pids"
    steps = f"sleep 300 & echo $! $$ > {pids}.new; mv {pids}.new {pids}"
    start = f"env -i PATH=$PATH setsid sh -c '{steps}; exec sleep 300' &"
    genvm_id = daemon.run(**shell(f"{start} while ! [ -e {go} ]; do sleep 0.01; done; exit 0"))
    eventually(pids.exists)
    left = [int(word) for word in pids.read_text().split()]
    assert len(left) == 2
    begin = time.monotonic()
    go.touch()
    assert daemon.result(genvm_id)["exit_code"] == 0
    within(1.0, lambda: not any(map(alive, left)), "nothing is left")
    assert time.monotonic() - begin >= ORPHAN_GRACE_SECONDS


def test_grandchildren_do_not_harm_other_runs(daemon: Daemon, tmp_path: Path) -> None:
    """Cleaning up after one run leaves what another one started alone."""
    go = tmp_path / "go"
    keeper = daemon.run("grandchild 600", f"wait-file {go}", "exit 0")
    eventually(lambda: len(daemon.descendants()) == 2)
    daemon.result(daemon.run("grandchild-session 600", "exit 0"))
    eventually(lambda: len(daemon.descendants()) == 2)
    assert daemon.get(f"/genvm/{keeper}")["status"] is None
    go.touch()
    assert daemon.result(keeper)["exit_code"] == 0
    within(1.0, lambda: not daemon.descendants(), "nothing is left")


def test_results_are_valid_json_whatever_was_written(daemon: Daemon) -> None:
    genvm_id = daemon.run("print-hex " + '"\\\b\x7f\x1f\u2028</script>'.encode().hex(), "exit 0")
    raw = daemon.request("GET", f"/genvm/{genvm_id}?wait=60s").raw
    assert json.loads(raw)["status"]["stdout"] == '"\\\b\x7f\x1f\u2028</script>'


@pytest.mark.parametrize("captured", [True, False])
def test_what_the_manager_was_given_stays_with_it(shared_root: Root, captured: bool) -> None:
    """Neither descriptors nor ignored signals of its own starter reach an executor."""
    start = 'trap "" INT QUIT PIPE HUP; exec 3</dev/null 4</dev/null 9</dev/null <&-; exec "$@"'
    options = ["serve", "--root", str(shared_root.path), "--port", "0"]
    daemon = Daemon(["/bin/sh", "-c", start, "sh", sys.executable, str(SOURCE), *options])
    try:
        daemon.wait_until_listening()
        seen = shared_root.path / "seen"
        command = f"{{ ls /proc/$$/fd; grep SigIgn /proc/$$/status; }} >{seen}"
        daemon.result(daemon.run(**shell(command, capture_output=captured)))
        *fds, ignored = seen.read_text().splitlines()
        assert [fd for fd in fds if int(fd) < 10] == ["0", "1", "2", "3"], "sh has its script at 10"
        assert int(ignored.split()[1], 16) & 0x7FFF_FFFF == 0, "glibc keeps 32 and 33 to itself"
        seen.unlink()
    finally:
        daemon.close()


def test_no_descriptor_is_lost(daemon: Daemon) -> None:
    """After many runs of every kind the manager holds as many descriptors as before."""
    command = '[ "$sync" ] && exit 0; sleep 300 & exit 0'
    fds = Path(f"/proc/{daemon.pid}/fd")
    daemon.result(daemon.run(**shell(command)))
    before = len(list(fds.iterdir()))
    ids = [
        daemon.run(**shell(command, is_sync=n % 4 != 0, capture_output=n % 3 != 0))
        for n in range(60)
    ]
    for genvm_id in ids:
        daemon.result(genvm_id)
    eventually(lambda: len(list(fds.iterdir())) <= before, what="descriptors are closed")
    eventually(lambda: not daemon.descendants(), what="nothing is left")
