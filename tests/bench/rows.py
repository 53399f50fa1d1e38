"""The rows: what is measured, beside which yardstick, and the goals."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import msgspec

from ..integration.executor_client import HELLO
from ..integration.executor_client import Client as ModuleClient
from ..integration.support import (
    SOURCE,
    Daemon,
    children_of,
    command_of,
    cpu_of,
    eventually,
    memory_of,
)
from .stage import (
    CLIENTS,
    IMPORTS,
    Client,
    Conversation,
    Stage,
    converse,
    cost_of,
    cpu_with_children,
    first_client,
    hold,
    monotonic_ns,
    request,
    result_request,
    run_request,
)
from .yardsticks import chat

MIB = 1 << 20
CONTRACT = b"# v0.1.0\n" + b"print('a contract of some length')\n" * 300
#: As the tiny executor writes it.
LOG_LINE = (
    b'{"level":"info","message":"storage read","target":"genvm::host",'
    b'"slot":"AAAAAAAAAAAAAAAAAAAAAAAAAAE=","bytes":32}\n'
)
STATUS = request("GET", "/status")


@attrs.frozen
class Figure:
    """One figure: samples of ours, taken in turns with those of the yardstick.

    ``goal`` is for the ratio of the medians if there is a yardstick, else for ours; more is better
    with ``more``.
    """

    what: str
    unit: str
    ours: list[float]
    yardstick: str = ""
    theirs: list[float] = attrs.field(factory=list)
    goal: float | None = None
    more: bool = False
    absolute: bool = False
    rank: float = 0.5

    @staticmethod
    def _at(samples: list[float], rank: float) -> float:
        if rank == 0.5:
            return statistics.median(samples)
        return sorted(samples)[min(len(samples) - 1, int(len(samples) * rank))]

    @property
    def value(self) -> float:
        """What we take, or do."""
        return self._at(self.ours, self.rank)

    @property
    def standard(self) -> float | None:
        """What the yardstick takes, or does."""
        return self._at(self.theirs, self.rank) if self.theirs else None

    @property
    def ratio(self) -> float | None:
        """Ours by the yardstick's."""
        return self.value / self.standard if self.standard else None

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is met, if there is one."""
        found = self.value if self.absolute or self.ratio is None else self.ratio
        if self.goal is None:
            return None
        return found >= self.goal if self.more else found <= self.goal


Row = Callable[[Stage], Iterator[Figure]]
ROWS: dict[str, Row] = {}


def row(measure: Row) -> Row:
    """Make a function a row of the table."""
    ROWS[measure.__name__] = measure
    return measure


def one_run(**changes: object) -> Conversation:
    """Start an execution and wait for its result."""
    result = yield result_request((yield run_request(**changes)))
    assert json.loads(result)["status"]["exit_code"] == 0, result


def one_get(asked: bytes) -> Conversation:
    """Make one request."""
    yield asked


@row
def runs(stage: Stage) -> Iterator[Figure]:
    """Full runs: POST, exit, GET of the result."""
    daemon = stage.manager()
    rates: list[float] = []
    costs: list[float] = []
    bare_rates: list[float] = []
    bare_costs: list[float] = []
    for _ in range(stage.times(9, 2)):
        begin, used, count = time.perf_counter(), cpu_with_children(), 0
        while time.perf_counter() - begin < stage.seconds():
            stage.bare_run()
            count += 1
        bare_rates.append(count / (time.perf_counter() - begin))
        bare_costs.append((cpu_with_children() - used) / count * 1000)
        begin, used = time.perf_counter(), cpu_of(daemon.pid)
        rate = converse(daemon.address, CLIENTS, 2 * stage.seconds(), one_run)
        spent = time.perf_counter() - begin
        rates.append(rate)
        costs.append((cpu_of(daemon.pid) - used) / (rate * spent) * 1000)
    bare = "bare posix_spawn and waitpid"
    yield Figure(
        f"CPU a full run, {CLIENTS} clients", "ms", costs, f"{bare}, whole", bare_costs, 2.0
    )
    yield Figure(
        f"full runs, {CLIENTS} clients", "a second", rates, bare, bare_rates, 0.55, more=True
    )


@row
def first(stage: Stage) -> Iterator[Figure]:
    """From the POST to the executor's first instruction."""
    daemon = stage.manager()
    client = Client(daemon.address)
    ours, bare = [], []
    for _ in range(stage.times(500, 30)):
        start = monotonic_ns()
        stage.bare_run("first")
        bare.append((stage.moment() - start) / 1e6)
        start = monotonic_ns()
        client.run("first")
        ours.append((stage.moment() - start) / 1e6)
    yield Figure("POST to first instruction", "ms", ours, "bare posix_spawn to it", bare, 1.35)


