"""What the rows are measured with: managers, clients, bare processes, clocks."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from ..integration.support import (
    PROJECT,
    SOURCE,
    VERSION,
    WAIT,
    Daemon,
    Root,
    children_of,
    eventually,
    free_port,
    run_body,
)

IMPORTS = [sys.executable, "-c", "import klein, treq"]
"""What a program of this kind costs at the least, before it does anything."""
CLIENTS = 16
Conversation = Generator[bytes, bytes, None]
"""What a client says, and hears, until it is done."""


# --- clocks ---


def cpu_with_children() -> float:
    """Return the same of this process and of those that it has waited for."""
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in both)


def monotonic_ns() -> int:
    """Return nanoseconds of CLOCK_MONOTONIC, the executor's clock."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


# --- HTTP ---


def request(method: str, path: str, body: object = None) -> bytes:
    """Return the bytes of a request."""
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def run_request(*words: str, **changes: Any) -> bytes:
    """Return a request for a run of the tiny executor, with what it is to do."""
    return request("POST", "/genvm/run", run_body(extra_args=[*words], **changes))


def result_request(started: bytes) -> bytes:
    """Return the request that waits for the result of a run, by the answer to its start."""
    return request("GET", f"/genvm/{json.loads(started)['id']}?wait=60s")


class Client:
    """A keep-alive connection with one request at a time."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), 2 * WAIT)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._parts: list[bytes] = []
        self._missing = 0
        self._chunked = False

    def send(self, data: bytes) -> None:
        """Make a request."""
        self._parts, self._missing, self._chunked = [], 0, False
        self.socket.sendall(data)

    def receive(self) -> bytes | None:
        """Read something; return the body once it is complete, a chunked one as it came."""
        data = self.socket.recv(1 << 20)
        assert data, "the connection was closed"
        self._parts.append(data)
        if self._chunked:
            return b"".join(self._parts) if data.endswith(b"0\r\n\r\n") else None
        self._missing -= len(data)
        if self._missing < 0:  # the length is not known yet
            whole = b"".join(self._parts)
            head, blank, body = whole.partition(b"\r\n\r\n")
            if not blank:
                self._missing = 0
                return None
            assert b" 200 " in head[:14], whole
            self._parts = [body]
            self._chunked = b"chunked" in head.lower()
            if self._chunked:
                return body if body.endswith(b"0\r\n\r\n") else None
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            self._missing = length - len(body)
        return b"".join(self._parts) if self._missing == 0 else None

    def ask(self, data: bytes) -> bytes:
        """Make a request; return the body of its answer."""
        self.send(data)
        while (body := self.receive()) is None:
            pass
        return body

    def run(self, *words: str, **changes: Any) -> bytes:
        """Run the tiny executor to its end; return the result."""
        return self.ask(result_request(self.ask(run_request(*words, **changes))))

    def close(self) -> None:
        """Disconnect."""
        self.socket.close()


def converse(address: str, count: int, seconds: float, begin: Callable[[], Conversation]) -> float:
    """Let clients have one conversation after the other; return how many a second they had."""
    done, clients = 0, [Client(address) for _ in range(count)]
    with selectors.DefaultSelector() as selector:
        talks = {}
        start = time.perf_counter()
        for client in clients:
            selector.register(client.socket, selectors.EVENT_READ, client)
            talks[client] = begin()
            client.send(next(talks[client]))
        while time.perf_counter() - start < seconds:
            for key, _ in selector.select(1.0):
                client = key.data
                if (body := client.receive()) is None:
                    continue
                try:
                    client.send(talks[client].send(body))
                except StopIteration:
                    done += 1
                    talks[client] = begin()
                    client.send(next(talks[client]))
        spent = time.perf_counter() - start
    for client in clients:
        client.close()
    return done / spent


# --- processes ---


class Stage:
    """A GenVM root with the tiny executor, and all that is started for a row."""

    def __init__(self, *, quick: bool, log_level: str = "warn") -> None:
        self.quick = quick
        self._log_level = log_level
        self._closing = contextlib.ExitStack()
        self._managers: dict[tuple[tuple[str, str], ...], Daemon] = {}
        self.root = Root()
        self._closing.callback(self.root.close)
        self.executor = compile_executor(self.root.path)
        self.folder = Path(self._closing.enter_context(tempfile.TemporaryDirectory()))
        self.fifo = self.folder / "moments"
        os.mkfifo(self.fifo)
        self._moments = os.open(self.fifo, os.O_RDWR)
        self._closing.callback(os.close, self._moments)
        self.environ = {"BENCH_FIFO": str(self.fifo)}

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def times(self, full: int, quick: int) -> int:
        """Return how often something is repeated."""
        return quick if self.quick else full

    def seconds(self) -> float:
        """Return the length of a repetition that is bounded by time."""
        return 0.1 if self.quick else 1.0

    def start(self, environ: dict[str, str] | None = None, *command: str) -> Daemon:
        """Start a manager, by default from the file; returns before it listens."""
        port = free_port()
        words = ["--root", str(self.root.path), "--port", str(port), "--permits", "1100"]
        words += ["--log-file", str(self.folder / "manager.log"), "--log-level", self._log_level]
        argv = [*(command or (sys.executable, str(SOURCE))), "serve", *words]
        daemon = Daemon(argv, environ={**self.environ, **(environ or {})})
        self._closing.callback(daemon.close)
        daemon.address = f"127.0.0.1:{port}"
        return daemon

    def manager(self, **environ: str) -> Daemon:
        """Return a manager that has answered, and is over the costs of its first runs.

        To see that the rows work, one is enough for all that have the same environment.
        """
        key = tuple(environ.items())
        if self.quick and key in self._managers:
            return self._managers[key]
        self._managers[key] = daemon = self.start(environ)
        client = first_client(daemon)
        for _ in range(self.times(50, 5)):
            client.run()
        client.close()
        return daemon

    @contextlib.contextmanager
    def yardsticks(self) -> Iterator[tuple[str, int]]:
        """Give the address of a process of yardsticks, and its pid."""
        argv = [sys.executable, "-m", "tests.bench.yardsticks"]
        pipe = subprocess.PIPE
        with subprocess.Popen(argv, stdin=pipe, stdout=pipe, cwd=PROJECT) as process:
            assert process.stdout is not None
            yield f"127.0.0.1:{int(process.stdout.readline())}", process.pid
            assert process.stdin is not None
            process.stdin.close()
            process.wait(WAIT)

    def moment(self) -> int:
        """Return the moment that an executor reports."""
        return int.from_bytes(os.read(self._moments, 8), sys.byteorder)

    def bare_run(self, *words: str) -> None:
        """Run the tiny executor without a manager."""
        argv = [str(self.executor), *words]
        os.waitpid(os.posix_spawn(argv[0], argv, {**os.environ, **self.environ}), 0)


def first_client(daemon: Daemon) -> Client:
    """Wait until a manager has answered ``/status``; return the connection."""

    def connected() -> Client | None:
        assert daemon.process.poll() is None, daemon.errors
        with contextlib.suppress(ConnectionRefusedError):
            return Client(daemon.address)
        return None

    client = eventually(connected, what="the manager listens")
    assert client is not None
    client.ask(request("GET", "/status"))
    return client


def hold(daemon: Daemon, count: int) -> set[int]:
    """Start executors that stay until they are killed; return their pids."""
    before = set(children_of(daemon.pid))
    client = Client(daemon.address)
    for _ in range(count):
        client.ask(run_request("hold", max_execution_minutes=60))
    client.close()
    return set(children_of(daemon.pid)) - before


def compile_executor(root: Path) -> Path:
    """Build the tiny executor where the manager looks for it."""
    program = root / "executor" / VERSION / "bin" / "genvm"
    program.parent.mkdir(parents=True)
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("bench: needs a C compiler (Debian: apt-get install gcc libc6-dev)")
    source = Path(__file__).with_name("tiny_executor.c")
    subprocess.run([compiler, "-O2", "-static", "-o", program, source], check=True)
    return program


def cost_of(argv: list[str]) -> float:
    """Run a program to its end; return the seconds of a processor that it took."""
    pid = os.posix_spawn(argv[0], argv, os.environ)
    _, status, usage = os.wait4(pid, 0)
    assert status == 0, argv
    return usage.ru_utime + usage.ru_stime
