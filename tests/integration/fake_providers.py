"""Providers of language models to test against: real Twisted servers in a process of their own.

They check what they are asked (path, headers, body) and answer as the real ones do. How they answer
is chosen by the model's name, ``<behaviour>.<anything>`` or ``<behaviour>:<parameter>``, or, for
what a web server cannot do, by the first word of the path at the ``raw`` port. What they see they
write to stdout, a JSON object a line; they end when stdin is closed.

``FakeProviders`` is the other side: it starts the process and waits for what it says. ``Provider``
is an address there for a test that asks for models by names of its own.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import gzip
import hashlib
import ipaddress
import itertools
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.ssl import Certificate, CertificateOptions, PrivateCertificate
from twisted.internet.task import LoopingCall
from twisted.protocols.basic import LineReceiver
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site

PROJECT = Path(__file__).resolve().parent.parent.parent
WAIT = 45.0
SLOW_SECONDS = 1.0
CROWD = 20
LARGE_BYTES = 100 << 20


def _made_up(name: str) -> str:
    """Return a key as long as those of today, with every character that base64 has."""
    digest = b"".join(hashlib.sha512(f"{name} {n}".encode()).digest() for n in range(2))
    return "sk-proj-" + base64.b64encode(digest).decode().rstrip("=")


#: The key that the providers accept.
KEY = _made_up("right")
#: Another one, which they refuse as politely as the real ones: they say which key was wrong.
WRONG_KEY = _made_up("wrong")

USAGE = {
    "openai-compatible": (19, 2, 21),
    "anthropic": (19, 2, None),
    "google": (19, 2, 21),
    "ollama": (19, 2, None),
}


# --- what a request must be ---

Problems = list[str]


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _members(
    value: object, where: str, required: Mapping[str, Any], optional: Mapping[str, Any]
) -> Problems:
    """Compare an object with checks for its members; there may be no others."""
    if not isinstance(value, dict):
        return [f"{where}: no object"]
    found = [f"{where}.{name}: missing" for name in required if name not in value]
    for name, member in value.items():
        check = required.get(name, optional.get(name))
        if check is None:
            found.append(f"{where}.{name}: not in the protocol")
        elif not (check(member) if callable(check) else check == member):
            found.append(f"{where}.{name}: {json.dumps(member)[:200]}")
    return found


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_image(media_type: object, data: object) -> bool:
    try:
        content = base64.b64decode(str(data), validate=True)
    except ValueError:
        return False
    starts = {"image/png": b"\x89PNG\r\n\x1a\n", "image/jpeg": b"\xff\xd8\xff"}
    return content.startswith(starts.get(str(media_type), b"no such type"))


def _openai_content(parts: Any) -> bool:
    if not parts or parts[0] != {"type": "text", "text": parts[0].get("text")}:
        return False
    for part in parts[1:]:
        url = part["image_url"]["url"]
        match = re.fullmatch(r"data:([^;]+);base64,(.*)", url, re.DOTALL)
        if part != {"type": "image_url", "image_url": {"url": url}} or match is None:
            return False
        if not _is_image(*match.groups()):
            return False
    return isinstance(parts[0]["text"], str)


def _openai_messages(messages: Any) -> bool:
    roles = [message["role"] for message in messages]
    if roles not in (["user"], ["system", "user"]):
        return False
    return _openai_content(messages[-1]["content"]) and (
        len(messages) == 1 or isinstance(messages[0]["content"], str)
    )


def _openai(headers: Mapping[str, str], body: Any) -> Problems:
    limits = [name for name in ("max_tokens", "max_completion_tokens") if name in body]
    found = _members(
        body,
        "body",
        {
            **dict.fromkeys(limits, _whole),
            "model": _is_text,
            "messages": _openai_messages,
            "stream": False,
        },
        {"temperature": _number, "seed": _whole, "response_format": {"type": "json_object"}},
    )
    return found if len(limits) < 2 else [*found, f"body: limits {limits}"]


def _anthropic_messages(messages: Any) -> bool:
    ((_, content),) = [(message["role"], message["content"]) for message in messages]
    *images, text = content
    return (
        messages == [{"role": "user", "content": content}]
        and text == {"type": "text", "text": text["text"]}
        and all(
            image == {"type": "image", "source": {**image["source"], "type": "base64"}}
            and set(image["source"]) == {"type", "media_type", "data"}
            and _is_image(image["source"]["media_type"], image["source"]["data"])
            for image in images
        )
    )


def _anthropic(headers: Mapping[str, str], body: Any) -> Problems:
    found = _members(
        body,
        "body",
        {
            "model": _is_text,
            "messages": _anthropic_messages,
            "max_tokens": _whole,
            "stream": False,
        },
        {
            "temperature": _number,
            "system": _is_text,
            "tools": lambda tools: [tool["name"] for tool in tools] == ["json_out"],
            "tool_choice": {"type": "tool", "name": "json_out"},
        },
    )
    version = headers.get("anthropic-version")
    return found if version == "2023-06-01" else [*found, f"anthropic-version: {version}"]


def _google_contents(contents: Any) -> bool:
    (content,) = contents
    *images, text = content["parts"]
    return set(text) == {"text"} and all(
        set(image) == {"inline_data"}
        and _is_image(image["inline_data"]["mime_type"], image["inline_data"]["data"])
        for image in images
    )


def _google(headers: Mapping[str, str], body: Any) -> Problems:
    return _members(
        body,
        "body",
        {
            "generationConfig": lambda value: isinstance(value, dict),
            "contents": _google_contents,
        },
        {"system_instruction": lambda value: set(value) == {"parts"}},
    ) + _members(
        body.get("generationConfig"),
        "body.generationConfig",
        {"responseMimeType": lambda value: value in ("text/plain", "application/json")},
        {"temperature": _number, "maxOutputTokens": _whole, "seed": _whole},
    )


def _ollama(headers: Mapping[str, str], body: Any) -> Problems:
    return _members(
        body,
        "body",
        {
            "model": _is_text,
            "prompt": _is_text,
            "stream": False,
            "options": lambda value: isinstance(value, dict),
            "images": lambda images: all(
                _is_image("image/png", image) or _is_image("image/jpeg", image) for image in images
            ),
        },
        {"system": _is_text, "format": "json"},
    ) + _members(
        body.get("options"),
        "body.options",
        {},
        {"temperature": _number, "num_predict": _whole, "seed": _whole},
    )


#: For each kind: its path, the header with the key, and the check of the rest.
KINDS: dict[str, tuple[re.Pattern[str], str, Callable[[Mapping[str, str], Any], Problems]]] = {
    "openai-compatible": (re.compile(r"/v1/chat/completions"), "authorization", _openai),
    "anthropic": (re.compile(r"/v1/messages"), "x-api-key", _anthropic),
    "google": (re.compile(r"/v1beta/models/([^/:]+):generateContent"), "x-goog-api-key", _google),
    "ollama": (re.compile(r"/api/generate"), "", _ollama),
}


def problems_of(kind: str, headers: Mapping[str, str], body: Any) -> Problems:
    """Return what is wrong with a request."""
    found = []
    if headers.get("content-type") != "application/json":
        found.append(f"content-type: {headers.get('content-type')}")
    try:
        found += KINDS[kind][2](headers, body)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        found.append(f"{type(error).__name__}: {error}")
    return found


# --- answers ---


def answer_of(kind: str, text: str | None, *, cut: bool = False) -> dict[str, Any]:
    """Return a whole answer; ``None`` is how each kind says that there is no text."""
    if kind == "openai-compatible":
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None}
        return {
            "id": "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT",
            "object": "chat.completion",
            "created": 1741569952,
            "model": "gpt-4o-2024-08-06",
            "choices": [{**choice, "finish_reason": "length" if cut else "stop"}],
            "usage": {
                "prompt_tokens": 19,
                "completion_tokens": 2,
                "total_tokens": 21,
                "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            },
            "service_tier": "default",
        }
    if kind == "anthropic":
        return {
            "id": "msg_01XFDUDYJgAACzvnptvVoYEL",
            "type": "message",
            "role": "assistant",
            "model": "claude-sonnet-4-20250514",
            "content": [{"type": "text", "text": text or ""}],
            "stop_reason": "max_tokens" if cut else "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": 19, "output_tokens": 2, "service_tier": "standard"},
        }
    if kind == "google":
        content: dict[str, Any] = {"role": "model"}
        if text is not None:
            content["parts"] = [{"text": text}]
        reason = "MAX_TOKENS" if cut else "STOP"
        return {
            "candidates": [{"content": content, "finishReason": reason, "index": 0}],
            "usageMetadata": {
                "promptTokenCount": 19,
                "candidatesTokenCount": 2,
                "totalTokenCount": 21,
            },
            "modelVersion": "gemini-2.0-flash",
        }
    return {
        "model": "llama3.2",
        "created_at": "2025-01-01T00:00:00.000000Z",
        "response": text or "",
        "done": True,
        "done_reason": "length" if cut else "stop",
        "total_duration": 5043500667,
        "prompt_eval_count": 19,
        "eval_count": 2,
    }


def tool_answer_of(kind: str) -> dict[str, Any]:
    """Return an answer that calls a tool instead of saying something."""
    whole = answer_of(kind, None)
    if kind == "openai-compatible":
        function = {"name": "json_out", "arguments": '{"result": true}'}
        call = {"id": "call_1", "type": "function", "function": function}
        whole["choices"][0]["message"]["tool_calls"] = [call]
        whole["choices"][0]["finish_reason"] = "tool_calls"
    elif kind == "anthropic":
        call = {"type": "tool_use", "id": "toolu_1", "name": "json_out", "input": {"result": True}}
        whole |= {"content": [call], "stop_reason": "tool_use"}
    else:
        call = {"functionCall": {"name": "json_out", "args": {"result": True}}}
        whole["candidates"][0]["content"]["parts"] = [call]
    return whole


def error_of(kind: str, status: int, message: str) -> dict[str, Any]:
    """Return an error as each kind words it."""
    if kind == "openai-compatible":
        error = {"type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
        return {"error": {"message": message, **error}}
    if kind == "anthropic":
        error = {"type": "authentication_error", "message": message}
        return {"type": "error", "error": error, "request_id": "req_011CSHoEeqs5C35K2UUqR7Fy"}
    if kind == "google":
        return {"error": {"code": status, "message": message, "status": "UNAUTHENTICATED"}}
    return {"error": message}


class Asked:
    """A request in progress, and the ways in which it can be answered."""

    def __init__(
        self, server: Providers, request: Request, kind: str, body: Any, tag: str, parameter: str
    ) -> None:
        self.server = server
        self.request = request
        self.kind = kind
        self.body = body
        self.tag = tag
        self.parameter = parameter
        self.key = key_in(kind, request)
        self.sent = 0
        self.over = False
        self._calls: list[Any] = []

    def later(self, seconds: float, call: Callable[[], object]) -> None:
        """Do something unless the client is gone by then."""
        self._calls.append(self.server.reactor.callLater(seconds, call))

    def ended(self) -> None:
        """Stop everything."""
        self.over = True
        for call in self._calls:
            if isinstance(call, LoopingCall):
                if call.running:
                    call.stop()
            elif call.active():
                call.cancel()

    # The behaviours, named by models.

    def reply(self, status: int, body: object, headers: Mapping[str, str] | None = None) -> None:
        """Answer."""
        self.request.setResponseCode(status)
        self.request.setHeader("content-type", "application/json")
        for name, value in (headers or {}).items():
            self.request.setHeader(name, value)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.request.setHeader("content-length", str(len(data)))
        self.request.write(data)
        self.request.finish()

    def refuse(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        """Answer with an error."""
        self.reply(status, error_of(self.kind, status, message), headers)

    def success(self) -> None:
        self.reply(200, answer_of(self.kind, "OK"))

    def says(self) -> None:
        self.reply(200, answer_of(self.kind, self.parameter))

    def long(self) -> None:
        self.reply(200, answer_of(self.kind, "x" * int(self.parameter)))

    def _prompt(self) -> str:
        return str(self.body["messages"][-1]["content"][0]["text"])

    def echo(self) -> None:
        self.reply(200, answer_of(self.kind, self._prompt()))

    def keyless(self) -> None:
        # The only one that must be asked without a key.
        self.echo()

    def _at_gate(self, answer: Callable[[], None]) -> None:
        def opened(_: object) -> None:
            if not self.over:
                answer()

        self.server.say("held", tag=self.tag)
        self.server.gates[self.tag].addCallback(opened)

    def gate(self) -> None:
        self._at_gate(self.echo)

    def named(self) -> None:
        # Says its name, to the prompt "long" only once the gate is open.
        if self._prompt() == "long":
            self._at_gate(self.says)
        else:
            self.says()

    def slow(self) -> None:
        self.later(SLOW_SECONDS, self.success)

    def crowd(self) -> None:
        # As slow, but nobody is answered before so many are there.
        crowd = self.server.crowd
        crowd.append(self)
        if len(crowd) == CROWD:
            for one in crowd:
                one.slow()
            crowd.clear()

    def null(self) -> None:
        self.reply(200, answer_of(self.kind, None, cut=True))

    def tool(self) -> None:
        self.reply(200, tool_answer_of(self.kind))

    def gzipped(self) -> None:
        # The model is called gzipped.<coding>.<anything>.
        data = gzip.compress(json.dumps(answer_of(self.kind, "OK")).encode())
        self.reply(200, data, {"content-encoding": self.body["model"].split(".")[1]})

    def padded(self) -> None:
        # What follows a gzip file is no other one; it comes with its last bytes, and later.
        data = gzip.compress(json.dumps(answer_of(self.kind, "OK")).encode())
        self.request.setHeader("content-encoding", "gzip")
        self.request.write(data + b"\0")
        self.later(0.05, lambda: self.request.write(b"\0\0\0"))
        self.later(0.1, self.request.finish)

    def not_gzip(self) -> None:
        self.reply(200, answer_of(self.kind, "OK"), {"content-encoding": "gzip"})

    def bomb(self) -> None:
        # 256 MB in 256 kB.
        head, _, tail = json.dumps(answer_of(self.kind, "#")).encode().partition(b"#")
        packer = zlib.compressobj(wbits=31)
        pieces = [packer.compress(part) for part in (head, *[b"x" * (16 << 20)] * 16, tail)]
        data = b"".join([*pieces, packer.flush()])
        self.reply(200, data, {"content-encoding": "gzip"})

    def chunked(self) -> None:
        for byte in json.dumps(answer_of(self.kind, "OK")).encode():
            self.request.write(bytes([byte]))
        self.request.finish()

    def cookie(self) -> None:
        self.reply(200, answer_of(self.kind, "OK"), {"set-cookie": "session=1; Path=/"})

    def repeats_key(self) -> None:
        self.reply(200, answer_of(self.kind, f"<{self.key}>"))

    def status(self) -> None:
        self.refuse(int(self.parameter), f"refused {self.key}")

    def error(self) -> None:
        # The error of another provider within an answer, as gateways do it.
        error = {"code": int(self.parameter), "message": "Provider returned error"}
        self.reply(200, {"error": error})

    def unauthorized(self) -> None:
        self.refuse(401, "Incorrect API key provided. You can find your API key in your account.")

    def forbidden(self) -> None:
        self.refuse(403, "Country, region, or territory not supported")

    def not_found(self) -> None:
        self.refuse(404, "The model `no-such-model` does not exist or you do not have access to it")

    def rate_limited(self) -> None:
        self.refuse(429, "You exceeded your current quota", {"retry-after": "20"})

    def html(self) -> None:
        page = b"<html><head><title>500 Internal Server Error</title></head></html>"
        self.reply(500, page, {"content-type": "text/html"})

    def empty(self) -> None:
        self.reply(503, b"")

    def overloaded(self) -> None:
        self.refuse(529, "Overloaded")

    def broken(self) -> None:
        self.reply(200, json.dumps(answer_of(self.kind, "OK")).encode()[:-20])

    def nothing(self) -> None:
        self.reply(200, b"")

    def shape(self) -> None:
        self.reply(200, {"object": "list", "data": []})

    def not_object(self) -> None:
        self.reply(200, b"[1, 2, 3]")

    def deep(self) -> None:
        self.reply(200, b"[" * 100_000 + b"]" * 100_000)

    def no_content(self) -> None:
        self.request.setResponseCode(204)
        self.request.finish()

    def long_message(self) -> None:
        self.refuse(400, "\u0416" * 3000)

    def half_key(self) -> None:
        # The first 500 characters end within the key, wherever they are counted from.
        self.refuse(400, "\u0416" * (500 - len(self.key) // 2) + self.key + "\u0416" * 500)

    def key_many_times(self) -> None:
        self.refuse(400, " ".join([self.key] * 2000))

    def key_in_wrong_shape(self) -> None:
        self.reply(200, {"echo": f"{self.key}" * 100})

    def key_escaped(self) -> None:
        # PHP writes "/" like this.
        text = json.dumps({"reason": f"bad key {self.key}"}).replace("/", "\\/")
        self.reply(401, text.encode())

    def key_escaped_in_wrong_shape(self) -> None:
        self.reply(200, json.dumps({"reason": self.key}).replace("/", "\\/").encode())

    def key_in_header(self) -> None:
        self.request.responseHeaders.addRawHeader("x-echo", self.key)
        self.reply(500, f"key {self.key}".encode(), {"content-type": "text/plain"})

    def redirect(self) -> None:
        # The model is called redirect.<status>.<anything>.
        status = int(self.body["model"].split(".")[1])
        where = f"http://localhost:{self.server.ports['elsewhere']}{self.request.path.decode()}"
        self.reply(status, b"", {"location": where})

    def silent(self) -> None:
        """Never answer."""

    def trickle(self) -> None:
        """Answer a byte at a time, for ever."""
        whole = json.dumps(answer_of(self.kind, "#")).encode().partition(b"#")
        self.request.setHeader("content-type", "application/json")
        self.request.write(whole[0])
        loop = LoopingCall(self.request.write, b"x")
        self._calls.append(loop)
        loop.start(0.02)

    def large(self) -> None:
        """Answer with a body of 100 MB that would be fine if it were not that large."""
        head, _, tail = json.dumps(answer_of(self.kind, "#")).encode().partition(b"#")
        if "chunked" not in str(self.body.get("model")):
            length = len(head) + LARGE_BYTES + len(tail)
            self.request.setHeader("content-length", str(length))
        piece = b"x" * 65536
        left = itertools.chain([head], itertools.repeat(piece, LARGE_BYTES // len(piece)), [tail])
        asked = self

        class Pieces:
            def resumeProducing(self) -> None:
                data = next(left, None)
                if data is None:
                    asked.request.unregisterProducer()
                    asked.request.finish()
                else:
                    asked.sent += len(data)
                    asked.request.write(data)

            def stopProducing(self) -> None:
                pass

        self.request.registerProducer(Pieces(), False)

    def _transport(self) -> Any:
        return self.request.channel.transport

    def reset(self) -> None:
        _reset(self._transport())

    def reset_body(self) -> None:
        self.request.setHeader("content-length", "1000")
        self.request.write(b'{"choices": [')
        self.later(0.05, lambda: _reset(self._transport()))

    def short(self) -> None:
        self.request.setResponseCode(int(self.parameter or 200))
        self.request.setHeader("content-length", "1000")
        self.request.write(b'{"choices": [')
        self._transport().loseConnection()

    def close(self) -> None:
        self._transport().loseConnection()


def _reset(transport: Any) -> None:
    transport.getHandle().setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abortConnection()


def key_in(kind: str, request: Request) -> str:
    """Return the key that came with a request."""
    name = KINDS[kind][1] or "authorization"
    return (request.getHeader(name) or "").removeprefix("Bearer ")


class Providers(Resource):
    """All four kinds at once, told apart by their paths."""

    isLeaf = True

    def __init__(self, reactor: Any, say: Callable[..., None]) -> None:
        Resource.__init__(self)
        self.reactor = reactor
        self.say = say
        self.ports: dict[str, int] = {}
        self._count = itertools.count()
        self._open = 0
        self.crowd: list[Asked] = []
        self.gates: defaultdict[str, Deferred[object]] = defaultdict(Deferred)
        self._transports: set[Any] = set()

    def hang_up(self) -> None:
        """Close all connections, those that are kept for further requests included."""
        while self._transports:
            self._transports.pop().loseConnection()

    def render(self, request: Request) -> Any:
        """Look at a request and answer as its model's name says."""
        self._transports.add(request.channel.transport)
        if (request.method, request.uri) == (b"GET", b"/"):
            return b"Ollama is running"
        number = next(self._count)
        match = re.fullmatch(r"(?:/(\d+))?(/.*)", request.path.decode())
        tag, path = match.groups("") if match is not None else ("", "")
        headers = {
            name.decode().lower(): b", ".join(values).decode()
            for name, values in request.requestHeaders.getAllRawHeaders()
        }
        found: Problems = []
        kind = next((kind for kind, (form, *_) in KINDS.items() if form.fullmatch(path)), "")
        assert request.content is not None
        data = request.content.read()
        try:
            body = json.loads(data, parse_constant=lambda name: found.append(f"{name} in JSON"))
        except ValueError as error:
            body = {}
            found.append(f"body: {error}")
        if request.method != b"POST" or not kind or b"?" in request.uri:
            found.append(f"{request.method!r} {request.uri!r}")
        model = str(body.get("model"))
        if kind:
            found += problems_of(kind, headers, body)
            match = KINDS[kind][0].fullmatch(path)
            model = match.group(1) if match is not None and match.groups() else model
        self._open += 1
        self.say(
            "request",
            id=number,
            tag=tag,
            model=model,
            kind=kind,
            path=request.uri.decode(),
            headers=headers,
            body=body if len(data) < 100_000 else f"{len(data)} bytes",
            problems=found,
            open=self._open,
        )
        behaviour, _, parameter = model.partition(":")
        asked = Asked(self, request, kind or "ollama", body, tag, parameter)

        def over(failure: Failure | None) -> None:
            self._open -= 1
            asked.ended()
            what = "answered" if failure is None else "dropped"
            self.say(what, id=number, tag=tag, model=model, sent=asked.sent)

        request.notifyFinish().addCallbacks(lambda _: over(None), over)
        if found:
            asked.refuse(400, "; ".join(found))
        elif KINDS[kind][1] and asked.key != ("" if behaviour == "keyless" else KEY):
            asked.refuse(401, f"Incorrect API key provided: {asked.key}. Use another.")
        else:
            getattr(asked, behaviour.partition(".")[0])()
        return NOT_DONE_YET


