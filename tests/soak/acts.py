"""What a client of the soak does: one act is one function."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping

import attrs

from ..integration.support import TIMESTAMP, Host, run_body, serving
from . import plans
from .backends import MODEL
from .client import LIMIT, Problem, connected, encoded, hang_up, read_reply
from .driver import Act, Soak
from .plans import Plan, choose

HEADER = {"Deployment-Timestamp": TIMESTAMP}
CONTRACT = b'# v0.1.0\non schema\nreturn "{}"'


def tag_of(name: str) -> str:
    """Return the text by which a run's output is known."""
    return "r" + name.partition(" ")[0]


def completed(genvm_id: int) -> dict[str, object]:
    """Return the answer to a DELETE that went well."""
    return {"result": "shutdown_completed", "genvm_id": genvm_id}


async def begin(
    soak: Soak, rng: random.Random, name: str, kinds: Mapping[plans.Maker, int]
) -> tuple[Plan, int] | None:
    """Start a run of one of some kinds; return its plan and its id, unless it was refused."""
    plan = choose(rng, kinds, tag_of(name))
    genvm_id = await soak.start(plan)
    return None if genvm_id is None else (plan, soak.is_new(genvm_id))


async def run(soak: Soak, rng: random.Random, name: str) -> None:
    """Start a run and wait for its end."""
    wait = rng.choice(("?wait=20s", "?wait=20s", "?wait_ms=300", ""))
    if (begun := await begin(soak, rng, name, plans.ENDING)) is None:
        return
    plan, genvm_id = begun
    if rng.random() < 0.2:
        data = encoded("GET", f"/genvm/{genvm_id}?wait=60s")
        await hang_up(soak.manager.address, data, rng.choice((0, 0.05, 0.3)))
    await soak.until_its_end(plan, genvm_id, wait)
    if rng.random() < 0.15:
        await _read_again(soak, rng, genvm_id)


async def _read_again(soak: Soak, rng: random.Random, genvm_id: int) -> None:
    """Leave in the middle of the answer, then take it whole, then end what has ended."""
    first = await soak.result(genvm_id)
    for _ in range(rng.randint(0, 3)):
        data = encoded("GET", f"/genvm/{genvm_id}")
        await hang_up(soak.manager.address, data, 1.0, reads=rng.randint(1, 100_000))
    for method, path, expected in (
        ("GET", f"/genvm/{genvm_id}", {"genvm_id": genvm_id, "status": first}),
        ("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms=0", completed(genvm_id)),
    ):
        reply = await soak.ask(method, path)
        is_gone = (reply.status, reply.json.get("code")) == (404, "execution_not_found")
        if is_gone and soak.has_expired(first):
            return
        if (reply.status, reply.json) != (200, expected):
            raise Problem(f"{method} of an ended run: {reply}")


async def cancel(soak: Soak, rng: random.Random, name: str) -> None:
    """Start a run, and end it from one or several sides."""
    if (begun := await begin(soak, rng, name, plans.ENDED)) is None:
        return
    plan, genvm_id = begun
    await asyncio.sleep(rng.choice((0, 0.02, 0.1, 0.4, 1.0)))
    if rng.random() < 0.2:
        entry = (await soak.must("GET", "/status"))["executions"].get(str(genvm_id))
        if plan.endless and (entry is None or entry["state"] != "running"):
            raise Problem(f"run {genvm_id} runs, but the status has {entry}")
    wait_ms = rng.choice((0, 1, 20, 100, 1000, 1000, 2000))
    path = f"/genvm/{genvm_id}?wait_timeout_ms={wait_ms}"
    asks = [soak.ask("DELETE", path) for _ in range(rng.choice((1, 1, 2, 3)))]
    replies = await asyncio.gather(*asks)
    reply = max(replies, key=lambda one: one.status)
    # Where the wait is short, one of them may have come after the end.
    answers = {(one.status, one.json.get("code")) for one in replies}
    if wait_ms >= 1000 and len(answers) > 1:
        raise Problem(f"DELETEs do not agree: {replies}")
    answer = await soak.must("GET", f"/genvm/{genvm_id}")
    status = answer["status"]
    if status is None:
        raise Problem(f"DELETE of {genvm_id} answered {reply.status}, but it goes on")
    if reply.status == 200 and reply.json != completed(genvm_id):
        raise Problem(f"DELETE: {reply}")
    if reply.status != 200 and reply.code != "shutdown_timeout":
        raise Problem(f"DELETE: {reply}")
    soak.judge(genvm_id, plan, status, {"cancelled", *(() if plan.endless else ("exited",))})
    if status["cause"] == "cancelled" and (reply.status == 500) != (status["signal"] == 9):
        raise Problem(f"DELETE ?wait_timeout_ms={wait_ms}: {reply} for {plan.kind}, {status}"[:900])