@row
def ends(stage: Stage) -> Iterator[Figure]:
    """From an exit to the result, for a GET that waits, beside 100 that run."""
    daemon = stage.manager()
    hold(daemon, stage.times(100, 10))
    client = Client(daemon.address)
    ours, bare = [], []
    for _ in range(stage.times(500, 30)):
        stage.bare_run("last")
        bare.append((monotonic_ns() - stage.moment()) / 1e6)
        client.run("last")
        ours.append((monotonic_ns() - stage.moment()) / 1e6)
    what, bare_name = "exit to result, 100 running", "bare waitpid"
    yield Figure(f"{what}: p50", "ms", ours, bare_name, bare, 1.2, absolute=True)
    yield Figure(f"{what}: p99", "ms", ours, bare_name, bare, 10.0, absolute=True, rank=0.99)


def wait_until_reaped(daemon: Daemon, pid: int) -> None:
    """Wait until a manager has seen the end of a child."""
    eventually(lambda: pid not in children_of(daemon.pid), what="reaped")


@row
def exits(stage: Stage) -> Iterator[Figure]:
    """What one exit costs where many run, and where few do."""
    most, batch = stage.times(1000, 50), stage.times(20, 3)
    samples: list[list[float]] = []
    daemons = []
    for count in (most, 10):
        daemons.append(stage.manager())
        hold(daemons[-1], count)
        samples.append([])
    for _ in range(stage.times(15, 2)):
        for daemon, costs in zip(daemons, samples, strict=True):
            victims = hold(daemon, batch)
            time.sleep(0.1)  # what starts them is over
            used = cpu_of(daemon.pid)
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
                wait_until_reaped(daemon, pid)
            time.sleep(0.1)  # what follows from their ends is over
            costs.append((cpu_of(daemon.pid) - used) / len(victims) * 1000)
    many, few = samples
    yield Figure(f"CPU of an exit, {most} running", "ms", many, "the same, 10 running", few, 1.3)


@row
def status(stage: Stage) -> Iterator[Figure]:
    """``GET /status``, beside a bare resource of Twisted's with as large a body."""
    many, kept = stage.times(300, 20), stage.times(1000, 40)
    quiet, running, retaining = (stage.manager() for _ in range(3))
    hold(running, many)
    converse(retaining.address, CLIENTS, 0.1, one_run)
    client = Client(retaining.address)
    while json.loads(client.ask(STATUS))["unread"] < kept:
        client.ask(run_request())
    with stage.yardsticks() as (address, pid):
        for daemon, what, goal in (
            (quiet, "nothing", 0.8),
            (running, f"{many} running", 0.5),
            (retaining, f"{kept} retained", 0.5),
        ):
            client = Client(daemon.address)
            plain = request("GET", f"/{len(client.ask(STATUS))}")
            client.close()
            rates: dict[int, list[float]] = {daemon.pid: [], pid: []}
            costs: dict[int, list[float]] = {daemon.pid: [], pid: []}
            for _ in range(stage.times(7, 2)):
                for place, process, asked in (
                    (daemon.address, daemon.pid, STATUS),
                    (address, pid, plain),
                ):
                    begin, used = time.perf_counter(), cpu_of(process)
                    rate = converse(place, 4, stage.seconds(), functools.partial(one_get, asked))
                    count = rate * (time.perf_counter() - begin)
                    rates[process].append(rate)
                    costs[process].append((cpu_of(process) - used) / count * 1000)
            bare = "bare twisted.web"
            name = f"/status, {what}"
            yield Figure(name, "a second", rates[daemon.pid], bare, rates[pid], goal, more=True)
            yield Figure(f"{name}: CPU", "ms", costs[daemon.pid], bare, costs[pid])


