"""What the integration tests share: the daemon as a process, a GenVM root, a test host.

Everything here blocks, and every wait has a limit. Processes are known by a marker in their
environment, which executors and what they start inherit, so what is left behind is found and
killed by its pid.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import operator
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import genvm_manager
from genvm_manager import (
    HostOutcome,
    HostSession,
    HostState,
    decode_calldata,
    deployment_writes,
    own_command,
)

PROJECT = Path(genvm_manager.__file__).resolve().parent
SOURCE = PROJECT / "genvm_manager.py"
VERSION = "v0.1.0"
TIMESTAMP = "2025-06-01T00:00:00Z"
NO_HOST = "unix:///nonexistent/host.sock"
ACCOUNT = bytes(19) + b"\x07"
MARKER = "GENVM_TEST_MARKER"
MEMORY_LIMIT = 150 << 20
WAIT = 120.0
"""Seconds that any wait lasts at most, unless a test is about a shorter time."""

Value = TypeVar("Value")


def eventually(
    predicate: Callable[[], Value], timeout: float = WAIT, what: str = "condition"
) -> Value:
    """Return what ``predicate`` returns once it is true; fail after ``timeout`` seconds.

    It sleeps in between: for what gives no event to wait for, such as the end of a process
    that is not a child of ours.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"{what}: not within {timeout} s, last value {value!r}")
        time.sleep(0.01)


def report(text: str) -> None:
    """Print a measured figure, for people who run pytest with -s or -rP."""
    print(f"[figure] {text}")


def limit_of(goal: float) -> float:
    """Return how many seconds fail a test about something that should take ``goal`` seconds.

    So many that no slow or busy machine gets there, only something that hangs, or that waits for
    what the test lets nobody have. What holds the reactor up is found by ``watched`` and by
    ``in_other_threads``, which count processor time.
    """
    return max(60.0, 20 * goal)


def timed(what: str, seconds: float, goal: float) -> None:
    """Print how long something took; fail only when it took many times its goal."""
    report(f"{what}: {seconds * 1000:.1f} ms (goal {goal * 1000:g} ms)")
    assert seconds < limit_of(goal), f"{what}: {seconds:.1f} s, goal {goal:g} s"


def within(goal: float, predicate: Callable[[], Value], what: str) -> Value:
    """Wait as ``eventually`` does for what should take ``goal`` seconds; print how long it took."""
    begin = time.monotonic()
    value = eventually(predicate, limit_of(goal), what)
    timed(what, time.monotonic() - begin, goal)
    return value


def free_port() -> int:
    """Return a port that nobody listens on, and that nobody gets who asks for any (port 0)."""
    while True:
        with contextlib.suppress(OSError):
            socket.create_server(("127.0.0.1", port := random.randrange(10_000, 32_000))).close()
            return port


# --- processes ---

PARENT = """
import subprocess, sys
child = subprocess.Popen(sys.argv[1:])
print(child.pid, file=sys.stderr, flush=True)
child.wait()
"""
"""A program that starts another one and waits for its end."""


def processes_with(marker: str) -> list[int]:
    """Return the pids of live processes whose environment has the marker."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if marker.encode() in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                    found.append(int(name))
    return [pid for pid in found if alive(pid)]


def state_of(pid: int) -> str:
    """Return the letter of a process's state, such as T (stopped) or Z; X if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def alive(pid: int) -> bool:
    """Tell whether a process exists and is more than a zombie."""
    return state_of(pid) not in ("Z", "X")


def children_of(pid: int) -> list[int]:
    """Return the pids of the children of a process, zombies included."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in path.read_text().split()]
    return found


def command_of(pid: int) -> str:
    """Return the command line of a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def sockets_of(pid: int) -> int:
    """Return how many sockets a process has open."""
    found = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:")
    return found


