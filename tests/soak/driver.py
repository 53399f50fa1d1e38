"""The soak itself: clients, an operator, and what is checked when all is quiet.

Every client and the operator draw what they do from a random source of their own, seeded by the
seed and their number: the same seed does the same things in the same order, though not at the
same moments.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import signal
import socket
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import attrs

from ..integration.support import TIMESTAMP, Root, kill, run_body
from . import plans
from .client import LIMIT, Problem, Reply, connected, encoded, hang_up, read_reply, request
from .manager import Manager
from .plans import Plan, choose

MIB = 1 << 20
PERMITS = 8
SLACK = 5.0
"""Seconds that a busy machine may take for what should happen at once."""
SETTLE = 60.0
"""Seconds within which all must be quiet when nobody asks for anything any more."""
THREADS_MAX = 80
HEADER = {"Deployment-Timestamp": TIMESTAMP}
CONTRACT = b'# v0.1.0\non schema\nreturn "{}"'


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


class Backends:
    """Providers that answer, that never answer, that never accept, and that are not there."""

    def __init__(self) -> None:
        self._servers: list[asyncio.Server] = []
        self._sockets: list[socket.socket] = []
        self.live = self.mute = self.silent = self.closed = ""

    async def start(self) -> None:
        """Open all of them."""
        self.live = await self._serve(self._answer)
        self.mute = await self._serve(self._swallow)
        deaf = socket.create_server(("127.0.0.1", 0), backlog=0)
        self._sockets.append(deaf)
        for _ in range(2):  # its queue is full then, and who connects is not even told
            full = socket.socket()
            full.setblocking(False)
            full.connect_ex(deaf.getsockname())
            self._sockets.append(full)
        self.silent = "http://{}:{}".format(*deaf.getsockname())
        gone = socket.create_server(("127.0.0.1", 0))
        self.closed = "http://{}:{}".format(*gone.getsockname())
        gone.close()

    async def stop(self) -> None:
        """Close all of them."""
        for server in self._servers:
            server.close()
        for one in self._sockets:
            one.close()

    async def _serve(self, handler: Callable[..., Awaitable[None]]) -> str:
        server = await asyncio.start_server(handler, "127.0.0.1", 0)
        self._servers.append(server)
        return "http://{}:{}".format(*server.sockets[0].getsockname())

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = head.partition(b"content-length:")[2].split(b"\r\n")[0]
                await reader.readexactly(int(length or 0))
                body = json.dumps({"response": "OK", "done": True}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
                writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        writer.close()

    async def _swallow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while await reader.read(65536):
                pass
        writer.close()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


class Soak:
    """One soak of one manager."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.model = Model()
        self.problems: list[str] = []
        self.trail: deque[str] = deque(maxlen=60)
        self.steps = 0
        self.latencies: Path
        self.memory: dict[str, int] = {}
        self.end_seconds = 0.0
        self.requests = 0
        self.backends = Backends()
        self._begin = time.monotonic()
        self._manager: Manager
        self._root: Root
        self._quiet: Counter[str] | None = None
        self._addresses = {kind: f"127.0.0.1:{free_port()}" for kind in ("llm", "web")}

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
        return await request(self._manager.address, method, path, body, headers)

    async def must(self, method: str, path: str, body: object = None) -> Any:
        """Make a request that must succeed."""
        reply = await self.ask(method, path, body)
        if reply.status != 200:
            raise Problem(f"{method} {path}: {reply.status} {reply.json}")
        return reply.json

    # --- the whole ---

    async def run(self, folder: Path) -> None:
        """Soak; what is wrong is in ``problems`` afterwards."""
        self._root = Root()
        self._root.practice()
        self._root.add_shell()
        self._manifest = self._root.manifest.read_text()
        self._manager = Manager(self._root, folder, self.options.retention, self._addresses)
        try:
            await self.backends.start()
            await self._warm_up()
            async with self._measuring(folder):
                end = time.monotonic() + self.options.seconds
                number = 0
                while (left := end - time.monotonic()) > 0:
                    number += 1
                    await self._phase(number, min(left, self.options.phase))
                    await self._checkpoint(f"checkpoint {number}")
            self.memory["peak"] = self._manager.memory("VmHWM")
            await self._end()
        finally:
            self._manager.close()
            await self.backends.stop()
            self._root.close()

    async def _warm_up(self) -> None:
        """Use everything once, so that what stays for good is there when memory is compared."""
        self.memory["fresh"] = self._manager.memory()
        rng = random.Random(self.options.seed)
        for maker in plans.ENDING:
            plan = maker(rng, f"w.{maker.__name__}")
            try:
                await self._until_its_end(plan, await self._must_start(plan))
            except Problem as problem:
                self._problem("warm-up", str(problem))
        await self._checkpoint("warm-up", first=True)
        self.memory["before"] = self._manager.memory()

    @contextlib.asynccontextmanager
    async def _measuring(self, folder: Path) -> AsyncIterator[None]:
        self.latencies = folder / "latencies"
        host, _, port = self._manager.address.rpartition(":")
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
            self._manager.log.read()
            await asyncio.sleep(0.2)

    async def _phase(self, number: int, seconds: float) -> None:
        until = time.monotonic() + seconds
        seed = self.options.seed
        try:
            async with asyncio.timeout(seconds + 3 * LIMIT), asyncio.TaskGroup() as group:
                for client in range(self.options.clients):
                    rng = random.Random(f"{seed}/{number}/{client}")
                    group.create_task(self._act(f"{number}.{client}", rng, CLIENT, until))
                rng = random.Random(f"{seed}/{number}/operator")
                group.create_task(self._act(f"{number}.op", rng, OPERATOR, until, 2.0))
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

    def _is_new(self, genvm_id: int) -> int:
        if genvm_id in self.model.ids:
            raise Problem(f"the id {genvm_id} twice")
        self.model.ids.add(genvm_id)
        return genvm_id

    async def _must_start(self, plan: Plan) -> int:
        genvm_id = await self.start(plan)
        if genvm_id is None:
            raise Problem("refused")
        return self._is_new(genvm_id)

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
        ran = status["finished_at"] / 1000 - seconds_of(status["started_at"])
        limit = 60 * plan.body["max_execution_minutes"]
        paused = sum(end - begin for begin, end in self.model.pauses[-20:])
        if cause == "deadline" and not limit - 0.1 <= ran <= limit + 1 + SLACK + paused:
            problems.append(f"deadline of {limit:.2f} s after {ran:.2f} s")
        if problems:
            raise Problem(f"run {genvm_id} ({plan.kind}): " + "; ".join(problems))

    async def _until_its_end(self, plan: Plan, genvm_id: int, wait: str = "?wait=20s") -> None:
        self.judge(genvm_id, plan, await self.result(genvm_id, wait), {"exited"})

    async def act_run(self, rng: random.Random, name: str) -> None:
        """Start a run and wait for its end."""
        plan = choose(rng, plans.ENDING, tag_of(name))
        wait = rng.choice(("?wait=20s", "?wait=20s", "?wait_ms=300", ""))
        genvm_id = await self.start(plan)
        if genvm_id is None:
            return
        self._is_new(genvm_id)
        if rng.random() < 0.2:
            data = encoded("GET", f"/genvm/{genvm_id}?wait=60s")
            await hang_up(self._manager.address, data, rng.choice((0, 0.05, 0.3)))
        await self._until_its_end(plan, genvm_id, wait)
        if rng.random() < 0.15:
            await self._read_again(rng, genvm_id)

    async def _read_again(self, rng: random.Random, genvm_id: int) -> None:
        """Leave in the middle of the answer, then take it whole, then end what has ended."""
        first = await self.result(genvm_id)
        for _ in range(rng.randint(0, 3)):
            path = encoded("GET", f"/genvm/{genvm_id}")
            await hang_up(self._manager.address, path, 1.0, reads=rng.randint(1, 100_000))
        if await self.result(genvm_id) != first:
            raise Problem(f"run {genvm_id}: another answer the second time")
        reply = await self.ask("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms=0")
        if (reply.status, reply.json) != (200, completed(genvm_id)):
            raise Problem(f"DELETE of an ended run: {reply}")

    async def act_cancel(self, rng: random.Random, name: str) -> None:
        """Start a run, and end it from one or several sides."""
        plan = choose(rng, plans.ENDED, tag_of(name))
        genvm_id = await self.start(plan)
        if genvm_id is None:
            return
        self._is_new(genvm_id)
        await asyncio.sleep(rng.choice((0, 0.02, 0.1, 0.4, 1.0)))
        if rng.random() < 0.2:
            entry = (await self.must("GET", "/status"))["executions"].get(str(genvm_id))
            if plan.endless and (entry is None or entry["state"] != "running"):
                raise Problem(f"run {genvm_id} runs, but the status has {entry}")
        wait_ms = rng.choice((0, 1, 20, 100, 1000, 1000, 2000))
        path = f"/genvm/{genvm_id}?wait_timeout_ms={wait_ms}"
        asks = [self.ask("DELETE", path) for _ in range(rng.choice((1, 1, 2, 3)))]
        replies = await asyncio.gather(*asks)
        reply = max(replies, key=lambda one: one.status)
        # Where the wait is short, one of them may have come after the end.
        if wait_ms >= 1000 and any(other != reply for other in replies):
            raise Problem(f"DELETEs do not agree: {replies}")
        answer = await self.must("GET", f"/genvm/{genvm_id}")
        status = answer["status"]
        if status is None:
            raise Problem(f"DELETE of {genvm_id} answered {reply.status}, but it goes on")
        if reply.status == 200 and reply.json != completed(genvm_id):
            raise Problem(f"DELETE: {reply}")
        if reply.status != 200 and reply.code != "shutdown_timeout":
            raise Problem(f"DELETE: {reply}")
        self.judge(genvm_id, plan, status, {"cancelled", *(() if plan.endless else ("exited",))})
        if status["cause"] == "cancelled" and (reply.status == 500) != (status["signal"] == 9):
            raise Problem(
                f"DELETE ?wait_timeout_ms={wait_ms}: {reply} for {plan.kind}, {status}"[:900]
            )

    async def act_deadline(self, rng: random.Random, name: str) -> None:
        """Start a run that its deadline may end."""
        plan = choose(rng, plans.ENDED, tag_of(name))
        seconds = rng.choice((0.05, 0.4, 1.0, 2.0))
        body = {**plan.body, "max_execution_minutes": seconds / 60}
        plan = attrs.evolve(plan, body=body)
        genvm_id = await self.start(plan)
        if genvm_id is None:
            return
        self._is_new(genvm_id)
        causes = {"deadline", *(() if plan.endless else ("exited",))}
        self.judge(genvm_id, plan, await self.result(genvm_id), causes)

    async def act_idempotent(self, rng: random.Random, name: str) -> None:
        """Ask for the same run several times at once and afterwards."""
        plan = choose(rng, plans.ENDING, tag_of(name))
        key = {"Idempotency-Key": name}
        asks = [self.start(plan, key) for _ in range(rng.randint(2, 4))]
        ids = {one for one in await asyncio.gather(*asks) if one is not None}
        if not ids:
            return
        if len(ids) > 1:
            raise Problem(f"one key, several runs: {ids}")
        genvm_id = self._is_new(ids.pop())
        other = await self.ask("POST", "/genvm/run", {**plan.body, "host": "127.0.0.1:9"}, key)
        if other.code != "invalid_request":
            raise Problem(f"a key with another body: {other}")
        await self._until_its_end(plan, genvm_id)
        if await self.start(plan, key) != genvm_id:
            raise Problem("a key, asked again, is another run")

    async def act_abandon(self, rng: random.Random, name: str) -> None:
        """Ask for a run and leave, before it is started or after."""
        self.model.anonymous += 1
        plan = choose(rng, plans.ENDING, tag_of(name))
        data = encoded("POST", "/genvm/run", plan.body)
        data = data[: rng.choice((len(data), len(data), len(data) - 1))]
        await hang_up(self._manager.address, data, rng.choice((0, 0.01, 0.1, 0.5)))

    # --- other requests ---

    async def act_check(self, rng: random.Random, _name: str) -> None:
        """Check providers that are there, silent, or closed; often leave before the end."""
        hosts = [self.backends.live, self.backends.mute, self.backends.silent, self.backends.closed]
        chosen = [rng.choice(hosts) for _ in range(rng.randint(1, 30))]
        common = {"provider": "ollama", "model": "m", "key": "none-needed", "timeout_ms": 1500}
        prompts = [{"user_message": "Say OK"}] * rng.randint(1, 2)
        body = {"configs": [{"host": host, **common} for host in chosen], "test_prompts": prompts}
        if rng.random() < 0.6:
            data = encoded("POST", "/llm/check", body)
            pause = rng.choice((0, 0.01, 0.05, 0.2))
            await hang_up(self._manager.address, data, pause)
            return
        answer = await self.must("POST", "/llm/check", body)
        wanted = [host for host in chosen for _ in prompts]
        if len(answer) != len(wanted):
            raise Problem(f"/llm/check: {len(answer)} answers for {len(wanted)} pairs")
        for host, one in zip(wanted, answer, strict=True):
            kinds: dict[str, set[str | None]] = {self.backends.live: {None, "timeout"}}
            kinds[self.backends.closed] = {"connect"}
            if one["error_kind"] not in kinds.get(host, {"timeout", "connect"}):
                raise Problem(f"/llm/check of {host}: {one}")

    async def act_read_only(self, rng: random.Random, _name: str) -> None:
        """Ask for a schema, a version, deployment writes."""
        path, wanted = rng.choice(
            (
                ("/genvm/run/readonly", {"schema": "{}"}),
                ("/contract/detect-version", {"specified_major": 0}),
                ("/contract/pre-deploy-writes", None),
            )
        )
        if path.endswith("readonly"):
            self.model.anonymous += 1
            if rng.random() < 0.2:
                data = encoded("POST", path, CONTRACT, HEADER)
                await hang_up(self._manager.address, data, rng.choice((0, 0.1, 0.5)))
                return
        begin = time.monotonic()
        reply = await self.ask("POST", path, CONTRACT, HEADER)
        if reply.code == "draining" and self.model.drained_until >= begin:
            return
        if reply.status != 200 or (wanted is not None and reply.json != wanted):
            raise Problem(f"{path}: {reply}")

    async def act_bad(self, rng: random.Random, _name: str) -> None:
        """Ask for what is refused."""
        run = run_body("exit 0")
        missing = {**run}
        del missing[rng.choice(tuple(run)[:4])]
        large = b'{"permits": "x", "rest": [' + b'"text", ' * 400_000 + b'""]}'
        method, path, body, code = rng.choice(
            (
                ("POST", "/genvm/run", {**run, "major": True}, "invalid_request"),
                ("POST", "/genvm/run", {**run, "host": "a\0b"}, "invalid_request"),
                ("POST", "/genvm/run", {**run, "major": 77}, "version_not_available"),
                ("POST", "/genvm/run", missing, "invalid_request"),
                ("POST", "/genvm/run", b"{", "invalid_request"),
                ("POST", "/permits", {"permits": -1}, "invalid_request"),
                ("POST", "/permits", large, "invalid_request"),
                ("POST", "/module/start", {"module_type": "x"}, "invalid_request"),
                ("POST", "/log/level", {"level": "loud"}, "invalid_request"),
                ("GET", "/genvm/4503599627370495", None, "execution_not_found"),
                ("DELETE", "/genvm/4503599627370495", None, "execution_not_found"),
                ("GET", "/nothing", None, "endpoint_not_found"),
                ("POST", "/status", None, "method_not_allowed"),
            )
        )
        reply = await self.ask(method, path, body)
        if reply.code != code:
            raise Problem(f"{method} {path}: {reply} instead of {code}")

    async def act_hostile(self, rng: random.Random, _name: str) -> None:
        """Send what is not HTTP, or only half of it, or too much of it, and leave."""
        good = encoded("GET", "/permits")
        data = rng.choice(
            (
                rng.randbytes(300) + b"\r\n\r\n",
                good[: rng.randint(1, len(good) - 1)],
                b"GET /permits HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 600 + b"\r\n",
                b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
                b"POST /genvm/run HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n{",
                b"POST /drain HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
                good * 50,
            )
        )
        got = await hang_up(self._manager.address, data, rng.choice((0.05, 0.5, 2)), reads=65536)
        if got and not got.startswith(b"HTTP/1.1 "):
            raise Problem(f"to {data[:60]!r} came {got[:60]!r}")
        async with asyncio.timeout(LIMIT), connected(self._manager.address) as (reader, writer):
            writer.write(good * 3)
            for _ in range(3):
                if (await read_reply(reader)).status != 200:
                    raise Problem("pipelined requests fail")

    async def act_ask_module(self, rng: random.Random, name: str) -> None:
        """Let a contract ask the LLM or the Web module."""
        kind = rng.choice(("llm", "web"))
        step = "ask-llm Say OK" if kind == "llm" else f"web-get {self.backends.live}/"
        state, changes = self.model.modules[kind], self.model.changes
        body = plans.practice_body(rng, step, "exit 0")
        plan = Plan("asks a module", {**body, "capture_output": True})
        genvm_id = await self.start(plan)
        if genvm_id is None:
            return
        status = await self.result(self._is_new(genvm_id))
        exits = {0, 1} if self.model.changes != changes or state is None else None
        exits = exits or ({0} if state == "running" else {1})
        self.model.ends[genvm_id] = plan, (status["cause"], status["exit_code"], status["signal"])
        self.model.causes[status["cause"]] += 1
        self.model.kinds[plan.kind] += 1
        if status["cause"] != "exited" or status["exit_code"] not in exits:
            raise Problem(f"{kind} is {state}, but a run that asked it: {status}")

    # --- the operator ---

    async def op_permits(self, rng: random.Random, _name: str) -> None:
        """Change the number of permits for a while; 0 is a pause."""
        count = rng.choice((0, 1, 2, 4, 8, 16, 64))
        answer = await self.must("POST", "/permits", {"permits": count})
        permits = await self.must("GET", "/permits")
        if answer["permits"] != count or permits["permits"] != count:
            raise Problem(f"{count} permits were set: {answer}, {permits}")
        if permits["available"] != max(0, count - permits["in_use"]):
            raise Problem(f"permits: {permits}")
        await asyncio.sleep(1 if count < 2 else rng.choice((1, 4)))
        await self.must("POST", "/permits", {"permits": PERMITS})

    async def op_drain(self, rng: random.Random, _name: str) -> None:
        """Refuse runs for a while."""
        self.model.drained_until = math.inf
        await self.must("POST", "/drain")
        await asyncio.sleep(rng.choice((0, 0.3, 1)))
        await self.must("POST", "/undrain")
        self.model.drained_until = time.monotonic()

    async def op_reload(self, rng: random.Random, _name: str) -> None:
        """Read a manifest again that is good or bad."""
        if rng.random() < 0.5:
            self._root.manifest.write_text(rng.choice(("executor_versions: [", "x", "a: {b: ")))
            reply = await self.ask("POST", "/manifest/reload")
            self._root.manifest.write_text(self._manifest)
            if reply.code != "manifest_invalid":
                raise Problem(f"a bad manifest: {reply}")
        if rng.random() < 0.5:
            self._manager.signal(signal.SIGHUP)
        await self.must("POST", "/manifest/reload")

    async def op_settings(self, rng: random.Random, _name: str) -> None:
        """Set the level of the log, and a variable."""
        await self.must("POST", "/log/level", {"level": rng.choice(("info", "debug"))})
        pair = {"key": "SOAK_TOKEN", "value": f"secret-{rng.random()}"}
        await self.must("POST", "/env", pair)

    async def op_pause(self, rng: random.Random, _name: str) -> None:
        """Stop the manager for a moment."""
        begin = time.monotonic()
        self._manager.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(rng.choice((0.1, 0.6, 0.8, 1.5)))
        finally:
            self._manager.signal(signal.SIGCONT)
            self.model.pauses.append((begin, time.monotonic() + 0.5))

    async def op_guardian(self, _rng: random.Random, _name: str) -> None:
        """Kill the guardian; it must come back."""
        first = await asyncio.to_thread(self._manager.guardian)
        kill(first)
        async with asyncio.timeout(LIMIT):
            while await asyncio.to_thread(self._manager.guardian) == first:
                await asyncio.sleep(0.05)

    def _module_body(self, kind: str, nonce: float) -> dict[str, Any]:
        config: dict[str, Any] = {"bind_address": self._addresses[kind], "timeout": "20s"}
        if kind == "web":
            config["always_allow_hosts"] = ["127.0.0.1", f"host-{nonce}.example"]
        else:
            models = {"m": {"supports_json": True, "meta": {"soak": nonce}}}
            backend = {"host": self.backends.live, "provider": "ollama", "key": "none-needed"}
            config["backends"] = {"local": {**backend, "models": models}}
        return {"module_type": kind, "config": config}

    @contextlib.contextmanager
    def _changing(self, kind: str, to: str) -> Iterator[None]:
        self.model.changes += 1
        self.model.modules[kind] = None
        yield
        self.model.modules[kind] = to
        self.model.changes += 1

    async def op_module(self, rng: random.Random, _name: str) -> None:
        """Start, stop, restart or kill a module."""
        kind = rng.choice(("llm", "llm", "web"))
        body = self._module_body(kind, rng.random())
        if self.model.modules[kind] != "running":
            with self._changing(kind, "running"):
                await self._settled(kind, stop=True)
                await self.must("POST", "/module/start", body)
            return
        what = rng.choice(("restart", "bad", "twice", "kill", "stop"))
        if what == "restart":
            with self._changing(kind, "running"):
                await self.must("POST", "/module/restart", body)
        elif what == "bad":
            bad = {"module_type": kind, "config": {"bind_address": 7}}
            reply = await self.ask("POST", "/module/restart", bad)
            if reply.status != 500:
                raise Problem(f"a bad configuration: {reply}")
        elif what == "twice":
            reply = await self.ask("POST", "/module/start", body)
            if reply.code != "module_already_running":
                raise Problem(f"a second start: {reply}")
        elif what == "kill":
            with self._changing(kind, "running"):
                pid = (await self._module(kind))["pid"]
                kill(pid)
                async with asyncio.timeout(LIMIT):
                    while (now := await self._module(kind))["state"] != "running" or (
                        now["pid"] == pid
                    ):
                        await asyncio.sleep(0.2)
        else:
            await self._stop(kind)

    async def _module(self, kind: str) -> dict[str, Any]:
        status = await self.must("GET", "/status")
        return {"state": status[f"{kind}_module"], **status["modules"][kind]}

    async def _settled(self, kind: str, *, stop: bool = False) -> None:
        """Wait until a module whose state is not known is in one that lasts."""
        if self.model.modules[kind] is None or stop:
            await self.ask("POST", "/module/stop", {"module_type": kind})

    async def _stop(self, kind: str) -> None:
        with self._changing(kind, "stopped"):
            await self.must("POST", "/module/stop", {"module_type": kind})

    # --- when all is quiet ---

    async def _checkpoint(self, name: str, *, first: bool = False) -> None:
        """Let everything end, and check that nothing is left."""
        self._note(name, "begins")
        try:
            for kind in self.model.modules:
                await self._stop(kind)
            self._root.manifest.write_text(self._manifest)
            await self.must("POST", "/permits", {"permits": PERMITS})
            await self.must("POST", "/undrain")
            self.model.drained_until = min(self.model.drained_until, time.monotonic())
            await self._becomes(name, "permits, runs", self._busy)
            await self._becomes(name, "processes", self._strangers)
            await self._becomes(name, "temporary files", self._manager.temporary_files)
            if first:
                await asyncio.sleep(self.options.retention + 2)
                self._quiet = self._manager.descriptors()
                self._check_log(name)
                return
            await self._becomes(name, "descriptors", self._strange_descriptors)
            await self._becomes(name, "threads", self._too_many_threads)
            self._check_log(name)
            await asyncio.sleep(self.options.retention + 2)
            await self._becomes(name, "memory", self._grown)
        except Problem as problem:
            self._problem(name, str(problem))
        finally:
            self.memory["after"] = self._manager.memory()

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
        return self._manager.strangers()

    def _strange_descriptors(self) -> str:
        assert self._quiet is not None
        now = self._manager.descriptors()
        now["socket"] -= 1  # the measuring process
        return f"{now - self._quiet} more than before" if now - self._quiet else ""

    def _too_many_threads(self) -> int | None:
        threads = self._manager.threads()
        return threads if threads > THREADS_MAX else None

    def _grown(self) -> str | None:
        grown = self._manager.memory() - self.memory["before"]
        if grown <= self.options.memory_mib * MIB:
            return None
        return f"{grown / MIB:.0f} MiB more than before the load"

    def _check_log(self, name: str) -> None:
        """Every run has one end in the log too, the same; nothing there is a traceback."""
        log = self._manager.log
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
            lines = plan.log.count + len(plan.log.end)
            whole = end[0] == "exited" and not (plan.captured or plan.leaves_writers)
            if whole and not log.dropped and log.lines_of[genvm_id] != lines:
                got = log.lines_of[genvm_id]
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
        self._manager.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(LIMIT):
                while self._manager.process.poll() is None:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            self._problem("the end", "SIGTERM does not end it")
            return
        self.end_seconds = time.monotonic() - begin
        if self._manager.process.returncode != 0:
            self._problem("the end", f"exit status {self._manager.process.returncode}")
        await self._becomes("the end", "processes", self._strangers)
        await self._becomes("the end", "temporary files", self._manager.temporary_files)
        self._check_log("the end")
        if self._manager.errors:
            self._problem("the end", f"on stderr: {self._manager.errors[-2000:]}")