@row
def start(stage: Stage) -> Iterator[Figure]:
    """From the start of the process to the first answer of ``/status``."""
    installed, file = Path(sys.executable).with_name("genvm-manager"), (sys.executable, str(SOURCE))
    cpu: dict[tuple[str, ...], list[float]] = {(str(installed),): [], file: []}
    walls, imports, import_walls = [], [], []
    for _ in range(stage.times(9, 1)):
        begin = time.perf_counter()
        imports.append(cost_of(IMPORTS))
        import_walls.append(time.perf_counter() - begin)
        for command, ours in cpu.items():
            begin = time.perf_counter()
            daemon = stage.start(None, *command)
            client = first_client(daemon)
            ours.append(cpu_of(daemon.pid))
            walls.append(time.perf_counter() - begin)
            client.close()
            daemon.close()
    bare = "import klein, treq"
    ours, from_file = cpu.values()
    yield Figure("start to first /status: CPU", "s", ours, bare, imports, 1.15)
    yield Figure("from the file, compiled each time", "s", from_file, bare, imports)
    yield Figure("start to first /status", "s", walls[::2], bare, import_walls)


def module_config(kind: str, address: str) -> dict[str, object]:
    """Return a configuration with which a module does its work."""
    config: dict[str, object] = {"bind_address": "127.0.0.1:0"}
    if kind == "llm":
        backend = {"host": f"http://{address}", "provider": "openai-compatible", "key": "k"}
        config["backends"] = {"one": {**backend, "models": {"0": {}}}}
    return config


@contextlib.contextmanager
def module(daemon: Daemon, kind: str, address: str) -> Iterator[int]:
    """Give the pid of a module that is ready."""
    client = Client(daemon.address)
    started = {"module_type": kind, "config": module_config(kind, address)}
    client.ask(request("POST", "/module/start", started))
    name = f"module-process {kind}"
    yield next(pid for pid in children_of(daemon.pid) if name in command_of(pid))
    client.ask(request("POST", "/module/stop", {"module_type": kind}))
    client.close()


@row
def modules(stage: Stage) -> Iterator[Figure]:
    """From the start of a module to the moment in which it is ready."""
    daemon = stage.manager()
    with stage.yardsticks() as (address, _):
        for kind in ("llm", "web"):
            ours, walls, imports = [], [], []
            for _ in range(stage.times(7, 1)):
                imports.append(cost_of(IMPORTS))
                begin = time.perf_counter()
                with module(daemon, kind, address) as pid:
                    ours.append(cpu_of(pid))
                    walls.append(time.perf_counter() - begin)
            bare = "import klein, treq"
            yield Figure(f"{kind} module to ready: CPU", "s", ours, bare, imports, 1.3)
            yield Figure(f"{kind} module to ready", "s", walls)