def memory_of(pid: int, name: str = "VmHWM") -> int:
    """Return a figure of ``/proc/<pid>/status`` in bytes: VmHWM (the peak) or VmRSS."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {name} of process {pid}")


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def with_constants(command: Iterable[str], constants: Mapping[str, object]) -> list[str]:
    """Return a command of ``own_command`` with other constants of the file, such as time limits.

    They are shorter where a test would only wait, and longer where a busy machine is not to matter.
    """
    for name in constants:
        operator.attrgetter(name)(genvm_manager)  # it must exist
    words = [*command]
    at = words.index("-c") + 1
    before, begin, after = words[at].partition("from genvm_manager import")
    assert begin, words
    changes = "".join(f"genvm_manager.{name} = {value}; " for name, value in constants.items())
    words[at] = f"{before}import genvm_manager; {changes}{begin}{after}"
    return words


# --- a GenVM root ---


class Root:
    """A GenVM root in a folder with a short name, since socket paths are limited."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gm-", ignore_cleanup_errors=True)
        self.path = Path(self._folder.name)
        (self.path / "data").mkdir()
        (self.path / "config").mkdir()
        self.write_manifest({VERSION: "2025-01-01T00:00:00Z"})

    def close(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()

    @property
    def manifest(self) -> Path:
        """Where the manifest is."""
        return self.path / "data" / "manifest.yaml"

    def write_manifest(self, versions: Mapping[str, str]) -> None:
        """Write a manifest with these versions and the times from which they are available."""
        lines = [f'  {key}: {{available_after: "{time_}"}}\n' for key, time_ in versions.items()]
        self.manifest.write_text("executor_versions:\n" + "".join(lines))

    def practice(self, version: str = VERSION) -> Path:
        """Install the practice executor as a version."""
        return genvm_manager.install_practice_executor(self.path, version)

    def add_shell(self) -> None:
        """Add a version of major 1 whose executor is the shell: it runs host_data."""
        self.script('eval "$data"', SHELL_VERSION)
        start = "2025-01-01T00:00:00Z"
        self.write_manifest({VERSION: start, SHELL_VERSION: start})

    def script(self, text: str, version: str = VERSION) -> Path:
        """Install a shell script as an executor; it has ``$id``, ``$sync`` and ``$data``."""
        prologue = (
            "#!/bin/sh\nid=\nsync=\ndata=\nlast=\n"
            'for word; do case "$word" in\n'
            "--cookie=*) id=${word#--cookie=} ;;\n--sync) sync=yes ;;\nesac\n"
            '[ "$last" = --host-data ] && data=$word; last=$word; done\n'
        )
        path = self.path / "executor" / version / "bin" / "genvm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(prologue + text)
        path.chmod(0o755)
        return path


SHELL_VERSION = "v1.0.0"
#: What executors demand of ``host_data``.
NODE = {"node_address": "0xaa", "tx_id": "0xbb"}


def shell(command: str, **changes: Any) -> dict[str, Any]:
    """Return the changes to a run that make it a run of a shell command; needs ``add_shell``."""
    return {"major": 1, "host_data": command, **changes}


def message(*, is_init: bool = False) -> dict[str, Any]:
    """Return the ``message`` of a run."""
    account = base64.b64encode(ACCOUNT).decode()
    addresses = {f"{who}_address": account for who in ("contract", "sender", "origin")}
    return {**addresses, "chain_id": "1", "value": None, "is_init": is_init}


def run_body(*steps: str, **changes: Any) -> dict[str, Any]:
    """Return the body of ``POST /genvm/run``; the practice executor runs the steps first."""
    body: dict[str, Any] = {
        "major": 0,
        "message": message(),
        "is_sync": True,
        "capture_output": True,
        "max_execution_minutes": 30,
        "host_data": json.dumps({**NODE, "practice": "\n".join(steps)}),
        "timestamp": TIMESTAMP,
        "host": NO_HOST,
        "extra_args": [],
    }
    return {**body, **changes}


# --- HTTP ---


class Reply(NamedTuple):
    """An HTTP response; ``json`` is its parsed body."""

    status: int
    headers: Mapping[str, str]
    json: Any
    raw: bytes


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Pending:
    """A request that was sent and whose response may come later."""

    def __init__(
        self,
        address: str,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = WAIT,
    ) -> None:
        if address.startswith("unix://"):
            socket_path = address.removeprefix("unix://")
            self._connection: http.client.HTTPConnection = _UnixConnection(socket_path, timeout)
        else:
            self._connection = http.client.HTTPConnection(address, timeout=timeout)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        self._connection.request(method, path, body=data, headers=dict(headers or {}))

    def reply(self) -> Reply:
        """Wait for the response and close the connection."""
        try:
            response = self._connection.getresponse()
            raw = response.read()
        finally:
            self._connection.close()
        kind = response.headers.get("Content-Type")
        assert kind == "application/json; charset=utf-8", f"{response.status} {kind}: {raw[:500]!r}"
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, headers, json.loads(raw), raw)

    def close(self) -> None:
        """Disconnect without waiting for a response."""
        self._connection.close()


