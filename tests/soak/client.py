"""How the soak talks to the manager: one HTTP request on a connection of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

LIMIT = 120.0
"""Seconds after which a request has hung."""


class Problem(Exception):
    """The manager did what it must not do."""


class Reply(NamedTuple):
    """A response whose body is JSON."""

    status: int
    json: Any

    @property
    def code(self) -> str | None:
        """The stable code of an error."""
        return self.json.get("code") if isinstance(self.json, dict) else None


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, Any]]:
    """Connect; the connection is dropped at the end, whatever it is in the middle of."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def encoded(
    method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
) -> bytes:
    """Return the bytes of a request; a body that is not bytes becomes JSON."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(data)}"]
    lines += [f"{name}: {text}" for name, text in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + data


async def read_reply(reader: asyncio.StreamReader) -> Reply:
    """Read a response."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    status = int(head[0].split()[1])
    headers = {
        name.lower(): text.strip() for name, _, text in (line.partition(":") for line in head[1:])
    }
    if headers.get("transfer-encoding") == "chunked":
        parts = []
        while size := int(await reader.readuntil(b"\r\n"), 16):
            parts.append((await reader.readexactly(size + 2))[:-2])
        body = b"".join(parts)
    else:
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    if headers.get("content-type") != "application/json; charset=utf-8":
        raise Problem(f"{status} {headers}: {body[:200]!r}")
    return Reply(status, json.loads(body))


async def request(
    address: str,
    method: str,
    path: str,
    body: object = None,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """Make a request; raises ``Problem`` where no whole answer comes."""
    try:
        async with asyncio.timeout(LIMIT), connected(address) as (reader, writer):
            writer.write(encoded(method, path, body, headers))
            return await read_reply(reader)
    except TimeoutError:
        raise Problem(f"{method} {path}: no answer within {LIMIT:g} s") from None
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        raise Problem(f"{method} {path}: {type(error).__name__}: {error}") from None


async def hang_up(address: str, data: bytes, seconds: float, reads: int = 0) -> bytes:
    """Send something, read a little of what comes within some seconds, and disconnect."""
    got = b""
    with contextlib.suppress(OSError, TimeoutError):
        async with connected(address) as (reader, writer):
            writer.write(data)
            if reads:
                async with asyncio.timeout(seconds):
                    got = await reader.read(reads)
            else:
                await asyncio.sleep(seconds)
    return got
