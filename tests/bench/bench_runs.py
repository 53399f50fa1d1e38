"""Measure what the manager adds to a bare process.

One command, ``python tests/bench/bench_runs.py``, compiles a tiny static executor and prints, from
the same run on the same machine:

* full runs a second (POST, exit, GET of the result; 16 keep-alive clients), beside bare
  ``os.posix_spawn`` + ``waitpid`` of the same binary, one after the other;
* the time from the POST to the executor's first instruction, beside the time from a bare
  ``posix_spawn`` to it.

``--profile FILE`` writes a cProfile of the manager. Nothing here can fail for being slow.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
MANAGER = HERE.parent.parent / "genvm_manager.py"
CLIENTS = 16
START_SECONDS = 30.0
BODY = json.dumps(
    {
        "major": 0,
        "message": {"contract_address": "AAAAAAAAAAAAAAAAAAAAAAAAAAE=", "is_init": False},
        "is_sync": True,
        "capture_output": True,
        "max_execution_minutes": 1,
        "host_data": '{"node_address": "0x", "tx_id": "0x"}',
        "timestamp": "2025-06-01T00:00:00Z",
        "host": "unix:///tmp/none",
        "extra_args": [],
    }
).encode()
HEAD = "HTTP/1.1\r\nHost: localhost\r\n"
POST = f"POST /genvm/run {HEAD}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY


def compile_executor(root: Path) -> Path:
    """Build the tiny executor where the manager looks for version v0.1.0."""
    program = root / "executor" / "v0.1.0" / "bin" / "genvm"
    program.parent.mkdir(parents=True)
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("bench_runs: needs a C compiler (Debian: apt-get install gcc libc6-dev)")
    source = HERE / "tiny_executor.c"
    subprocess.run([compiler, "-O2", "-static", "-o", program, source], check=True)
    (root / "data").mkdir()
    (root / "data" / "manifest.yaml").write_text(
        'executor_versions: {v0.1.0: {available_after: "2025-01-01T00:00:00Z"}}\n'
    )
    return program


@contextlib.contextmanager
def manager(root: Path, environment: dict[str, str], profile: str | None) -> Iterator[int]:
    """Run a manager; gives its port."""
    # cProfile's own __main__ would hide ours from what looks names up in it: import instead.
    # The manager leaves by os._exit, which would leave the profile behind.
    profiled = "import cProfile, os, sys, genvm_manager; os._exit = sys.exit; "
    profiled += f"cProfile.run('genvm_manager.main()', {profile!r})"
    program = ["-c", profiled] if profile else [str(MANAGER)]
    command = [sys.executable, *program, "serve", "--port", "0"]
    command += ["--root", str(root), "--permits", "64", "--log-level", "warn"]
    command += ["--log-file", str(root / "manager.log"), "--die-with-parent"]
    search = {"PYTHONPATH": str(MANAGER.parent)}
    process = subprocess.Popen(command, env={**os.environ, **search, **environment})
    try:
        yield wait_for_port(process)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(START_SECONDS)


def wait_for_port(process: subprocess.Popen[bytes]) -> int:
    """Return the port that a process listens on, read from the kernel's tables."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        inodes = set()
        with contextlib.suppress(OSError):
            for fd in os.scandir(f"/proc/{process.pid}/fd"):
                with contextlib.suppress(OSError):
                    inodes.add(os.readlink(fd.path))
        for line in Path(f"/proc/{process.pid}/net/tcp").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
                return int(words[1].partition(":")[2], 16)
        select_pause()
    raise SystemExit("bench_runs: the manager did not start")


def select_pause() -> None:
    """Let a process that starts have the processor for a moment."""
    selectors.DefaultSelector().select(0.02)


def bare_runs(program: Path, seconds: float) -> float:
    """Return spawns and reaps a second, without anything around them."""
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        os.waitpid(os.posix_spawn(program, [str(program)], os.environ), 0)
        count += 1
    return count / (time.perf_counter() - start)