def received(peer: socket.socket, most: int = 1 << 30) -> bytes:
    """Return what comes until the other side closes, or until there is enough."""
    found = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while len(found) < most and (data := peer.recv(65536)):
            found += data
    return bytes(found)


# --- the daemon ---


class Daemon:
    """The manager as a process; its log lines are collected by a thread."""

    def __init__(
        self,
        argv: Iterable[str],
        *,
        environ: Mapping[str, str] | None = None,
        cwd: Path = PROJECT,
        read_log: bool = True,
        pass_fds: Iterable[int] = (),
    ) -> None:
        self.marker = f"{MARKER}={uuid.uuid4()}"
        self.records: list[dict[str, Any]] = []
        self.text = ""
        self._changed = threading.Condition()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the daemon
        clean = {key: text for key, text in os.environ.items() if not key.startswith("GENVM")}
        self.process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**clean, **dict((self.marker.split("=", 1),)), **(environ or {})},
            cwd=cwd,
            pass_fds=tuple(pass_fds),
        )
        self._ended = self._log_ended = False
        self._read_log = read_log
        self._reader = threading.Thread(target=self._collect, daemon=True)
        self._reader.start()
        self.address = ""

    @classmethod
    def serve(
        cls,
        root: Root,
        *flags: str,
        command: str = "serve",
        listen: Iterable[str] = ("--port", "0"),
        environ: Mapping[str, str] | None = None,
        read_log: bool = True,
        constants: Mapping[str, object] | None = None,
    ) -> Self:
        """Start ``genvm_manager.py serve`` for a root and wait until it listens.

        It starts as ``genvm-manager`` does. Run as a script, Python would compile the whole file
        before that: 0.3 s of processor time for each of hundreds of daemons.
        """
        argv = own_command(command, "--root", str(root.path), *listen, *flags)
        if constants:
            argv = with_constants(argv, constants)
        daemon = cls(argv, environ=environ, read_log=read_log)
        daemon.wait_until_listening()
        return daemon

    @classmethod
    def twistd(cls, root: Root, **settings: str) -> Self:
        """Start ``twistd -ny twistd.tac`` for a root; does not wait until it listens."""
        settings = {"ROOT": str(root.path), "PORT": "0", **settings}
        environ = {f"GENVM_MANAGER_{name}": text for name, text in settings.items() if text}
        program = Path(sys.executable).with_name("twistd")
        return cls(
            [str(program), f"--pidfile={root.path}/twistd.pid", "-ny", "twistd.tac"],
            environ=environ,
        )

    @property
    def pid(self) -> int:
        """The process id of the manager."""
        return self.process.pid

    @property
    def errors(self) -> str:
        """What the daemon wrote to stderr."""
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace")

    # Log.

    def _collect(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.text += line.decode(errors="replace")
                with contextlib.suppress(ValueError):
                    self.records.append(json.loads(line))
                self._changed.notify_all()
                if not self._read_log and self.records[-1].get("message") == "listening":
                    return
        with self._changed:
            self._log_ended = True
            self._changed.notify_all()

    def wait_log(
        self, predicate: Callable[[dict[str, Any]], bool], timeout: float = WAIT
    ) -> dict[str, Any]:
        """Return the first log record, past or future, for which ``predicate`` holds."""

        def find() -> dict[str, Any] | None:
            return next((record for record in self.records if predicate(record)), None)

        with self._changed:
            self._changed.wait_for(lambda: self._log_ended or find() is not None, timeout)
            found = find()
        assert found is not None, f"no such log record in:\n{self.text}\n{self.errors}"
        return found

    def wait_until_listening(self) -> None:
        """Wait for the log line that tells the address."""
        try:
            record = self.wait_log(lambda record: record["message"] == "listening")
        except BaseException:
            self.close()
            raise
        self.address = record["address"]

    # HTTP.

    def send(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = WAIT,
    ) -> Pending:
        """Send a request without waiting for its response."""
        return Pending(self.address, method, path, body, headers, timeout)

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = WAIT,
    ) -> Reply:
        """Make a request on a connection of its own; the answer must be JSON."""
        return self.send(method, path, body, headers, timeout).reply()

    def get(self, path: str) -> Any:
        """Return the body of a GET that must succeed."""
        reply = self.request("GET", path, timeout=150)
        assert reply.status == 200, reply.raw[:1000]
        return reply.json

    def post(self, path: str, body: object = None) -> Any:
        """Return the body of a POST that must succeed."""
        reply = self.request("POST", path, body)
        assert reply.status == 200, reply.raw[:1000]
        return reply.json

    def connect(self, timeout: float = WAIT) -> socket.socket:
        """Return a bare connection, for what no HTTP client does."""
        host, _, port = self.address.rpartition(":")
        return socket.create_connection((host, int(port)), timeout)

    # Executions.

    def run(self, *steps: str, **changes: Any) -> int:
        """Start an execution that must start, and return its id."""
        answer = self.post("/genvm/run", run_body(*steps, **changes))
        assert answer == {"result": "started", "id": answer["id"]}
        return int(answer["id"])

    def result(self, genvm_id: int) -> dict[str, Any]:
        """Return the result of an execution, waiting for its end."""
        for _ in range(4):  # for nearly as long as a test may take
            answer = self.get(f"/genvm/{genvm_id}?wait=110s")
            assert answer["genvm_id"] == genvm_id
            if answer["status"] is not None:
                return dict(answer["status"])
        raise AssertionError("the execution goes on")

    def ended(self, genvm_id: int) -> bool:
        """Tell whether an execution has ended, waiting for that for a moment."""
        return self.get(f"/genvm/{genvm_id}?wait=1s")["status"] is not None

    def permits(self) -> dict[str, int]:
        """Return the answer of ``GET /permits``."""
        return dict(self.get("/permits"))

    def idle(self) -> bool:
        """Tell whether no permit is in use and nobody waits."""
        permits = self.permits()
        return permits["in_use"] == 0 and permits["waiting"] == 0

    def waiting(self, count: int) -> None:
        """Wait until this many runs wait for permits."""
        eventually(lambda: self.permits()["waiting"] == count, what=f"{count} runs wait")

    # Processes.

    def descendants(self) -> list[int]:
        """Return the pids of live executors and of what they started."""
        return [pid for pid in processes_with(self.marker) if pid != self.pid]

    def guardian(self) -> int:
        """Return the pid of the guardian process."""

        def find() -> int | None:
            pids = [pid for pid in children_of(self.pid) if alive(pid)]
            return next((pid for pid in pids if "guard_descendants" in command_of(pid)), None)

        return eventually(find, what="a guardian") or 0

    def peak_memory(self) -> int:
        """Return the largest resident size that the manager ever had."""
        return memory_of(self.pid)

    # End.

    def signal(self, number: int) -> None:
        """Send a signal to the manager."""
        self.process.send_signal(number)

    def wait(self, timeout: float = WAIT) -> int:
        """Wait for the end of the manager, and of its log; returns the exit status."""
        status = self.process.wait(timeout)
        if self._read_log:
            self._reader.join(timeout)
        return status

    def stop(self) -> int:
        """End the manager with SIGTERM; returns the exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def close(self) -> None:
        """Make sure that nothing of the daemon is left."""
        if self._ended:
            return
        self._ended = True
        guardians = [pid for pid in children_of(self.pid) if "guard_desc" in command_of(pid)]
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pid in (*guardians, *processes_with(self.marker)):
            kill(pid)
        if self._read_log:
            self._reader.join(WAIT)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._stderr.close()


# --- who does the work meanwhile ---


def processor_seconds(process: object) -> float:
    """Return how much processor time a process or thread of ``/proc`` has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu_of(pid: int) -> float:
    """Return the same of a process with all of its threads, to the nanosecond."""
    return time.clock_gettime(clock_of(pid))