@row
def memory(stage: Stage) -> Iterator[Figure]:
    """Resident memory: what waits for work, and a running execution."""
    told = "; print([x for x in open('/proc/self/status') if x.startswith('VmRSS')][0].split()[1])"
    argv = [*IMPORTS[:-1], IMPORTS[-1] + told]
    idle, bare = [], []
    for _ in range(stage.times(3, 1)):
        bare.append(int(subprocess.check_output(argv)) / 1024)
        daemon = stage.start()
        first_client(daemon).close()
        time.sleep(1.0 if not stage.quick else 0.1)
        idle.append(memory_of(daemon.pid, "VmRSS") / MIB)
    imports = "import klein, treq"
    yield Figure("memory, idle", "MiB", idle, imports, bare, 48, absolute=True)
    with stage.yardsticks() as (address, _):
        for kind in ("llm", "web"):
            with module(daemon, kind, address) as pid:
                time.sleep(1.0 if not stage.quick else 0.1)
                size = memory_of(pid, "VmRSS") / MIB
            yield Figure(f"memory, {kind} module", "MiB", [size], imports, bare, 45, absolute=True)
    daemon = stage.manager()
    count = stage.times(300, 20)
    before = memory_of(daemon.pid, "VmRSS")
    hold(daemon, count)
    each = (memory_of(daemon.pid, "VmRSS") - before) / 1024 / count
    yield Figure("memory of a running execution", "KiB", [each], goal=7, absolute=True)


