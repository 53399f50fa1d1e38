"""The configuration of README, HAProxy as a process, and managers behind it."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from ..integration.support import PROJECT, WAIT, Daemon, Reply, Root, eventually, free_port

HAPROXY = shutil.which("haproxy")
MANAGERS = ("10.0.0.1:3999", "10.0.0.2:3999", "10.0.0.3:3999")
FRONT = "bind 127.0.0.1:3999"
INSTANCES = range(len(MANAGERS))
NAME = "genvm.example"
PERMITS = 4


def readme_configuration() -> str:
    """Return HAProxy's configuration as README has it."""
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"^```haproxy\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return str(found)


def configuration(front: int, managers: Iterable[str], *, is_hasty: bool = False) -> str:
    """Return it with other addresses, and without the servers that there are not.

    A manager may take its time for a health check, as on a busy machine, unless it ``is_hasty``.
    """
    text = readme_configuration().replace(FRONT, f"bind 127.0.0.1:{front}")
    if not is_hasty:
        text = text.replace("defaults\n", f"defaults\n    timeout check {WAIT:g}s\n")
    ours = [*managers]
    for place, address in zip(MANAGERS, ours, strict=False):
        port = address.rpartition(":")[2]
        text = text.replace(f"{place} agent-port 3999", f"{place} agent-port {port}")
        text = text.replace(place, address)
    absent = MANAGERS[len(ours) :]
    return "".join(
        line
        for line in text.splitlines(keepends=True)
        if not any(place in line for place in absent)
    )


class Proxy(Daemon):
    """HAProxy; asked for what a client asks, it answers in place of a manager."""

    @classmethod
    def start(cls, folder: Path, managers: Iterable[str], *, is_hasty: bool = False) -> Self:
        """Start it for managers at these addresses; returns once it answers."""
        assert HAPROXY is not None
        front = free_port()
        path, commands = folder / "haproxy.cfg", folder / "haproxy.sock"
        path.write_text(configuration(front, managers, is_hasty=is_hasty))
        # As master and worker it takes commands without a word about that in its configuration.
        proxy = cls([HAPROXY, "-W", "-db", "-S", str(commands), "-f", str(path)])
        proxy.address, proxy.commands = f"127.0.0.1:{front}", commands

        def answers() -> bool:
            assert proxy.process.poll() is None, proxy.errors
            with contextlib.suppress(OSError), proxy.connect():
                return "genvm" in proxy.command("show servers state")
            return False

        try:
            eventually(answers, what="HAProxy listens")
        except BaseException:
            proxy.close()
            raise
        return proxy

    commands: Path

    def command(self, text: str) -> str:
        """Return what the worker answers to a command of HAProxy's."""
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(WAIT)
            peer.connect(str(self.commands))
            peer.sendall(f"@1 {text}\n".encode())
            peer.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: peer.recv(65536), b"")).decode()

    def up(self, backend: str) -> list[int]:
        """Return the instances of the managers that a backend gives requests to."""
        return [instance for instance, weight in self.weights(backend).items() if weight]

    def weights(self, backend: str) -> dict[int, int]:
        """Return the weights of the managers of a backend that are up, by instance."""
        lines = map(str.split, self.command("show servers state").splitlines())
        ours = [w for w in lines if w[1:2] == [backend] and w[3][0] + w[5] == "m2"]
        return {int(w[3][1:]): int(w[7]) for w in ours}

    def wait_up(self, backend: str, *instances: int) -> None:
        """Wait until a backend has exactly these managers."""
        eventually(lambda: self.up(backend) == [*instances], what=f"{backend} has {instances}")

    def wait_weights(self, *weights: int) -> None:
        """Wait until HAProxy knows that the managers have so many permits for new runs."""
        expected = dict(enumerate(weights))
        eventually(lambda: self.weights("genvm") == expected, what=f"permits are {weights}")


class Cluster:
    """Three managers and HAProxy before them."""

    def __init__(self, *flags: str) -> None:
        self._flags = flags
        self.root = Root()
        self.root.practice()
        self.root.add_shell()
        self._ports = [free_port() for _ in INSTANCES]
        self._folder = tempfile.TemporaryDirectory(prefix="gm-proxy-")
        self.managers: list[Daemon] = []
        try:
            for instance in INSTANCES:
                self.managers.append(self.serve(instance))
            addresses = [manager.address for manager in self.managers]
            self.proxy = Proxy.start(Path(self._folder.name), addresses)
            self.proxy.wait_weights(*(PERMITS for _ in INSTANCES))
        except BaseException:
            self.close()
            raise

    def serve(self, instance: int) -> Daemon:
        """Start a manager."""
        listen = ("--port", str(self._ports[instance]), "--instance", str(instance))
        return Daemon.serve(self.root, "--permits", str(PERMITS), *self._flags, listen=listen)

    def restart(self, instance: int) -> None:
        """Start a manager anew where one has ended."""
        self.managers[instance].close()
        self.managers[instance] = self.serve(instance)

    def settle(self) -> None:
        """Wait until all is as at the start; runs that are left are ended."""
        for manager in self.managers:
            manager.post("/undrain")
            manager.post("/permits", {"permits": PERMITS})
            for genvm_id, entry in manager.get("/status")["executions"].items():
                if entry["state"] != "finished":
                    manager.request("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms=0")
                manager.get(f"/genvm/{genvm_id}")  # what nobody has read would hold up a drain
            eventually(manager.idle, what="a manager is idle")
        self.proxy.wait_weights(*(PERMITS for _ in INSTANCES))
        self.proxy.wait_up("keyed", *INSTANCES)

    def close(self) -> None:
        """End everything."""
        for daemon in (*self.managers, *([self.proxy] if hasattr(self, "proxy") else [])):
            daemon.close()
        self._folder.cleanup()
        self.root.close()


def of(genvm_id: int) -> int:
    """Return the instance of the manager that has an execution."""
    return genvm_id % 100


def events_of(daemon: Daemon, path: str, headers: Mapping[str, str] | None = None) -> Iterator[str]:
    """Yield the lines of a stream of events as they come; whoever stops reading hangs up."""
    with daemon.connect() as peer, peer.makefile("rb") as lines:
        head = "".join(f"{name}: {text}\r\n" for name, text in (headers or {}).items())
        peer.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n{head}\r\n".encode())
        for line in lines:
            yield line.decode().rstrip()


def is_retryable(reply: Reply) -> bool:
    """Tell whether an answer is an error that a client is to try again."""
    return reply.status != 200 and bool(reply.json["retryable"]) and "retry-after" in reply.headers


def answer_of(reply: Reply) -> Any:
    """Return the body of an answer that must be a success."""
    assert reply.status == 200, reply.raw[:1000]
    return reply.json
