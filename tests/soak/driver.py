"""The soak itself: clients, an operator, and what is checked when all is quiet.

Every client and the operator draw what they do from a random source of their own, seeded by the
seed and their number: the same seed does the same things in the same order, though not at the
same moments.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import signal
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import attrs

from ..integration.support import Root, free_port
from . import plans
from .backends import MODEL, Backends
from .client import LIMIT, Problem, Reply, request
from .manager import Manager
from .plans import Plan

MIB = 1 << 20
PERMITS = 8
SLACK = 5.0
"""Seconds that a busy machine may take for what should happen at once."""
SETTLE = 60.0
"""Seconds within which all must be quiet when nobody asks for anything any more."""
THREADS_MAX = 80


@attrs.frozen
class Options:
    """What the command line says."""

    seed: int = 1
    seconds: float = 60.0
    clients: int = 8
    phase: float = 30.0
    """Seconds between two checkpoints."""
    retention: float = 8.0
    memory_mib: int = 30
    """By how much the manager may have grown when all is quiet again."""


@attrs.define
class Model:
    """What is known of the manager from what was asked of it."""

    ends: dict[int, tuple[Plan, tuple[Any, Any, Any]]] = attrs.field(factory=dict)
    """The plan and the end of each run, as read, since the last checkpoint."""
    ids: set[int] = attrs.field(factory=set)
    anonymous: int = 0
    """Runs whose ids nobody was told: their clients left, or they were read-only."""
    drained_until: float = -math.inf
    """When runs were refused last: infinity while they are."""
    modules: dict[str, str | None] = attrs.field(
        factory=lambda: {"llm": "stopped", "web": "stopped"}
    )
    """The state of each module; None while it changes."""
    changes: int = 0
    """How often modules changed."""
    pauses: list[tuple[float, float]] = attrs.field(factory=list)
    causes: Counter[str] = attrs.field(factory=Counter)
    kinds: Counter[str] = attrs.field(factory=Counter)
    late_ends: int = 0
    """Runs that were asked to end, and ended by themselves at that moment."""


class Soak:
    """One soak of one manager."""

    def __init__(
        self, options: Options, client: dict[Act, float], operator: dict[Act, float]
    ) -> None:
        """Prepare; ``client`` and ``operator`` say who does what how often."""
        self.options = options
        self._client = client
        self._operator = operator
        self.model = Model()
        self.problems: list[str] = []
        self.trail: deque[str] = deque(maxlen=60)
        self.steps = 0
        self.latencies: Path
        self.memory: dict[str, int] = {}
        self.memory_after: list[int] = []
        self.end_seconds = 0.0
        self.requests = 0
        self.backends: Backends
        self._begin = time.monotonic()
        self.manager: Manager
        self.root: Root
        self._quiet: Counter[str] | None = None
        self.addresses = {kind: f"127.0.0.1:{free_port()}" for kind in ("llm", "web")}

    # --- notes ---

    def _now(self) -> float:
        return time.monotonic() - self._begin

    def _note(self, who: str, what: str) -> None:
        self.trail.append(f"{self._now():8.2f} {who}: {what}")

    def _problem(self, step: str, what: str) -> None:
        text = f"{self._now():.2f} s, {step}: {what}"
        self.trail.append(f"PROBLEM {text}")
        self.problems.append(text)
        print(f"PROBLEM {text}", flush=True)

    async def ask(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> Reply:
        """Make a request of the manager."""
        self.requests += 1
        return await request(self.manager.address, method, path, body, headers)

    async def must(self, method: str, path: str, body: object = None) -> Any:
        """Make a request that must succeed."""
        reply = await self.ask(method, path, body)
        if reply.status != 200:
            raise Problem(f"{method} {path}: {reply.status} {reply.json}")
        return reply.json

    # --- the whole ---

    async def run(self, folder: Path) -> None:
        """Soak; what is wrong is in ``problems`` afterwards."""
        self.root = Root()
        self.root.practice()
        self.root.add_shell()
        self.manifest = self.root.manifest.read_text()
        self.manager = Manager(self.root, folder, self.options.retention, self.addresses)
        self.backends = Backends(folder)
        try:
            await self._warm_up()
            async with self._measuring(folder):
                end = time.monotonic() + self.options.seconds
                number = 0
                while (left := end - time.monotonic()) > 0:
                    number += 1
                    await self._phase(number, min(left, self.options.phase))
                    await self._checkpoint(f"checkpoint {number}")
            self.memory["peak"] = self.manager.memory("VmHWM")
            await self._end()
        finally:
            self.manager.close()
            self.backends.close()
            self.root.close()

    async def _warm_up(self) -> None:
        """Use everything once, so that what stays for good is there when memory is compared."""
        self.memory["fresh"] = self.manager.memory()
        rng = random.Random(self.options.seed)
        for maker in plans.ENDING:
            plan = maker(rng, f"w.{maker.__name__}")
            try:
                await self.until_its_end(plan, await self._must_start(plan))
            except Problem as problem:
                self._problem("warm-up", str(problem))
        config = {"host": self.backends.live, "provider": "ollama", "model": MODEL, "key": "none"}
        check = {"configs": [config], "test_prompts": [{"user_message": "Say OK"}]}
        await self.must("POST", "/llm/check", check)  # loads the code of TLS
        await self._checkpoint("warm-up", first=True)
        self.memory["before"] = self.manager.memory()

    @contextlib.asynccontextmanager
    async def _measuring(self, folder: Path) -> AsyncIterator[None]:
        self.latencies = folder / "latencies"
        host, _, port = self.manager.address.rpartition(":")
        with self.latencies.open("wb") as file:
            words = ("-m", "tests.soak.latency", host, port)
            process = await asyncio.create_subprocess_exec(sys.executable, *words, stdout=file)
        reading = asyncio.create_task(self._follow_log())
        try:
            yield
        finally:
            reading.cancel()
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()

    async def _follow_log(self) -> None:
        while True:
            self.manager.log.read()
            await asyncio.sleep(0.2)

    async def _phase(self, number: int, seconds: float) -> None:
        until = time.monotonic() + seconds
        seed = self.options.seed
        try:
            async with asyncio.timeout(seconds + 3 * LIMIT), asyncio.TaskGroup() as group:
                for client in range(self.options.clients):
                    rng = random.Random(f"{seed}/{number}/{client}")
                    group.create_task(self._act(f"{number}.{client}", rng, self._client, until))
                rng = random.Random(f"{seed}/{number}/operator")
                group.create_task(self._act(f"{number}.op", rng, self._operator, until, 2.0))
        except TimeoutError:
            self._problem(f"phase {number}", "clients hang")

    async def _act(
        self, who: str, rng: random.Random, acts: dict[Act, float], until: float, rest: float = 0.0
    ) -> None:
        step = 0
        while time.monotonic() < until:
            step += 1
            self.steps += 1
            (act,) = rng.choices(list(acts), list(acts.values()))
            name = f"{who}.{step} {act.__name__}"
            own = random.Random(rng.random())
            begin = time.monotonic()
            try:
                await act(self, own, name)
            except Problem as problem:
                self._problem(name, str(problem))
            except Exception:
                self._problem(name, f"the driver failed:\n{traceback.format_exc()}")
            self._note(name, f"{time.monotonic() - begin:.2f} s")
            await asyncio.sleep(own.random() * rest)

    # --- runs ---

    async def start(self, plan: Plan, headers: dict[str, str] | None = None) -> int | None:
        """Start a run and return its id; None if runs are refused at the moment."""
        begin = time.monotonic()
        reply = await self.ask("POST", "/genvm/run", plan.body, headers)
        if reply.code == "draining" and reply.status == 503 and self.model.drained_until >= begin:
            return None
        if reply.status != 200 or reply.json["result"] != "started":
            raise Problem(f"a run of {plan.kind}: {reply.status} {reply.json}")
        return int(reply.json["id"])

    def is_new(self, genvm_id: int) -> int:
        if genvm_id in self.model.ids:
            raise Problem(f"the id {genvm_id} twice")
        self.model.ids.add(genvm_id)
        return genvm_id

    async def _must_start(self, plan: Plan) -> int:
        genvm_id = await self.start(plan)
        if genvm_id is None:
            raise Problem("refused")
        return self.is_new(genvm_id)

    async def result(self, genvm_id: int, wait: str = "?wait=20s") -> dict[str, Any]:
        """Wait for the end of a run and return its result."""
        limit = time.monotonic() + LIMIT
        while time.monotonic() < limit:
            answer = await self.must("GET", f"/genvm/{genvm_id}{wait}")
            if answer["genvm_id"] != genvm_id:
                raise Problem(f"asked for {genvm_id}, got {answer['genvm_id']}")
            if answer["status"] is not None:
                return dict(answer["status"])
            if not wait:
                await asyncio.sleep(0.1)
        raise Problem(f"run {genvm_id} does not end")

    def judge(self, genvm_id: int, plan: Plan, status: dict[str, Any], causes: set[str]) -> None:
        """Compare the end of a run with its plan."""
        cause = status["cause"]
        if genvm_id not in self.model.ends:
            self.model.causes[cause] += 1
            self.model.kinds[plan.kind] += 1
        self.model.ends[genvm_id] = plan, (cause, status["exit_code"], status["signal"])
        by_itself = (status["exit_code"], status["signal"]) == (plan.exit_code, plan.signal)
        self.model.late_ends += cause != "exited" and by_itself and not plan.endless
        problems = plan.problems(status, causes)
        ran = (
            status["finished_at"] / 1000 - datetime.fromisoformat(status["started_at"]).timestamp()
        )
        limit = 60 * plan.body["max_execution_minutes"]
        paused = sum(end - begin for begin, end in self.model.pauses[-20:])
        if cause == "deadline" and not limit - 0.1 <= ran <= limit + 1 + SLACK + paused:
            problems.append(f"deadline of {limit:.2f} s after {ran:.2f} s")
        if problems:
            raise Problem(f"run {genvm_id} ({plan.kind}): " + "; ".join(problems))

    async def until_its_end(
        self, plan: Plan, genvm_id: int, wait: str = "?wait=20s"
    ) -> dict[str, Any]:
        status = await self.result(genvm_id, wait)
        self.judge(genvm_id, plan, status, {"exited"})
        return status

    def has_expired(self, status: dict[str, Any]) -> bool:
        """Tell whether a run may be forgotten by now, as it is where the machine is busy."""
        return bool(time.time() >= status["finished_at"] / 1000 + self.options.retention)

    # --- modules ---

    @contextlib.contextmanager
    def changing(self, kind: str, to: str) -> Iterator[None]:
        """Note that a module changes meanwhile; its state is not known if that fails."""
        self.model.changes += 1
        self.model.modules[kind] = None
        yield
        self.model.modules[kind] = to
        self.model.changes += 1

    async def stop_module(self, kind: str) -> None:
        """Stop a module, whatever its state."""
        with self.changing(kind, "stopped"):
            await self.must("POST", "/module/stop", {"module_type": kind})

    # --- when all is quiet ---

    async def _checkpoint(self, name: str, *, first: bool = False) -> None:
        """Let everything end, and check that nothing is left."""
        self._note(name, "begins")
        try:
            for kind in self.model.modules:
                await self.stop_module(kind)
            self.root.manifest.write_text(self.manifest)
            await self.must("POST", "/permits", {"permits": PERMITS})
            await self.must("POST", "/undrain")
            self.model.drained_until = min(self.model.drained_until, time.monotonic())
            await self._becomes(name, "permits, runs", self._busy)
            await self._becomes(name, "processes", self._strangers)
            await self._becomes(name, "temporary files", self.manager.temporary_files)
            if first:
                self.backends.hang_up()
                await asyncio.sleep(self.options.retention + 2)
                self._quiet = self.manager.descriptors()
                self._check_log(name)
                return
            # Only now: what ended meanwhile may have left connections to use again.
            self.backends.hang_up()
            await self._becomes(name, "descriptors", self._strange_descriptors)
            await self._becomes(name, "threads", self._too_many_threads)
            self._check_log(name)
            await asyncio.sleep(self.options.retention + 2)
            await self._becomes(name, "memory", self._grown)
        except Problem as problem:
            self._problem(name, str(problem))
        finally:
            self.memory["after"] = self.manager.memory()
            self.memory_after.append(self.memory["after"])

    async def _becomes(self, name: str, what: str, wrong: Callable[[], Any]) -> None:
        """Wait until nothing is wrong; note what still is when it has had its time."""
        until = time.monotonic() + SETTLE
        while True:
            found = wrong()
            if asyncio.iscoroutine(found):
                found = await found
            if not found:
                return
            if time.monotonic() >= until:
                self._problem(name, f"{what}: {found!r:.2000}")
                return
            await asyncio.sleep(0.3)

    async def _busy(self) -> Any:
        permits = await self.must("GET", "/permits")
        status = await self.must("GET", "/status")
        runs = {k: v for k, v in status["executions"].items() if v["state"] != "finished"}
        wanted = {"permits": PERMITS, "available": PERMITS, "in_use": 0, "waiting": 0}
        odd = {"draining": status["draining"], **status["queue"]}
        if runs or permits != wanted or odd["draining"] or odd["length"]:
            return permits, runs, odd
        return None

    def _strangers(self) -> list[str]:
        return self.manager.strangers()

    def _strange_descriptors(self) -> str:
        assert self._quiet is not None
        now = self.manager.descriptors()
        now["socket"] -= 1  # the measuring process
        return f"{now - self._quiet} more than before" if now - self._quiet else ""

    def _too_many_threads(self) -> int | None:
        threads = self.manager.threads()
        return threads if threads > THREADS_MAX else None

    def _grown(self) -> str | None:
        grown = self.manager.memory() - self.memory["before"]
        if grown <= self.options.memory_mib * MIB:
            return None
        return f"{grown / MIB:.0f} MiB more than before the load"

    def _check_log(self, name: str) -> None:
        """Every run has one end in the log too, the same; nothing there is a traceback."""
        log = self.manager.log
        while log.read():
            pass
        for trouble in log.troubles:
            self._problem(name, f"in the log: {trouble}")
        for genvm_id, (plan, end) in self.model.ends.items():
            found = log.ends.pop(genvm_id, [])
            if found != [end]:
                self._problem(
                    name, f"run {genvm_id} ({plan.kind}) ended {end}, the log has {found}"
                )
            if plan.log is None or plan.captured or plan.leaves_writers or end[0] != "exited":
                continue
            got, lines = log.lines_of[genvm_id], plan.log.count + len(plan.log.end)
            if got != lines and not log.dropped:
                self._problem(name, f"run {genvm_id} ({plan.kind}): {got} of {lines} log lines")
        unknown = {*log.ends} - self.model.ids
        if len(unknown) > self.model.anonymous:
            self._problem(name, f"ends that nobody knows: {unknown} for {self.model.anonymous}")
        if any(len(ends) != 1 for ends in log.ends.values()):
            self._problem(name, f"not exactly one end: {log.ends}")
        log.ends.clear()
        log.lines_of.clear()
        log.troubles.clear()
        log.dropped = False
        self.model.ends.clear()
        self.model.anonymous = 0

    async def _end(self) -> None:
        """End the manager under load: nothing may be left."""
        rng = random.Random(self.options.seed)
        for maker in (plans.flood, plans.stubborn, plans.polite, plans.writer, plans.holder):
            self.model.anonymous += 1
            await self.start(maker(rng, "end"))
        begin = time.monotonic()
        self.manager.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(LIMIT):
                while self.manager.process.poll() is None:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            self._problem("the end", "SIGTERM does not end it")
            return
        self.end_seconds = time.monotonic() - begin
        if self.manager.process.returncode != 0:
            self._problem("the end", f"exit status {self.manager.process.returncode}")
        await self._becomes("the end", "processes", self._strangers)
        await self._becomes("the end", "temporary files", self.manager.temporary_files)
        self._check_log("the end")
        if self.manager.errors:
            self._problem("the end", f"on stderr: {self.manager.errors[-2000:]}")


Act = Callable[[Soak, random.Random, str], Awaitable[None]]
"""Something that a client or the operator does; it has a random source and a name."""