class Elsewhere(Resource):
    """Another host: whatever arrives here should not have come."""

    isLeaf = True

    def __init__(self, say: Callable[..., None]) -> None:
        Resource.__init__(self)
        self._say = say

    def render(self, request: Request) -> bytes:
        """Say that somebody came."""
        self._say("elsewhere", path=request.uri.decode())
        return json.dumps(answer_of("openai-compatible", "from elsewhere")).encode()


class Raw(Protocol):
    """What no web server does."""

    transport: Any
    _loop: LoopingCall | None = None
    _requests = 0

    def __init__(self, say: Callable[..., None]) -> None:
        self._say = say
        self._data = b""
        self._what = ""

    def dataReceived(self, data: bytes) -> None:
        """Read the head of a request, and behave as the first word of its path says."""
        self._data += data
        if b"\r\n\r\n" not in self._data or not self._data.startswith(b"POST /"):
            return
        self._requests += 1
        head, _, body = self._data.partition(b"\r\n\r\n")
        self._data = b""
        words = head.split(b" ")[1].decode().split("/")
        self._what, tag = words[1], words[2]
        self._say("raw", what=self._what, tag=tag)
        getattr(self, f"do_{self._what}")(head, body)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Say that the client is gone."""
        if self._loop is not None:
            self._loop.stop()
        clean = reason.check(ConnectionDone) is not None
        self._say("raw_lost", what=self._what, clean=clean)

    def _trickle(self, head: bytes, piece: bytes) -> None:
        self.transport.write(head)
        self._loop = LoopingCall(self.transport.write, piece)
        self._loop.start(0.02)

    def do_deaf(self, head: bytes, body: bytes) -> None:
        # Answers before it has read the request, and never reads the rest of it.
        self.transport.pauseProducing()
        self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")

    def do_silent(self, head: bytes, body: bytes) -> None:
        """Never answer."""

    def do_trickle_head(self, head: bytes, body: bytes) -> None:
        self._trickle(b"HTTP/1.1 200 OK\r\nX-Long: ", b"x")

    def do_not_http(self, head: bytes, body: bytes) -> None:
        self.transport.write(b"SSH-2.0-OpenSSH_9.6\r\n")

    def do_old(self, head: bytes, body: bytes) -> None:
        answer = json.dumps(answer_of("openai-compatible", "OK")).encode()
        self.transport.write(b"HTTP/1.0 200 OK\r\n\r\n" + answer)
        self.transport.loseConnection()

    def do_stale(self, head: bytes, body: bytes) -> None:
        # A connection that was kept is closed just as the next request arrives.
        if self._requests > 1:
            self._say("stale")
            self.transport.loseConnection()
            return
        answer = json.dumps(answer_of("openai-compatible", "OK")).encode()
        length = b"Content-Length: %d" % len(answer)
        self.transport.write(b"HTTP/1.1 200 OK\r\n" + length + b"\r\n\r\n" + answer)


class Plain(Protocol):
    """A web server as it answers to what is no HTTP, such as a TLS handshake."""

    transport: Any

    def dataReceived(self, data: bytes) -> None:
        """Refuse."""
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        self.transport.loseConnection()


# --- certificates ---


def make_certificates(folder: Path) -> dict[str, Path]:
    """Make an authority and certificates, each with what is right or wrong about it.

    ``authority.pem`` is what a client trusts; the others hold a key and its certificate.
    """
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])

    def make(
        name: str, *, end: datetime.datetime, signed: bool = True, authority: bool = False
    ) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        key = authority_key if authority else ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names: list[x509.GeneralName] = [x509.DNSName(name)]
        if name == "localhost":
            names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
        builder = (
            x509.CertificateBuilder()
            .subject_name(authority_name if authority else subject)
            .issuer_name(authority_name if signed else subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 10 * day)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if not authority:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return key, builder.sign(authority_key if signed else key, hashes.SHA256())

    made = {
        "authority": make("test authority", end=now + day, authority=True),
        "right": make("localhost", end=now + day),
        "wrong_name": make("wrong.example", end=now + day),
        "expired": make("localhost", end=now - day),
        "self_signed": make("localhost", end=now + day, signed=False),
    }
    paths = {}
    for name, (key, certificate) in made.items():
        private = b""
        if name != "authority":
            private = key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        paths[name] = folder / f"{name}.pem"
        paths[name].write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return paths


def _tls_options(path: Path) -> CertificateOptions:
    private = PrivateCertificate.loadPEM(path.read_bytes())
    certificate = Certificate.loadPEM(path.read_bytes())
    return CertificateOptions(
        privateKey=private.privateKey.original,
        certificate=certificate.original,
    )


# --- the process ---


class _Commands(LineReceiver):
    """stdin: its lines come back, after all that was said before; its end is ours."""

    delimiter = b"\n"

    def __init__(self, reactor: Any, say: Callable[..., None], providers: Providers) -> None:
        self._reactor = reactor
        self._say = say
        self._providers = providers

    def lineReceived(self, line: bytes) -> None:
        """Do and say what was said to us."""
        _, order, *tag = line.decode().split(" ")
        if order == "hang_up":
            self._providers.hang_up()
        elif order == "open_gate" and not (gate := self._providers.gates[tag[0]]).called:
            gate.callback(None)
        self._say("mark", text=line.decode())

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The test is over."""
        self._reactor.stop()


