"""The temporary folder is full: what needs it fails with a clear error, all else goes on."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from ..integration.support import Daemon, Root
from .support import troubles

MIB = 1 << 20
HEADER = {"Deployment-Timestamp": "2025-06-01T00:00:00Z"}
SCHEMA = b'# v0.1.0\non schema\nreturn "{}"'
LARGE = SCHEMA + b"\n#" + b"x" * 5 * MIB


class Disk(NamedTuple):
    """A manager, its temporary folder, and how to fill and to empty that."""

    daemon: Daemon
    folder: Path
    fill: Callable[[], object]
    empty: Callable[[], object]

    def ask(self, path: str, code: bytes) -> tuple[int, str | None]:
        """Ask about a contract; return the status and the code of an error."""
        reply = self.daemon.request("POST", path, code, HEADER)
        return reply.status, reply.json.get("code")


@pytest.fixture
def disk(root: Root) -> Iterator[Disk]:
    """A disk of its own where one can be mounted, else a limit on the size of files."""
    folder = root.path / "t"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    filler = folder / "filler"
    daemon = Daemon.serve(root, environ={"TMPDIR": str(folder)})
    free = resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE)

    def fill() -> None:
        if not mounted:
            resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (MIB, free[1]))
            return
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(b"x" * MIB)

    def empty() -> None:
        filler.unlink(missing_ok=True)
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, free)

    try:
        yield Disk(daemon, folder, fill, empty)
    finally:
        daemon.close()
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(disk: Disk) -> None:
    assert disk.ask("/genvm/run/readonly", LARGE) == (200, None)
    disk.fill()
    for path in ("/genvm/run/readonly", "/contract/detect-version", "/contract/pre-deploy-writes"):
        assert disk.ask(path, LARGE) == (500, "temporary_folder_failed")
    body = b'{"permits": 3, "rest": "' + b"x" * 5 * MIB + b'"}'
    reply = disk.daemon.request("POST", "/permits", body)
    assert (reply.status, reply.json["code"]) == (500, "temporary_folder_failed")
    # What needs no file goes on, with all its output.
    genvm_id = disk.daemon.run("spam stdout 3000000", "spam log 500000", "exit 0")
    status = disk.daemon.result(genvm_id)
    assert (status["exit_code"], len(status["stdout"])) == (0, 3_000_000)
    assert disk.ask("/contract/detect-version", b"# v0.1.0") == (200, None)
    disk.empty()
    assert disk.ask("/genvm/run/readonly", LARGE) == (200, None)
    assert disk.daemon.request("POST", "/permits", body).status == 200
    assert list(disk.folder.iterdir()) == []
    assert disk.daemon.idle()
    assert troubles(disk.daemon) == []


def test_a_module_while_the_disk_is_full(disk: Disk) -> None:
    """The built-in modules need no file for their configuration."""
    disk.fill()
    config = {"bind_address": "127.0.0.1:0"}
    body = {"module_type": "llm", "config": config, "allow_empty_backends": True}
    assert disk.daemon.post("/module/start", body) == {"result": "module_started"}
    disk.empty()
    assert disk.daemon.post("/module/stop", {"module_type": "llm"}) == {"result": "module_stopped"}
    assert troubles(disk.daemon) == []