def clock_of(pid: int) -> int:
    """Return the clock of the processor time of a process, as clock_getcpuclockid(3) makes it."""
    return ~pid << 3 | 2


def starved_seconds(process: object) -> float:
    """Return for how long a process of ``/proc`` was ready to run and had no core, if known."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def watched(
    daemon: Daemon, what: str, action: Callable[[], Any] = lambda: None, least: int = 1
) -> Any:
    """Return what an action returns, for which the reactor must not be held up.

    Meanwhile, and at least so often, ``GET /status`` is asked. Half of the answers may cost the
    daemon ``HELD_SECONDS`` of processor time at most, whatever else it does: a busy machine does
    not change that. In real time, that a core of a busy machine is waited for left out, they only
    must not hang.
    """
    connection = http.client.HTTPConnection(daemon.address, timeout=2 * WAIT)
    waits: list[float] = []
    costs: list[float] = []
    with ThreadPoolExecutor(1) as pool, contextlib.closing(connection):
        future = pool.submit(action)
        while not future.done() or len(waits) < least:
            starved = starved_seconds(daemon.pid) + starved_seconds("thread-self")
            begin, used = time.perf_counter(), cpu_of(daemon.pid)
            connection.request("GET", "/status")
            connection.getresponse().read()
            costs.append(cpu_of(daemon.pid) - used)
            starved = starved_seconds(daemon.pid) + starved_seconds("thread-self") - starved
            waits.append(time.perf_counter() - begin - starved)
        value = future.result()
    waits.sort()
    cost = statistics.median(costs)
    report(
        f"{what}: /status p99 {percentile(waits, 99) * 1000:.1f} ms, max {waits[-1] * 1000:.1f} ms,"
        f" {cost * 1000:.1f} ms of a processor, n {len(waits)}"
    )
    assert cost < HELD_SECONDS, "the reactor was held"
    assert percentile(waits, 99) < limit_of(HELD_SECONDS), "the reactor was held"
    return value


HELD_SECONDS = 0.5


def percentile(figures: Sequence[float], percent: int) -> float:
    """Return the figure below which so many percent of sorted ones are."""
    return figures[len(figures) * percent // 100]


def in_other_threads(daemon: Daemon, what: str, action: Callable[[], Any]) -> Any:
    """Return what an action returns, which must not be the work of the reactor's thread.

    That one may use half of the processor time at most; a busy machine does not change its part.
    """
    both = (f"{daemon.pid}", f"{daemon.pid}/task/{daemon.pid}")
    before = [processor_seconds(one) for one in both]
    value = action()
    whole, reactors = (
        processor_seconds(one) - used for one, used in zip(both, before, strict=True)
    )
    report(f"{what}: {reactors:.2f} of {whole:.2f} s of a processor in the reactor's thread")
    assert reactors <= whole / 2, "the reactor was held"
    return value


# --- a host ---


class Host:
    """A host in threads: serves contract state to every executor that connects to it."""

    def __init__(self, address: str | Path, code: str) -> None:
        """Listen on a unix socket (a path) or on TCP (a host); ``code`` is the contract."""
        self.state = HostState(ACCOUNT, b"", writable=True)
        self.state.deploy(deployment_writes(code.encode()))
        self.outcomes: list[HostOutcome] = []
        self._lock = threading.Condition()
        if isinstance(address, Path):
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(address))
            self.uri = f"unix://{address}"
        else:
            self._listener = socket.create_server((address, 0))
            self.uri = "{}:{}".format(*self._listener.getsockname()[:2])
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def calls(self, value: Any) -> None:
        """Let the next run get this calldata."""
        self.state.calldata = genvm_manager.encode_calldata(value)

    def outcome(self, index: int = 0, timeout: float = WAIT) -> tuple[str, Any]:
        """Return the kind and the decoded data (text for a VM error) of a run."""
        with self._lock:
            assert self._lock.wait_for(lambda: len(self.outcomes) > index, timeout), "no outcome"
            outcome = self.outcomes[index]
        is_text = outcome.kind == "vm_error"
        return outcome.kind, outcome.data.decode() if is_text else decode_calldata(outcome.data)

    def close(self) -> None:
        """Stop listening."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            peer.settimeout(WAIT)
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        session = HostSession(self.state)
        with peer, contextlib.suppress(OSError):
            while data := peer.recv(65536):
                session.feed(data)
                while (answer := session.step()) is not None:
                    peer.sendall(answer)
                if session.outcome is not None:
                    break
        if session.outcome is not None:
            with self._lock:
                self.outcomes.append(session.outcome)
                self._lock.notify_all()


@contextlib.contextmanager
def serving(host: Host) -> Iterator[Host]:
    """Close a host at the end."""
    try:
        yield host
    finally:
        host.close()