async def deadline(soak: Soak, rng: random.Random, name: str) -> None:
    """Start a run that its deadline may end."""
    plan = choose(rng, plans.ENDED, tag_of(name))
    seconds = rng.choice((0.05, 0.4, 1.0, 2.0))
    body = {**plan.body, "max_execution_minutes": seconds / 60}
    plan = attrs.evolve(plan, body=body)
    genvm_id = await soak.start(plan)
    if genvm_id is None:
        return
    soak.is_new(genvm_id)
    causes = {"deadline", *(() if plan.endless else ("exited",))}
    soak.judge(genvm_id, plan, await soak.result(genvm_id), causes)


async def idempotent(soak: Soak, rng: random.Random, name: str) -> None:
    """Ask for the same run several times at once and afterwards."""
    plan = choose(rng, plans.ENDING, tag_of(name))
    key = {"Idempotency-Key": name}
    asks = [soak.start(plan, key) for _ in range(rng.randint(2, 4))]
    ids = {one for one in await asyncio.gather(*asks) if one is not None}
    if not ids:
        return
    if len(ids) > 1:
        raise Problem(f"one key, several runs: {ids}")
    genvm_id = soak.is_new(ids.pop())
    other = await soak.ask("POST", "/genvm/run", {**plan.body, "host": "127.0.0.1:9"}, key)
    if other.code != "invalid_request":
        raise Problem(f"a key with another body: {other}")
    status = await soak.until_its_end(plan, genvm_id)
    again = await soak.start(plan, key)
    if again != genvm_id and not soak.has_expired(status):
        raise Problem("a key, asked again, is another run")
    if again not in (genvm_id, None):
        await soak.until_its_end(plan, soak.is_new(again))


async def abandon(soak: Soak, rng: random.Random, name: str) -> None:
    """Ask for a run and leave, before it is started or after."""
    soak.model.anonymous += 1
    plan = choose(rng, plans.ENDING, tag_of(name))
    data = encoded("POST", "/genvm/run", plan.body)
    data = data[: rng.choice((len(data), len(data), len(data) - 1))]
    await hang_up(soak.manager.address, data, rng.choice((0, 0.01, 0.1, 0.5)))


async def follow(soak: Soak, rng: random.Random, name: str) -> None:
    """Follow a run, or everything, and leave; follow it to its end, perhaps saying no more."""
    if (begun := await begin(soak, rng, name, plans.ENDING)) is None:
        return
    plan, genvm_id = begun
    path = f"/genvm/{genvm_id}/events"
    for _ in range(rng.randint(1, 5)):
        data = encoded("GET", rng.choice((path, "/events")))
        seconds = rng.choice((0.05, 0.5, 2))
        await hang_up(soak.manager.address, data, seconds, reads=rng.randint(1, 100_000))
    status = await soak.until_its_end(plan, genvm_id, "?wait=20s")
    seen = b""
    async with asyncio.timeout(LIMIT), connected(soak.manager.address) as (reader, writer):
        writer.write(encoded("GET", path))
        if rng.random() < 0.5:
            writer.write_eof()
        while b"event: finished" not in seen:
            piece = await reader.read(65536)
            if b" 404 " in (seen + piece)[:16] and soak.has_expired(status):
                return
            if not piece:
                raise Problem(f"{path} ends with {seen[-200:]!r}")
            seen = seen[-20:] + piece


# --- other requests ---


async def check(soak: Soak, rng: random.Random, _name: str) -> None:
    """Check providers that are there, silent, or closed; often leave before the end."""
    hosts = [soak.backends.live, soak.backends.mute, soak.backends.silent, soak.backends.closed]
    chosen = [rng.choice(hosts) for _ in range(rng.randint(1, 30))]
    common = {"provider": "ollama", "model": MODEL, "key": "none-needed", "timeout_ms": 1500}
    prompts = [{"user_message": "Say OK"}] * rng.randint(1, 2)
    body = {"configs": [{"host": host, **common} for host in chosen], "test_prompts": prompts}
    if rng.random() < 0.6:
        data = encoded("POST", "/llm/check", body)
        pause = rng.choice((0, 0.01, 0.05, 0.2))
        await hang_up(soak.manager.address, data, pause)
        return
    answer = await soak.must("POST", "/llm/check", body)
    wanted = [host for host in chosen for _ in prompts]
    if len(answer) != len(wanted):
        raise Problem(f"/llm/check: {len(answer)} answers for {len(wanted)} pairs")
    for host, one in zip(wanted, answer, strict=True):
        kinds: dict[str, set[str | None]] = {soak.backends.live: {None, "timeout"}}
        # A closed port answers at once, but a manager that was paused may hear of it too late.
        if one["error_kind"] not in kinds.get(host, {"timeout", "connect"}):
            raise Problem(f"/llm/check of {host}: {one}")