class Client:
    """A keep-alive connection that makes one execution at a time."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        self._posted = False

    def post(self) -> None:
        """Ask for an execution."""
        self._posted = True
        self.socket.sendall(POST)

    def take_reply(self) -> bool:
        """Read; ask for the result once the run has started; tell whether the result is there."""
        self._buffer += self.socket.recv(65536)
        body = complete_body(self._buffer)
        if body is None:
            return False
        self._buffer = b""
        answer = json.loads(body)
        if "error" in answer:
            raise SystemExit(f"bench_runs: the manager refused: {answer}")
        if self._posted:
            self._posted = False
            self.socket.sendall(f"GET /genvm/{answer['id']}?wait=60s {HEAD}\r\n".encode())
            return False
        if answer["status"]["exit_code"] != 0:
            raise SystemExit(f"bench_runs: an execution failed: {answer}")
        return True


def complete_body(data: bytes) -> bytes | None:
    """Return the body of a response once it is complete."""
    head, separator, body = data.partition(b"\r\n\r\n")
    if not separator:
        return None
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    return body if len(body) == length else None


def managed_runs(port: int, seconds: float) -> float:
    """Return full runs a second through the manager."""
    clients = [Client(port) for _ in range(CLIENTS)]
    done = 0
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.socket, selectors.EVENT_READ, client)
            client.post()
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            for key, _ in selector.select(1.0):
                if key.data.take_reply():
                    done += 1
                    key.data.post()
        spent = time.perf_counter() - start
    for client in clients:
        client.socket.close()
    return done / spent


def started_at(fifo: int) -> int:
    """Return when the executor started, in nanoseconds of CLOCK_MONOTONIC."""
    return int.from_bytes(os.read(fifo, 8), sys.byteorder)


def now() -> int:
    """Return nanoseconds of CLOCK_MONOTONIC, the executor's clock."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def bare_latency(program: Path, fifo: int, environment: dict[str, str]) -> float:
    """Return microseconds from a bare spawn to the first instruction."""
    start = now()
    pid = os.posix_spawn(program, [str(program)], environment)
    os.waitpid(pid, 0)
    return (started_at(fifo) - start) / 1000


def managed_latency(client: Client, fifo: int) -> float:
    """Return microseconds from a POST to the first instruction."""
    start = now()
    client.post()
    while not client.take_reply():
        pass
    return (started_at(fifo) - start) / 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement")
    parser.add_argument("--samples", type=int, default=500, help="latency samples")
    parser.add_argument("--profile", metavar="FILE", help="write a cProfile of the manager")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="genvm-bench-") as folder:
        root = Path(folder)
        program = compile_executor(root)
        with manager(root, {}, options.profile) as port:
            managed_runs(port, 1.0)  # warm
            bare = [bare_runs(program, options.seconds / 2)]
            managed = managed_runs(port, options.seconds)
            bare.append(bare_runs(program, options.seconds / 2))
        yardstick = statistics.mean(bare)
        print(f"bare posix_spawn + waitpid        {yardstick:8.0f} runs/s")
        print(f"full runs, {CLIENTS} keep-alive clients  {managed:8.0f} runs/s")
        print(f"                                  {managed / yardstick:8.2f}x (goal 0.5x)")
        path = root / "started"
        os.mkfifo(path)
        fifo = os.open(path, os.O_RDWR)
        environment = {"BENCH_FIFO": str(path)}
        with manager(root, environment, None) as port:
            client = Client(port)
            full = {**os.environ, **environment}
            bares, manageds = [], []
            for _ in range(options.samples):  # interleaved, so that both see the same machine
                bares.append(bare_latency(program, fifo, full))
                manageds.append(managed_latency(client, fifo))
        os.close(fifo)
        bare_us, managed_us = statistics.median(bares), statistics.median(manageds)
        print(f"bare spawn to first instruction   {bare_us:8.0f} us (median)")
        print(f"POST to first instruction         {managed_us:8.0f} us (median)")
        print(f"                                  {managed_us / bare_us:8.2f}x (goal 1.6x)")


if __name__ == "__main__":
    main()