def read_cats(path: str, count: int) -> None:
    """Read what some ``cat`` write."""
    cat = shutil.which("cat") or "cat"
    processes = [subprocess.Popen([cat, path], stdout=subprocess.PIPE) for _ in range(count)]
    with selectors.DefaultSelector() as selector:
        for process in processes:
            assert process.stdout is not None
            selector.register(process.stdout, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                if not os.read(key.fd, 1 << 16):
                    selector.unregister(key.fileobj)
    for process in processes:
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def timed(action: Callable[[], object], cpu: Callable[[], float]) -> tuple[float, float]:
    """Return the seconds that something takes, and those of a processor."""
    begin, used = time.perf_counter(), cpu()
    action()
    return time.perf_counter() - begin, cpu() - used


def timed_output(daemon: Daemon, clients: list[Client], asked: bytes) -> tuple[float, float]:
    """Return what runs take that write much, without what reading their results takes."""
    started: list[bytes] = []

    def read() -> None:
        for one, client in zip(started, clients, strict=True):
            client.ask(result_request(one))

    def run() -> None:
        started.extend(client.ask(asked) for client in clients)
        read()

    cpu = functools.partial(cpu_of, daemon.pid)
    whole, reading = timed(run, cpu), timed(read, cpu)
    return whole[0] - reading[0], whole[1] - reading[1]


def decode_lines(lines: bytes) -> None:
    """Decode each line."""
    for line in lines.splitlines():
        msgspec.json.decode(line)


@row
def output(stage: Stage) -> Iterator[Figure]:
    """Captured output of four executors at once, and records of a log."""
    daemon = stage.manager()
    clients = [Client(daemon.address) for _ in range(4)]
    mib, records = stage.times(64, 4), stage.times(20_000, 2000)
    path = stage.folder / "written"
    path.write_bytes(b"x" * (mib << 20))
    megabytes = len(clients) * (mib << 20) / 1e6
    ours, bare = [], []
    for _ in range(stage.times(5, 1)):
        read = functools.partial(read_cats, str(path), len(clients))
        bare.append(timed(read, time.process_time))
        ours.append(timed_output(daemon, clients, run_request(f"write={mib}")))
    yield from rates("captured output of 4 executors", "MB", megabytes, ours, bare, 0.6)
    lines = LOG_LINE * records
    ours, bare = [], []
    for _ in range(stage.times(9, 1)):
        bare.append(
            timed(lambda: [*map(msgspec.json.decode, lines.splitlines())], time.process_time)
        )
        ours.append(timed_output(daemon, clients[:1], run_request(f"log={records}")))
    yield from rates("log records", "records", records, ours, bare, 0.5)


Times = list[tuple[float, float]]


def rates(
    what: str, unit: str, count: float, ours: Times, bare: Times, goal: float
) -> Iterator[Figure]:
    """Give figures of something of which much is done: how much a second, and what it costs."""
    name = "cat into a bare reader" if unit == "MB" else "split and decoded by msgspec"
    fast = [[count / seconds for seconds, _ in one] for one in (ours, bare)]
    dear = [[used / count * 1e6 for _, used in one] for one in (ours, bare)]
    yield Figure(what, f"{unit}/s", fast[0], name, fast[1], goal, more=True)
    yield Figure(f"{what}: CPU", f"us/{unit}", dear[0], name, dear[1])


@row
def checks(stage: Stage) -> Iterator[Figure]:
    """An availability check of many models that take a second, beside one."""
    daemon = stage.manager()
    client = Client(daemon.address)
    seconds, many = ("0.1", 5) if stage.quick else ("1.0", 20)
    with stage.yardsticks() as (address, _):
        config = {
            "host": f"http://{address}",
            "provider": "openai-compatible",
            "key": "k",
            "model": seconds,
        }

        def check(count: int) -> float:
            prompts = [{"user_message": "Say OK.", "max_tokens": 9, "temperature": 0.0}]
            body = {"configs": [config] * count, "test_prompts": prompts}
            begin = time.perf_counter()
            found = json.loads(client.ask(request("POST", "/llm/check", body)))
            assert all(one["available"] for one in found), found
            return time.perf_counter() - begin

        check(1)
        one, all_ = [], []
        for _ in range(stage.times(5, 1)):
            one.append(check(1))
            all_.append(check(many))
    yield Figure(f"{many} LLM checks of {seconds} s", "s", all_, "one check", one, 1.2)


@row
def llm(stage: Stage) -> Iterator[Figure]:
    """A prompt through the LLM module, beside the same exchange with treq alone."""
    daemon = stage.manager()
    with stage.yardsticks() as (provider, _), stage.yardsticks() as (asker, pid):
        body = request("POST", "/v1/chat/completions", chat("0"))
        exchange = request("GET", f"/exchange?http://{provider}/v1/chat/completions")
        raw, theirs = Client(provider), Client(asker)
        with module(daemon, "llm", provider) as module_pid:
            place = json.loads(daemon.request("GET", "/status").raw)["modules"]["llm"]["address"]
            host, _, port = place.rpartition(":")
            client = ModuleClient((host, int(port)))
            client.send(HELLO)
            ours, bare = [], []
            costs: list[float] = []
            bare_costs: list[float] = []
            for count in range(stage.times(400, 30)):
                begin = time.perf_counter()
                raw.ask(body)
                least = time.perf_counter() - begin
                used = cpu_of(pid)
                bare.append((float(theirs.ask(exchange)) - least) * 1000)
                bare_costs.append((cpu_of(pid) - used) * 1000)
                begin, used = time.perf_counter(), cpu_of(module_pid)
                # Executors are not Python: what this client takes is neither's.
                least += -time.thread_time()
                answer = client.prompt(f"Say OK {count}.")
                least += time.thread_time()
                ours.append((time.perf_counter() - begin - least) * 1000)
                costs.append((cpu_of(module_pid) - used) * 1000)
                assert "Ok" in answer, answer
            client.close()
    bare_name = "treq alone"
    yield Figure("LLM module beside the provider", "ms", ours, bare_name, bare, 1.5)
    yield Figure("LLM module: CPU a request", "ms", costs, bare_name, bare_costs)


@row
def detect(stage: Stage) -> Iterator[Figure]:
    """The version that a contract of 10 kB asks for: read from it, or asked of an executor."""
    asked = b"POST /contract/detect-version HTTP/1.1\r\nHost: localhost\r\n"
    asked += b"Deployment-Timestamp: 2025-06-01T00:00:00Z\r\n"
    asked += b"Content-Length: %d\r\n\r\n" % len(CONTRACT) + CONTRACT
    native = Client(stage.manager(GENVM_MANAGER_VERSION_DETECTION="native").address)
    other = Client(stage.manager(GENVM_MANAGER_VERSION_DETECTION="executor").address)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(stage.times(200, 20)):
        for client, samples in ((other, theirs), (native, ours)):
            begin = time.perf_counter()
            assert json.loads(client.ask(asked)) == {"specified_major": 0}
            samples.append((time.perf_counter() - begin) * 1000)
    name = "asking an executor that does nothing"
    yield Figure("version of a contract, native", "ms", ours, name, theirs)
