"""Unix sockets that several managers want, starts that fail, closed standard streams."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from genvm_manager import own_command

from ..integration.support import SOURCE, WAIT, Daemon, Root, eventually
from .support import times

MANAGERS = 6


def command(root: Root, *flags: str) -> list[str]:
    return own_command("serve", "--root", str(root.path), *flags)


def dead_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def all_but_one_ended(daemons: list[Daemon]) -> bool:
    return [daemon.process.poll() for daemon in daemons].count(None) == 1


def test_of_managers_that_start_over_a_dead_socket_one_serves(root: Root) -> None:
    path = root.path / "s"
    for _ in range(times(1, 10)):
        path.unlink(missing_ok=True)
        dead_socket(path)
        daemons = [Daemon(command(root, "--socket", str(path))) for _ in range(MANAGERS)]
        try:
            eventually(functools.partial(all_but_one_ended, daemons), what="all but one end")
            (survivor,) = [d for d in daemons if d.process.poll() is None]
            survivor.wait_log(lambda record: record["message"] == "listening")
            survivor.address = f"unix://{path}"
            assert survivor.get("/status")["draining"] is False
            for other in daemons:
                if other is not survivor:
                    assert other.process.returncode == 1
                    assert str(path) in other.errors, "the message names the socket"
                    assert "b'" not in other.errors
            assert survivor.stop() == 0
            assert not path.exists()
        finally:
            for daemon in daemons:
                daemon.close()


def test_a_start_that_fails_on_its_port_leaves_no_socket(root: Root) -> None:
    path = root.path / "s"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        run = subprocess.run(
            command(root, "--socket", str(path), "--port", port),
            capture_output=True,
            text=True,
            check=False,
            timeout=2 * WAIT,
        )
    assert run.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in run.stderr
    assert not path.exists()


@pytest.mark.parametrize("closed", [(0, 1, 2), (1,), (2,), (0,)])
def test_closed_standard_streams_are_no_reason_not_to_run(
    root: Root, closed: tuple[int, ...]
) -> None:
    """What is opened first would get their numbers, and the log would be written into it."""
    path = root.path / "s"
    redirections = " ".join(f"{fd}>&-" for fd in closed)
    log = root.path / "m.log"
    words = [sys.executable, str(SOURCE), "serve", "--root", str(root.path)]  # as a script
    words += ["--socket", str(path), "--log-file", str(log)]
    daemon = Daemon(["sh", "-c", f'exec "$@" {redirections}', "sh", *words])
    try:
        daemon.address = f"unix://{path}"
        eventually(path.exists, what="it listens")
        assert daemon.result(daemon.run("print fine"))["stdout"] == "fine\n"
        for fd in closed:
            assert os.readlink(f"/proc/{daemon.pid}/fd/{fd}") == os.devnull
        assert daemon.stop() == 0
        for line in log.read_text().splitlines():
            json.loads(line)
    finally:
        daemon.close()