async def read_only(soak: Soak, rng: random.Random, _name: str) -> None:
    """Ask for a schema, a version, deployment writes."""
    path, wanted = rng.choice(
        (
            ("/genvm/run/readonly", {"schema": "{}"}),
            ("/contract/detect-version", {"specified_major": 0}),
            ("/contract/pre-deploy-writes", None),
        )
    )
    if path.endswith("readonly"):
        soak.model.anonymous += 1
        if rng.random() < 0.2:
            data = encoded("POST", path, CONTRACT, HEADER)
            await hang_up(soak.manager.address, data, rng.choice((0, 0.1, 0.5)))
            return
    begin = time.monotonic()
    reply = await soak.ask("POST", path, CONTRACT, HEADER)
    if reply.code == "draining" and soak.model.drained_until >= begin:
        return
    if reply.status != 200 or (wanted is not None and reply.json != wanted):
        raise Problem(f"{path}: {reply}")


async def bad(soak: Soak, rng: random.Random, _name: str) -> None:
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
    begin = time.monotonic()
    reply = await soak.ask(method, path, body)
    if reply.code != code and not (reply.code == "draining" and soak.model.drained_until >= begin):
        raise Problem(f"{method} {path}: {reply} instead of {code}")


async def hostile(soak: Soak, rng: random.Random, _name: str) -> None:
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
    got = await hang_up(soak.manager.address, data, rng.choice((0.05, 0.5, 2)), reads=65536)
    if got and not got.startswith(b"HTTP/1.1 "):
        raise Problem(f"to {data[:60]!r} came {got[:60]!r}")
    async with asyncio.timeout(LIMIT), connected(soak.manager.address) as (reader, writer):
        writer.write(good * 3)
        for _ in range(3):
            if (await read_reply(reader)).status != 200:
                raise Problem("pipelined requests fail")


async def ask_module(soak: Soak, rng: random.Random, name: str) -> None:
    """Let a contract ask the LLM or the Web module."""
    kind = rng.choice(("llm", "web"))
    step = "ask-llm Say OK" if kind == "llm" else f"web-get {soak.backends.live}/"
    state, changes = soak.model.modules[kind], soak.model.changes
    body = plans.practice_body(rng, step, "exit 0")
    plan = Plan("asks a module", {**body, "capture_output": True})
    genvm_id = await soak.start(plan)
    if genvm_id is None:
        return
    status = await soak.result(soak.is_new(genvm_id))
    exits = {0, 1} if soak.model.changes != changes or state is None else None
    exits = exits or ({0} if state == "running" else {1})
    soak.model.ends[genvm_id] = plan, (status["cause"], status["exit_code"], status["signal"])
    soak.model.causes[status["cause"]] += 1
    soak.model.kinds[plan.kind] += 1
    if status["cause"] != "exited" or status["exit_code"] not in exits:
        raise Problem(f"{kind} is {state}, but a run that asked it: {status}")


async def contract(soak: Soak, rng: random.Random, name: str) -> None:
    """Let a host's contract return, or be ended; its host hears of either."""
    ended = rng.choice(("", "", "cancelled", "deadline"))
    code = "on method m\n" + ("sleep 600\n" if ended else "") + 'return "$args.0"\n'
    place = soak.root.path / name.replace(" ", "-")
    with serving(Host(place, code)) as host:
        host.calls({"method": "m", "args": [name], "kwargs": {}})
        body = plans.practice_body(rng, host=host.uri)
        if ended == "deadline":
            body["max_execution_minutes"] = 4 / 60
        notice = plans.Stream(end=plans.NOTICE)
        plan = Plan("has a host", body, stderr=notice, log=None, on_term=(0, plans.Stream()))
        genvm_id = await soak.start(plan)
        if genvm_id is None:
            return
        soak.is_new(genvm_id)
        if ended == "cancelled":
            await asyncio.sleep(2)
            await soak.ask("DELETE", f"/genvm/{genvm_id}?wait_timeout_ms=5000")
        status = await soak.result(genvm_id)
        soak.judge(genvm_id, plan, status, {ended or "exited"})
        # What was killed, or had not begun, has told nothing.
        if status["signal"] is None:
            outcome = await asyncio.to_thread(host.outcome)
            if outcome != (("vm_error", "timeout") if ended else ("return", name)):
                raise Problem(f"run {genvm_id} ({ended}): its host was told {outcome}")
    place.unlink()


CLIENT: dict[Act, float] = {
    **{run: 45, cancel: 20, deadline: 10, idempotent: 5, abandon: 6, contract: 4, follow: 5},
    **{check: 6, read_only: 4, bad: 8, hostile: 4, ask_module: 3},
}
"""How often a client does what."""
