"""The log file when its disk is full, when others move, truncate or remove it, and at signals."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from genvm_manager import LogFile, LogWriter

from ..integration.support import SOURCE, Daemon, Root, eventually


def log_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_a_rotation_that_fails_does_not_end_the_log(tmp_path: Path) -> None:
    path = tmp_path / "m.log"
    file = LogFile(path, 100, 2)
    (tmp_path / "m.log.2").mkdir()
    (tmp_path / "m.log.2" / "x").touch()  # nothing can take its place
    writer = LogWriter(file.write, 1.0)
    lines = [f"{number:040}\n" for number in range(20)]
    for line in lines:
        writer.put(line.encode())
    (tmp_path / "m.log.2" / "x").unlink()
    (tmp_path / "m.log.2").rmdir()
    writer.put(b"last\n")
    texts = [part.read_text() for part in sorted(tmp_path.iterdir(), reverse=True)]
    assert "".join(texts).splitlines() == [*map(str.strip, lines), "last"]


def test_a_folder_that_is_gone_for_a_while_loses_only_its_lines(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    writer = LogWriter(LogFile(folder / "m.log", 0, 0).write, 5.0)
    writer.start()
    writer.put(b"before\n")
    eventually(lambda: log_lines(folder / "m.log") == ["before"])
    (folder / "m.log").unlink()
    folder.rmdir()
    writer.put(b"lost\n")
    eventually(lambda: writer._failed == 1, what="it is noticed")
    folder.mkdir()
    writer.put(b"after\n")
    writer.stop()
    first, note = log_lines(folder / "m.log")
    assert (first, json.loads(note)["dropped"]) == ("after", 1)


@pytest.mark.parametrize("how", ["renamed", "removed", "truncated"])
def test_a_file_that_others_change_is_opened_again(tmp_path: Path, how: str) -> None:
    path = tmp_path / "m.log"
    file = LogFile(path, 0, 0)
    file.write(b"one\n")
    if how == "renamed":
        path.rename(tmp_path / "old")
    elif how == "removed":
        path.unlink()
    else:
        os.truncate(path, 0)
    file.write(b"two\n")
    assert path.read_bytes() == b"two\n", "and there is no gap in it"


def limited(daemon: Daemon, size: int) -> None:
    """Let no file of the daemon grow beyond a size, as on a full disk."""
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log; a torn line makes this fail, unless it is the last."""
    return [json.loads(line) for line in log_lines(path)]


def test_a_line_that_was_torn_does_not_take_the_next_one_along(tmp_path: Path) -> None:
    """A file that may not grow takes a part of a line."""
    path = tmp_path / "m.log"
    file = LogFile(path, 0, 0)
    writer = LogWriter(file.write, 1.0)
    writer.put(b"first\n")
    child = os.fork()
    if child == 0:  # the limit is for a process
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
        writer.put(b"second\n")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        writer.put(b"third\n")
        os._exit(0)
    os.waitpid(child, 0)
    assert log_lines(path)[0] == "first"
    assert log_lines(path)[1] in ("seco", "third")
    assert log_lines(path)[-1] == "third"


@contextlib.contextmanager
def logging_daemon(root: Root) -> Iterator[tuple[Daemon, Path]]:
    """A daemon on a unix socket, and its log file."""
    path = root.path / "m.log"
    argv = [sys.executable, str(SOURCE), "serve", "--root", str(root.path)]
    daemon = Daemon([*argv, "--socket", f"{root.path}/s", "--log-file", str(path)])
    try:
        eventually(lambda: messages(path).count("listening") == 1, what="it listens")
        daemon.address = f"unix://{root.path}/s"
        yield daemon, path
        assert daemon.stop() == 0
    finally:
        daemon.close()


def messages(path: Path) -> list[str]:
    return [record["message"] for record in records(path)]


def test_a_log_file_that_was_moved_is_left_at_the_next_line(root: Root) -> None:
    with logging_daemon(root) as (daemon, path):
        path.rename(root.path / "old")
        daemon.result(daemon.run("exit 0"))
        eventually(lambda: "execution finished" in messages(path), what="a line in the new file")
        assert "execution finished" not in messages(root.path / "old")


def test_sigusr1_opens_the_log_file_and_sigusr2_says_the_state(root: Root) -> None:
    with logging_daemon(root) as (daemon, path):
        daemon.signal(signal.SIGUSR1)
        eventually(lambda: "log file reopened" in messages(path))
        daemon.signal(signal.SIGUSR2)
        eventually(lambda: "state" in messages(path))
        state = next(record for record in records(path) if record["message"] == "state")
        assert (state["waiting"], state["unfinished"], state["draining"]) == (0, 0, False)
        assert state["modules"] == {"llm": "stopped", "web": "stopped"}
        assert daemon.result(daemon.run("exit 3"))["exit_code"] == 3


def test_the_log_goes_on_after_a_full_disk(root: Root) -> None:
    with logging_daemon(root) as (daemon, path):
        limited(daemon, path.stat().st_size + 150)
        for _ in range(3):
            daemon.result(daemon.run("exit 0"))
        limited(daemon, resource.RLIM_INFINITY)
        daemon.result(daemon.run("exit 7"))
        eventually(lambda: '"exit_code": 7' in path.read_text(), what="a line after the shortage")

        def whole() -> list[dict[str, Any]]:
            found = []
            for line in log_lines(path):
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
            return found

        def accounted() -> int:
            ends = sum(1 for record in whole() if record["message"] == "execution finished")
            return ends + sum(int(record.get("dropped", 0)) for record in whole())

        # A late writer may have the third line when there is room again, and the note before it.
        eventually(lambda: accounted() == 4, what="each run has its line, or a note counts it")
        assert any("dropped" in record for record in whole())
        assert len(whole()) >= len(log_lines(path)) - 1, "one line is torn, and no other"