def completed(genvm_id: int) -> dict[str, Any]:
    """Return the answer to a DELETE that went well."""
    return {"result": "shutdown_completed", "genvm_id": genvm_id}


def seconds_of(text: str) -> float:
    """Return the seconds since the epoch of a time in a result."""
    return datetime.fromisoformat(text).timestamp()


def tag_of(name: str) -> str:
    """Return the text by which a run's output is known."""
    return "r" + name.partition(" ")[0]


Act = Callable[[Soak, random.Random, str], Awaitable[None]]

CLIENT: dict[Act, float] = {
    Soak.act_run: 45,
    Soak.act_cancel: 20,
    Soak.act_deadline: 10,
    Soak.act_idempotent: 5,
    Soak.act_abandon: 6,
    Soak.act_check: 6,
    Soak.act_read_only: 4,
    Soak.act_bad: 8,
    Soak.act_hostile: 4,
    Soak.act_ask_module: 3,
}
"""How often a client does what."""
OPERATOR: dict[Act, float] = {
    Soak.op_permits: 5,
    Soak.op_drain: 2,
    Soak.op_reload: 3,
    Soak.op_settings: 2,
    Soak.op_pause: 3,
    Soak.op_guardian: 0.5,
    Soak.op_module: 4,
}
"""How often the operator does what."""
