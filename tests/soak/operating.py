"""What the operator of the soak does to the manager."""

from __future__ import annotations

import asyncio
import math
import random
import signal
import time
from typing import Any

from ..integration.support import kill
from .backends import MODEL
from .client import LIMIT, Problem
from .driver import PERMITS, Act, Soak


async def permits(soak: Soak, rng: random.Random, _name: str) -> None:
    """Change the number of permits for a while; 0 is a pause."""
    count = rng.choice((0, 1, 2, 4, 8, 16, 64))
    answer = await soak.must("POST", "/permits", {"permits": count})
    permits = await soak.must("GET", "/permits")
    if answer["permits"] != count or permits["permits"] != count:
        raise Problem(f"{count} permits were set: {answer}, {permits}")
    if permits["available"] != max(0, count - permits["in_use"]):
        raise Problem(f"permits: {permits}")
    await asyncio.sleep(1 if count < 2 else rng.choice((1, 4)))
    await soak.must("POST", "/permits", {"permits": PERMITS})


async def drain(soak: Soak, rng: random.Random, _name: str) -> None:
    """Refuse runs for a while."""
    soak.model.drained_until = math.inf
    await soak.must("POST", "/drain")
    await asyncio.sleep(rng.choice((0, 0.3, 1)))
    await soak.must("POST", "/undrain")
    soak.model.drained_until = time.monotonic()


async def reload(soak: Soak, rng: random.Random, _name: str) -> None:
    """Read a manifest again that is good or bad."""
    if rng.random() < 0.5:
        soak.root.manifest.write_text(rng.choice(("executor_versions: [", "x", "a: {b: ")))
        reply = await soak.ask("POST", "/manifest/reload")
        soak.root.manifest.write_text(soak.manifest)
        if reply.code != "manifest_invalid":
            raise Problem(f"a bad manifest: {reply}")
    if rng.random() < 0.5:
        soak.manager.signal(signal.SIGHUP)
    await soak.must("POST", "/manifest/reload")


async def settings(soak: Soak, rng: random.Random, _name: str) -> None:
    """Set the level of the log, and a variable."""
    await soak.must("POST", "/log/level", {"level": rng.choice(("info", "debug"))})
    pair = {"key": "SOAK_TOKEN", "value": f"secret-{rng.random()}"}
    await soak.must("POST", "/env", pair)


async def pause(soak: Soak, rng: random.Random, _name: str) -> None:
    """Stop the manager for a moment."""
    begin = time.monotonic()
    soak.manager.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(rng.choice((0.1, 0.6, 0.8, 1.5)))
    finally:
        soak.manager.signal(signal.SIGCONT)
        soak.model.pauses.append((begin, time.monotonic() + 0.5))


async def guardian(soak: Soak, _rng: random.Random, _name: str) -> None:
    """Kill the guardian; it must come back."""
    first = await asyncio.to_thread(soak.manager.guardian)
    kill(first)
    async with asyncio.timeout(LIMIT):
        while await asyncio.to_thread(soak.manager.guardian) == first:
            await asyncio.sleep(0.05)


def _module_body(soak: Soak, kind: str, nonce: float) -> dict[str, Any]:
    config: dict[str, Any] = {"bind_address": soak.addresses[kind], "timeout": "20s"}
    if kind == "web":
        config["always_allow_hosts"] = ["127.0.0.1", f"host-{nonce}.example"]
    else:
        models = {MODEL: {"supports_json": True, "meta": {"soak": nonce}}}
        backend = {"host": soak.backends.live, "provider": "ollama", "key": "none-needed"}
        config["backends"] = {"local": {**backend, "models": models}}
    return {"module_type": kind, "config": config}


async def module(soak: Soak, rng: random.Random, _name: str) -> None:
    """Start, stop, restart or kill a module."""
    kind = rng.choice(("llm", "llm", "web"))
    body = _module_body(soak, kind, rng.random())
    known = soak.model.modules[kind]
    if known != "running":
        with soak.changing(kind, "running"):
            if known is None:
                await soak.ask("POST", "/module/stop", {"module_type": kind})
            await soak.must("POST", "/module/start", body)
        return
    what = rng.choice(("restart", "bad", "twice", "kill", "stop"))
    if what == "restart":
        with soak.changing(kind, "running"):
            await soak.must("POST", "/module/restart", body)
    elif what == "bad":
        bad = {"module_type": kind, "config": {"bind_address": 7}}
        reply = await soak.ask("POST", "/module/restart", bad)
        if reply.status != 500:
            raise Problem(f"a bad configuration: {reply}")
    elif what == "twice":
        reply = await soak.ask("POST", "/module/start", body)
        if reply.code != "module_already_running":
            raise Problem(f"a second start: {reply}")
    elif what == "kill":
        with soak.changing(kind, "running"):
            pid = (await _module(soak, kind))["pid"]
            kill(pid)
            async with asyncio.timeout(LIMIT):
                while (now := await _module(soak, kind))["state"] != "running" or (
                    now["pid"] == pid
                ):
                    await asyncio.sleep(0.2)
    else:
        await soak.stop_module(kind)


async def _module(soak: Soak, kind: str) -> dict[str, Any]:
    status = await soak.must("GET", "/status")
    return {"state": status[f"{kind}_module"], **status["modules"][kind]}


OPERATOR: dict[Act, float] = {
    **{permits: 5, drain: 2, reload: 3, settings: 2, pause: 3, guardian: 0.5, module: 4}
}
"""How often the operator does what."""
