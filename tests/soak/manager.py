"""The manager under test as the kernel and its log show it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import attrs

from ..integration.support import (
    SOURCE,
    Daemon,
    Root,
    alive,
    children_of,
    command_of,
    eventually,
    memory_of,
    processes_with,
)

OWN_WORDS = ("execution finished", "execution started", "started without modules")
"""How the manager's own records about an execution begin; others come from its executor."""


def descriptors_of(pid: int) -> Counter[str]:
    """Return how many descriptors of each kind a process has open."""
    found: Counter[str] = Counter()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            found[target.partition(":[")[0].removesuffix(" (deleted)")] += 1
    return found


@attrs.define
class Log:
    """What has been in the log: it is read as it grows, and little of it is kept."""

    path: Path
    ends: dict[int, list[tuple[Any, Any, Any]]] = attrs.field(factory=dict)
    lines_of: Counter[int] = attrs.field(factory=Counter)
    """How many lines of an executor were passed on."""
    troubles: list[str] = attrs.field(factory=list)
    dropped: bool = False
    address: str = ""
    _at: int = 0
    _rest: bytes = b""

    def read(self, most: int = 8 << 20) -> bool:
        """Take in what is new; tell whether there was anything."""
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self._at)
            data = file.read(most)
            self._at += len(data)
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._take(line)
            return bool(data)
        return False

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except ValueError:
            self.troubles.append(f"a line that is not JSON: {line[:200]!r}")
            return
        message = record["message"]
        if "traceback" in record or record["level"] == "critical":
            self.troubles.append(f"{message}\n{record.get('traceback', '')}")
        if message == "listening":
            self.address = record["address"]
        self.dropped = self.dropped or message.startswith("log lines dropped")
        if "genvm_id" in record and message == "execution finished":
            end = (record["cause"], record["exit_code"], record["signal"])
            self.ends.setdefault(record["genvm_id"], []).append(end)
        elif "genvm_id" in record and not message.startswith(OWN_WORDS):
            self.lines_of[record["genvm_id"]] += 1


class Manager(Daemon):
    """The manager with a log file, a temporary folder of its own, and addresses for its modules."""

    def __init__(self, root: Root, folder: Path, retention: float, modules: dict[str, str]) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        (folder / "runs").mkdir()
        self.log = Log(folder / "manager.log")
        self.problems = ""
        flags = ["--root", str(root.path), "--port", "0", "--permits", "8"]
        flags += ["--log-file", str(self.log.path), "--log-file-max-bytes", str(1 << 40)]
        flags += ["--execution-retention", f"{retention}s"]
        environ = {"TMPDIR": str(self.temporary), "SOAK_FOLDER": str(folder / "runs")}
        environ |= {f"GENVM_{kind.upper()}_MODULE": f"ws://{at}" for kind, at in modules.items()}
        super().__init__([sys.executable, str(SOURCE), "serve", *flags], environ=environ)

        def listening() -> bool:
            self.log.read()
            return bool(self.log.address) or self.process.poll() is not None

        eventually(listening, what="the manager listens")
        assert self.log.address, self.errors
        self.address = self.log.address

    def memory(self, name: str = "VmRSS") -> int:
        """Return resident bytes, now or at most."""
        return memory_of(self.pid, name)

    def descriptors(self) -> Counter[str]:
        """Return how many descriptors of each kind are open."""
        return descriptors_of(self.pid)

    def threads(self) -> int:
        """Return the number of threads."""
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def strangers(self) -> list[str]:
        """Return the processes below the manager that are not its guardian, zombies included."""
        pids = {*processes_with(self.marker), *children_of(self.pid)} - {self.pid}
        return [
            f"{pid} {command_of(pid)[:300] or 'ended'}"
            for pid in pids
            if "guard_descendants" not in command_of(pid)
            and (alive(pid) or os.path.exists(f"/proc/{pid}"))
        ]

    def temporary_files(self) -> list[str]:
        """Return what is in the temporary folder."""
        return os.listdir(self.temporary)