def run(folder: Path) -> None:
    """Serve until stdin is closed."""
    from twisted.internet import reactor as installed
    from twisted.internet.stdio import StandardIO

    reactor: Any = installed
    channel: Any = None

    def say(event: str, **members: object) -> None:
        channel.write(json.dumps({"event": event, **members}).encode() + b"\n")

    providers = Providers(reactor, say)
    site = Site(providers)
    site.noisy = False
    elsewhere = Site(Elsewhere(say))
    raw = Factory.forProtocol(lambda: Raw(say))
    ports = providers.ports
    plain = Factory.forProtocol(Plain)
    factories = {"http": site, "elsewhere": elsewhere, "raw": raw, "plain": plain}
    for name, factory in factories.items():
        ports[name] = reactor.listenTCP(0, factory, 512, "127.0.0.1").getHost().port
    for name, path in make_certificates(folder).items():
        if name != "authority":
            port = reactor.listenSSL(0, site, _tls_options(path), interface="127.0.0.1")
            ports[name] = port.getHost().port
    channel = StandardIO(_Commands(reactor, say, providers))
    say("ready", ports=ports)
    reactor.run()


Event = dict[str, Any]


class FakeProviders:
    """The providers as the tests see them."""

    _count: ClassVar[itertools.count[int]] = itertools.count()

    def __init__(self, folder: Path) -> None:
        """Start them; certificates are put into ``folder``."""
        self.authority = folder / "authority.pem"
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._ended = False
        # A port that is taken and at which nobody listens.
        self._unused = socket.socket()
        self._unused.bind(("127.0.0.1", 0))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.fake_providers", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=PROJECT,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ports = self.wait("ready")["ports"]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self._events.append(json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def host(self, name: str = "http") -> str:
        """Return the ``host`` of a configuration."""
        if name == "refused":
            return f"http://127.0.0.1:{self._unused.getsockname()[1]}"
        scheme = "http" if name in ("http", "elsewhere", "raw", "plain") else "https"
        return f"{scheme}://127.0.0.1:{self._ports[name]}"

    def raw(self, behaviour: str) -> str:
        """Return a ``host`` at which nobody behaves; what happens there has its own tag."""
        return f"{self.host('raw')}/{behaviour}/{next(self._count)}"

    def model(self, behaviour: str) -> str:
        """Return a name of a model that nobody else asks for."""
        return f"{behaviour}.{next(self._count)}"

    def events(self, event: str, **members: object) -> list[Event]:
        """Return what happened so far, all that the providers know of included."""
        self.tell()
        return self._events_of(event, members)

    def tell(self, order: str = "") -> None:
        """Tell the providers what to do, and wait until they have done it."""
        line = f"{next(self._count)} {order}"
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(f"{line}\n".encode())
        stdin.flush()
        self.wait("mark", text=line)

    def _events_of(self, event: str, members: Mapping[str, object]) -> list[Event]:
        with self._changed:
            return [
                one
                for one in self._events
                if one["event"] == event and members.items() <= one.items()
            ]

    def wait(self, event: str, *, count: int = 1, **members: object) -> Event:
        """Wait until something has happened this often; returns the first time."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._ended or len(self._events_of(event, members)) >= count, WAIT
            )
            found = self._events_of(event, members)
        assert len(found) >= count, f"{event} {members}: {len(found)} times, expected {count}"
        return found[0]

    def hang_up(self) -> None:
        """Close the connections that were kept for further requests."""
        self.tell("hang_up")

    def requests(self, model: str) -> list[Event]:
        """Return the requests for a model."""
        return self.events("request", model=model)

    def close(self) -> None:
        """End them."""
        self._unused.close()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(WAIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            self._reader.join(WAIT)
            with contextlib.suppress(OSError):
                self._process.stdout.close()


class Provider:
    """An address at the providers for one test, and what happens there."""

    _count: ClassVar[itertools.count[int]] = itertools.count()

    def __init__(self, fakes: FakeProviders) -> None:
        self._fakes = fakes
        self._tag = str(next(self._count))
        self.url = f"{fakes.host()}/{self._tag}"

    def wait(self, event: str, count: int = 1) -> None:
        """Wait until something has happened here this often."""
        self._fakes.wait(event, count=count, tag=self._tag)

    @property
    def requests(self) -> list[Any]:
        """The bodies of the requests so far."""
        return [one["body"] for one in self._fakes.events("request", tag=self._tag)]

    def open_gate(self) -> None:
        """Answer what the gate holds, and from now on everything at once."""
        self._fakes.tell(f"open_gate {self._tag}")

    def config(self, *models: str, **changes: Any) -> dict[str, Any]:
        """Return a configuration with a backend for each model, asked in this order."""
        base = {"host": self.url, "provider": "openai-compatible", "key": KEY}
        able = {"supports_json": True, "supports_image": True}
        backends = {
            f"b{number}": {**base, "models": {model: able}} for number, model in enumerate(models)
        }
        return {"bind_address": "127.0.0.1:0", "backends": backends, **changes}


if __name__ == "__main__":
    run(Path(sys.argv[1]))
