"""Sections 3.1 and 3.2: a module's process, spoken to as executors and the manager do."""

from __future__ import annotations

import contextlib
import json
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from wsproto import ConnectionType, WSConnection
from wsproto.connection import Connection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Ping,
    Pong,
    TextMessage,
)

from genvm_manager import (
    HANDSHAKE_SECONDS,
    MESSAGE_MAX_BYTES,
    encode_calldata,
)

from .executor_client import HELLO, ok, prompt
from .fake_providers import KEY, FakeProviders, Provider
from .module_support import ModuleProcess, call, run_executor
from .support import (
    SOURCE,
    WAIT,
    Host,
    Root,
    cpu_of,
    memory_of,
    report,
    serving,
    timed,
)

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


@pytest.fixture(scope="module")
def echo(fakes: FakeProviders) -> Iterator[ModuleProcess]:
    """A process for many tests, whose model repeats what it is asked."""
    process = ModuleProcess.ready(Provider(fakes).config("echo"))
    yield process
    process.close()


@pytest.fixture
def start() -> Iterator[Callable[..., ModuleProcess]]:
    started: list[ModuleProcess] = []

    def begin(config: object, **setup: Any) -> ModuleProcess:
        started.append(ModuleProcess(config, **setup))
        started[-1].event("ready")
        return started[-1]

    yield begin
    for process in started:
        process.close()


Start = Callable[..., ModuleProcess]


# --- conversations ---


def test_a_conversation(start: Start, provider: Provider) -> None:
    module = start(provider.config("echo"))
    client = module.connect(path="/any/path?x=1")
    assert client.prompt("hello") == ok("hello")
    assert client.prompt('{"a": 1.0, "b": [0.5]}', response_format="json") == ok(
        {"a": 1, "b": ["0.5"]}
    )
    assert client.prompt("seen", images=[PNG, PNG]) == ok("seen")
    assert len(provider.requests[-1]["messages"][-1]["content"]) == 3
    stats = client.ask("GetStats")["Ok"]
    counted = stats["backends"]["b0"]["echo"]
    assert counted["requests"] == 3
    assert counted["total_tokens"] == 63
    assert stats["connections"] == 1
    assert client.leave() == 1000

    def told() -> bool:
        stats = [e["stats"] for e in module.events if e["event"] == "stats"]
        return any(one["backends"]["b0"]["echo"]["requests"] == 3 for one in stats)

    # What it tells each second may have come before the last request.
    module.until(told, "statistics")


def test_templates(start: Start, provider: Provider) -> None:
    module = start(provider.config('says:{"result": true}'))
    client = module.connect()

    def template(name: str, **variables: str) -> Any:
        payload = {"template": name, **variables}
        return client.ask({"PromptTemplate": {"payload": payload, "remaining_fuel_as_gen": 0}})

    answers = {"leader_answer": "#{principle}", "validator_answer": "B", "principle": "P"}
    assert template("EqComparative", **answers) == ok(True)
    message = provider.requests[-1]["messages"][-1]["content"][0]["text"]
    assert "#{principle}" in message
    parts = {"task": "T", "criteria": "C", "input": "I"}
    assert template("EqNonComparativeValidator", **parts, output="O") == ok(True)
    assert template("EqNonComparativeLeader", **parts) == ok('{"result": true}')
    assert "INVALID_REQUEST" in template("EqComparative")["FatalError"]
    assert "INVALID_REQUEST" in template("Unknown")["FatalError"]


def test_text_frames_fragments_and_pings(echo: ModuleProcess) -> None:
    client = echo.connect(hello=None)
    client.send_event(TextMessage(data=encode_calldata(HELLO).decode()))
    client.send_event(TextMessage(data=encode_calldata("GetStats").decode()))
    assert "Ok" in client.receive()
    data = encode_calldata(prompt("in pieces"))
    for byte in data[:-1]:
        client.send_event(BytesMessage(data=bytes((byte,)), message_finished=False))
    client.send_event(Ping(payload=b"in the middle"))
    pong = client.event()
    assert isinstance(pong, Pong)
    assert pong.payload == b"in the middle"
    client.send_bytes(data[-1:])
    assert client.receive() == ok("in pieces")


def test_hello_in_the_same_segment_as_the_handshake(echo: ModuleProcess) -> None:
    frames = Connection(ConnectionType.CLIENT)
    early = frames.send(BytesMessage(data=encode_calldata(HELLO)))
    early += frames.send(BytesMessage(data=encode_calldata(prompt("early"))))
    client = echo.connect(hello=None, early=bytes(early))
    assert client.receive() == ok("early")


def test_genvm_id_stands_in_for_the_cookie(start: Start, provider: Provider) -> None:
    module = start(provider.config("status:500"))
    client = module.connect({"genvm_id": 17, "host_data": {}})
    client.prompt("x")
    assert module.logged("a request failed")["genvm_id"] == 17


@pytest.mark.parametrize(
    "hello",
    [
        b"\x07",
        encode_calldata("GetStats"),
        encode_calldata({"cookie": "c1"}),
        encode_calldata({"host_data": {}}),
        encode_calldata({"cookie": 1, "host_data": {}}),
        encode_calldata({"genvm_id": True, "host_data": {}}),
        b"",
    ],
)
def test_a_wrong_hello_ends_the_conversation(echo: ModuleProcess, hello: bytes) -> None:
    client = echo.connect(hello=None)
    client.send_bytes(hello)
    assert client.closed() == 1008
    assert echo.logged("a connection did not begin with a hello")["level"] == "warn"


def test_wrong_messages_are_answered_and_the_connection_stays(echo: ModuleProcess) -> None:
    client = echo.connect()
    for data in (b"\x07", b"\xff" * 10, b"", encode_calldata(5), encode_calldata({})):
        client.send_bytes(data)
        assert client.receive()["FatalError"].startswith(
            'ModuleError { causes: ["INVALID_REQUEST"], fatal: true, ctx: {"error": Str("'
        )
    unknown = (
        'ModuleError { causes: ["UNKNOWN_REQUEST"], fatal: true, ctx: {"request": Str("Do")} }'
    )
    assert client.ask("Do") == {"FatalError": unknown}
    assert client.ask({"Do": {"payload": {}}}) == {"FatalError": unknown}
    for request in (
        {"Prompt": None},
        {"Prompt": {"payload": "x"}},
        prompt("x", response_format="yaml"),
        prompt("x", images="x"),
        prompt(cast(str, 5)),
    ):
        assert "INVALID_REQUEST" in client.ask(request)["FatalError"]
    assert client.prompt("x", images=[PNG] * 3) == {
        "UserError": {"causes": ["TOO_MANY_IMAGES"], "ctx": {"count": 3, "limit": 2}}
    }
    assert client.prompt("x", images=[PNG, b"GIF89a"]) == {
        "UserError": {"causes": ["INVALID_IMAGE"], "ctx": {"index": 1}}
    }
    assert client.prompt("still here") == ok("still here")


def test_early_requests_wait_and_are_answered_in_order(start: Start, provider: Provider) -> None:
    module = start(provider.config("gate"))
    client = module.connect()
    for text in ("one", "two", "three"):
        client.send(prompt(text))
    client.send("GetStats")
    provider.open_gate()
    assert [client.receive() for _ in range(3)] == [ok("one"), ok("two"), ok("three")]
    assert client.receive()["Ok"]["backends"]["b0"]["gate"]["requests"] == 3


def test_too_many_early_requests_end_the_conversation(start: Start, provider: Provider) -> None:
    module = start(provider.config("silent"))
    client = module.connect()
    for _ in range(6):
        client.send(prompt("x"))
    assert client.closed() == 1008
    assert module.logged("an executor sent too many requests at once")["cookie"] == "c1"


# --- limits ---


def test_a_message_of_64_mib_is_taken_in_linear_time(echo: ModuleProcess) -> None:
    size = MESSAGE_MAX_BYTES - 1000
    whole = BytesMessage(data=encode_calldata(prompt("x" * size, images=0)))
    # Calldata of this size contains its length, which is no UTF-8: as text it is a wrong value.
    for message, reason in (
        (whole, "images"),
        (TextMessage(data=" " * size), "an unknown type"),
    ):
        client = echo.connect()
        data = client.encode(message)
        used = cpu_of(echo.process.pid)
        client.send_raw(data)
        assert reason in client.receive()["FatalError"]
        used = cpu_of(echo.process.pid) - used
        report(f"64 MiB as {type(message).__name__}: {used:.2f} s of a processor (goal 2 s)")
        assert used < 20
        client.close()


def test_a_message_that_is_too_large_is_not_read(start: Start, provider: Provider) -> None:
    module = start(provider.config("echo"))
    other = module.connect()
    other.prompt("x")
    before = memory_of(module.process.pid)
    whole = module.connect()
    with contextlib.suppress(OSError):  # it may close before everything is sent
        whole.send_bytes(bytes(65 << 20))
    event = whole.event()
    assert isinstance(event, CloseConnection)
    assert event.code == 1009
    grown = memory_of(module.process.pid) - before
    report(f"a message of 65 MiB: the module grows by {grown >> 20} MiB")
    assert grown < 32 << 20
    pieces = module.connect()
    part = bytes(1 << 20)
    for sent in range(100):
        pieces.send_event(BytesMessage(data=part, message_finished=False))
        if sent >= 64 and select.select([pieces.socket], [], [], WAIT)[0]:
            break
    assert pieces.closed() == 1009
    assert sent == 64
    grown = memory_of(module.process.pid) - before
    report(f"a message of 65 MiB in pieces: the module grows by {grown >> 20} MiB")
    assert grown < 200 << 20
    assert other.prompt("and the others go on") == ok("and the others go on")
    assert not [r for r in module.records if r["level"] == "error"]


def test_frames_that_are_wrong_end_the_conversation(echo: ModuleProcess) -> None:
    seen = len(echo.records)
    for raw, code in (
        (b"\x83\x80\0\0\0\0", 1002),  # an opcode that does not exist
        (b"\x82\x01x", 1002),  # not masked
        (b"\xc2\x80\0\0\0\0", 1002),  # a reserved bit
        (b"\x81\x81\0\0\0\0\xff", 1007),  # text that is not UTF-8
        (b"\x88\x82\0\0\0\0\x03\xe8" + b"\x89\x80\0\0\0\0" * 3, 1000),  # frames after the end
    ):
        client = echo.connect()
        client.send_raw(raw)
        assert client.closed() == code, raw
        client.close()
    client = echo.connect()
    client.prompt("x")
    client.send_event(CloseConnection(code=1000))
    client.send_raw(b"\x82\x80\0\0\0\0" * 100)
    assert client.closed() == 1000
    assert not [r for r in echo.records[seen:] if r["level"] in ("error", "warn")]


def test_a_client_that_does_not_read_does_not_grow_the_module(echo: ModuleProcess) -> None:
    client = echo.connect()
    before = memory_of(echo.process.pid, "VmRSS")
    client.socket.settimeout(1.0)
    pings = (b"\x89\xfd\0\0\0\0" + bytes(125)) * 8000
    with contextlib.suppress(TimeoutError):
        for _ in range(400):
            client.send_raw(pings)
    grown = memory_of(echo.process.pid, "VmRSS") - before
    report(f"a client that does not read its pongs: the module grows by {grown >> 20} MiB")
    assert grown < 100 << 20, "400 MB were to be sent"
    other = echo.connect()
    assert other.prompt("x") == ok("x")
    client.close()


UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
        (b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\nxxx", b"400"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nOrigin: http://a.b\r\n\r\n", b"403"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nOrigin: null\r\n\r\n", b"403"),
        (UPGRADE + b"Origin: http://a.b\r\n\r\n", b"403"),
        (UPGRADE + b"oRIGIN:http://127.0.0.1:80\r\n\r\n", b"403"),
        (UPGRADE + b"Origin: http://[::1]:3031\r\n\r\n", b"403"),
        (UPGRADE + b"Origin:\r\n\r\n", b"403"),
        (UPGRADE.replace(b"Host: x\r\n", b"") + b"\r\n", b"400"),
        (UPGRADE.replace(b"Host: x", b"Host: \xff") + b"\r\n", b"400"),
        (UPGRADE.replace(b"Version: 13", b"Version: 8") + b"\r\n", b"400"),
        (UPGRADE.replace(b"Key", b"Lock") + b"\r\n", b"400"),
        (UPGRADE.replace(b"Connection", b"Correction") + b"\r\n", b"400"),
        (UPGRADE.replace(b"GET", b"PUT") + b"\r\n", b"400"),
        (b"nonsense\r\n\r\n", b"400"),
    ],
)
def test_what_is_not_websocket_is_refused(
    echo: ModuleProcess, request_bytes: bytes, status: bytes
) -> None:
    with socket.create_connection(echo.address, WAIT) as plain:
        plain.sendall(request_bytes)
        answer = bytearray()
        while data := plain.recv(4096):
            answer += data
    assert answer.split(b" ")[1] == status
    assert len(answer) < 1000


def test_an_endless_head_is_cut_off(echo: ModuleProcess) -> None:
    with socket.create_connection(echo.address, WAIT) as plain:
        with contextlib.suppress(OSError):
            for _ in range(100):
                plain.sendall(b"x" * 1024)
        with contextlib.suppress(ConnectionResetError):
            assert plain.recv(100) == b""


def test_idle_is_allowed_and_dawdling_is_not(echo: ModuleProcess) -> None:
    client = echo.connect()
    with socket.create_connection(echo.address, WAIT) as plain:
        begin = time.monotonic()
        plain.sendall(b"GET / HTTP/1.1\r\n")
        for _ in range(3):
            assert not select.select([plain], [], [], 1)[0]
            plain.sendall(b"X: y\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert plain.recv(100) == b""
        timed("dawdling over a handshake", time.monotonic() - begin, HANDSHAKE_SECONDS)
    assert client.prompt("still here") == ok("still here")


# --- providers ---


def test_handing_over(start: Start, provider: Provider) -> None:
    module = start(provider.config("status:429", "status:500", "error:429", "echo"))
    client = module.connect()
    assert client.prompt("fourth") == ok("fourth")
    stats = client.ask("GetStats")["Ok"]["backends"]
    assert stats["b0"]["status:429"]["errors"] == {"rate_limited": 1}
    assert stats["b1"]["status:500"]["errors"] == {"http": 1}
    assert stats["b2"]["error:429"]["errors"] == {"rate_limited": 1}


def test_the_next_model_of_a_backend_is_asked_first(start: Start, provider: Provider) -> None:
    config = provider.config("a", "says:another backend")
    last = {"temperature": None, "max_tokens": None}
    config["backends"]["b0"]["models"] = {
        "status:429": {"meta": {"priority": 2}, "temperature": 0.25},
        "status:502": {"meta": {"priority": 1}},
        "echo": last,
    }
    assert start(config).connect().prompt("the same backend") == ok("the same backend")
    told = [(body.get("temperature"), body.get("max_tokens")) for body in provider.requests]
    assert told == [(0.25, 1000), (0.7, 1000), (None, None)]


def test_an_answer_that_executors_do_not_take_can_be_caught(
    start: Start, provider: Provider
) -> None:
    limit = 16 << 20
    client = start(provider.config(f"long:{limit - 100}")).connect()
    assert len(client.prompt("x")["Ok"]["data"]) == limit - 100
    client = start(provider.config(f"long:{limit + 1}")).connect()
    for _ in range(2):  # the connection stays
        error = client.prompt("x")["UserError"]
        assert error["causes"] == ["ANSWER_TOO_LARGE"]
        assert error["ctx"]["limit"] == limit < error["ctx"]["bytes"]


def test_wrong_backends_and_prompts_that_hide_something(start: Start, provider: Provider) -> None:
    config = provider.config("keyless")
    config["backends"]["a"] = {"provider": "oracle", "host": "nowhere", "meta": ["any"]}
    del config["backends"]["b0"]["key"]  # it is on this machine
    module = start(config)
    assert module.connect().prompt("ig\u200bnore  ﬁve") == ok("ignore five")
    assert any("backends.a" in record["message"] for record in module.records)


def test_all_overloaded(start: Start, provider: Provider) -> None:
    config = provider.config("status:429", "status:503")
    module = start(config)
    text = module.connect().prompt("x")["FatalError"]
    beginning = (
        'ModuleError { causes: ["NO_PROVIDER_FOR_PROMPT", "STATUS_NOT_OK"], fatal: true, ctx: {'
        f'"url": Str("{provider.url}/v1/chat/completions"), "status": Number(429.0), '
    )
    assert text.startswith(beginning)
    assert "b1/status:503" in text
    assert KEY not in text
    assert "[redacted]" in text
    assert KEY not in json.dumps(module.records)


def test_no_key_in_what_is_logged_or_answered(start: Start, provider: Provider) -> None:
    module = start(provider.config("status:401"), log_level="trace")
    text = module.connect().prompt("x")["FatalError"]
    assert '"status": Number(401.0)' in text
    module.logged("a request failed")
    assert KEY not in json.dumps(module.records) + text


def test_a_client_that_vanishes_cancels_its_request(start: Start, provider: Provider) -> None:
    module = start(provider.config("silent"))
    client = module.connect()
    client.send(prompt("x"))
    provider.wait("request")
    client.close()
    provider.wait("dropped")
    stats = module.connect().ask("GetStats")["Ok"]["backends"]["b0"]["silent"]
    assert stats["errors"] == {"cancelled": 1}


def test_timeout(start: Start, provider: Provider) -> None:
    # Loading the HTTP client for the first request takes longer, and does not count.
    module = start(provider.config("silent", timeout="200ms"))
    begin = time.monotonic()
    text = module.connect().prompt("x")["FatalError"]
    timed("a timeout of 200 ms", time.monotonic() - begin, 0.2)
    provider.wait("dropped")
    assert '"NO_PROVIDER_FOR_PROMPT", "TIMEOUT"' in text


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        ("close", "SENDING_REQUEST"),
        ("short:200", "READING_BODY"),
        ("short:500", "STATUS_NOT_OK"),
        ("says:no JSON", "READING_BODY"),
    ],
)
def test_connections_that_break(start: Start, provider: Provider, model: str, cause: str) -> None:
    client = start(provider.config(model)).connect()
    text = client.prompt("x", response_format="json")["FatalError"]
    assert f'"NO_PROVIDER_FOR_PROMPT", "{cause}"]' in text
    told = "no JSON" if model.startswith("says") else ""
    if cause == "READING_BODY":
        assert f'"status": Number(200.0), "body": Str("{told}")' in text


def test_two_hundred_connections_at_once(start: Start, provider: Provider) -> None:
    module = start(provider.config("gate"))
    clients = [module.connect({**HELLO, "cookie": f"c{n}"}) for n in range(200)]
    for number, client in enumerate(clients):
        client.send(prompt(f"text {number}"))
    provider.wait("held", len(clients))  # all of them are asked together
    other = module.connect()
    assert "Ok" in other.ask("GetStats")
    provider.open_gate()
    for number, client in enumerate(clients):
        assert client.receive() == ok(f"text {number}")
    for client in clients:
        client.close()


# --- the manager's side ---


def test_drain(start: Start, provider: Provider) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        module = start(provider.config("gate"), listener=listener)
        client, idle = module.connect(), module.connect()
        client.send(prompt("last words"))
        assert "Ok" in idle.ask("GetStats")
        module.process.send_signal(signal.SIGTERM)
        module.logged("draining")
        # The socket is still there, for another generation to accept from.
        waiting = socket.create_connection(module.address, WAIT)
        provider.open_gate()
        assert client.receive() == ok("last words")
        assert idle.prompt("me too") == ok("me too")
        assert client.leave() == 1000
        assert module.process.poll() is None
        idle.close()
        assert module.wait() == 0
        last = module.events[-1]
        assert last["stats"]["connections"] == 0
        assert last["stats"]["backends"]["b0"]["gate"]["requests"] == 2
        other = start(provider.config("echo"), listener=listener)
        other.connect().prompt("x")
        waiting.close()


def test_drain_with_nothing_open(start: Start, provider: Provider) -> None:
    module = start(provider.config("echo"))
    module.process.send_signal(signal.SIGTERM)
    module.process.send_signal(signal.SIGTERM)
    assert module.wait() == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(module.address, WAIT)


def test_two_generations_share_a_socket(start: Start, provider: Provider) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        old = start(provider.config("says:old"), listener=listener)
        kept = old.connect()
        new = start(provider.config("says:new"), listener=listener)
        old.process.send_signal(signal.SIGTERM)
        old.logged("draining")
        answers = []
        for _ in range(100):
            client = new.connect()
            answers.append(client.prompt("x"))
            client.close()
        # What the old one had accepted by then it still answers.
        assert answers[-1] == ok("new")
        assert all(answer in (ok("old"), ok("new")) for answer in answers)
        assert kept.prompt("x") == ok("old")
        kept.close()
        assert old.wait() == 0


def test_end_of_the_manager_is_the_end(start: Start, provider: Provider) -> None:
    module = start(provider.config("silent"))
    client = module.connect()
    client.send(prompt("x"))
    provider.wait("request")
    assert module.process.stdin is not None
    begin = time.monotonic()
    module.process.stdin.close()
    assert module.wait() == 0
    timed("the end of a module whose manager is gone", time.monotonic() - begin, 1.0)
    assert client.socket.recv(1) == b""


def test_sigint_is_for_the_manager(echo: ModuleProcess) -> None:
    echo.process.send_signal(signal.SIGINT)
    assert echo.connect().prompt("x") == ok("x")


def test_log_level(echo: ModuleProcess) -> None:
    echo.connect().prompt("x")
    echo.tell({"log_level": "debug"})
    echo.tell({"log_level": "no such level"})
    echo.logged("the manager sent an unknown order")
    assert echo.connect({"cookie": "c2", "host_data": {}}).prompt("x") == ok("x")
    record = echo.logged("an executor connected")
    assert record["level"] == "debug"
    assert record["cookie"] == "c2"
    echo.tell([])
    echo.logged("the manager sent a line that is not a JSON object")


@pytest.mark.parametrize("size", [0, 16 << 20])
def test_an_order_right_behind_the_setup(provider: Provider, size: int) -> None:
    """Even if both are read at once; byte by byte, the larger setup would take 7 s."""
    module = ModuleProcess({**provider.config("echo"), "padding": "x" * size})
    try:
        module.tell({"log_level": "debug"})
        module.event("ready")
        used = cpu_of(module.process.pid)
        report(f"a module with a setup of {size >> 20} MiB: {used:.2f} s of a processor")
        assert used < 4
        assert module.connect().prompt("x") == ok("x")
        module.logged("an executor connected")
    finally:
        module.close()


def test_ipv6(start: Start, provider: Provider) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        module = start(provider.config("echo"), listener=listener)
        assert module.connect().prompt("x") == ok("x")


def bad_configurations() -> Iterator[tuple[dict[str, Any], str]]:
    good = {"host": "http://x", "provider": "openai-compatible", "key": KEY, "models": {"m": {}}}
    yield {}, "backends: none can be used (backends is empty)"
    yield {"backends": {"a": {**good, "key": ""}}}, "backends.a: it has no key; left out"
    yield {"backends": {"a": {**good, "provider": "x"}}}, 'backends.a.provider: unknown "x"'
    yield {"backends": {"a": {**good, "key": KEY + "\n"}}}, "backends.a.key: has characters"


@pytest.mark.parametrize(("config", "reason"), list(bad_configurations()))
def test_bad_configurations(config: dict[str, Any], reason: str) -> None:
    module = ModuleProcess(config)
    try:
        assert module.wait() == 1
    finally:
        module.close()
    assert module.events == []
    (record,) = module.records
    assert record["level"] == "error"
    assert reason in record["message"]
    assert KEY.strip() not in json.dumps(record)


def test_keys_are_secrets_before_anything_can_go_wrong() -> None:
    key = "key/with/slashes"
    backend = {"host": "http://x", "provider": key, "key": key, "models": {"m": {}}}
    module = ModuleProcess({"backends": {"a": backend}})
    try:
        assert module.wait() == 1
    finally:
        module.close()
    (record,) = module.records
    assert 'backends.a.provider: unknown "[redacted]"' in record["message"]
    assert "slashes" not in json.dumps(record)


def test_empty_backends_are_allowed_on_request(start: Start) -> None:
    module = start({}, allow_empty_backends=True)
    client = module.connect()
    assert client.prompt("x") == {
        "FatalError": 'ModuleError { causes: ["NO_PROVIDER_FOR_PROMPT"], fatal: true, '
        'ctx: {"reason": Str("no backend has a model for text answers")} }'
    }


def test_a_line_that_is_no_setup_and_none_at_all() -> None:
    for line, status in ((b"no JSON\n", 1), (b'{"config": 1}\n', 1), (b"half a li", 0), (b"", 0)):
        ended = subprocess.run(
            [sys.executable, str(SOURCE), "module-process", "llm"],
            input=line,
            capture_output=True,
            timeout=WAIT,
            check=False,
        )
        assert ended.returncode == status
        assert ended.stdout == b""
        assert (b"not a module's setup" in ended.stderr) == (status == 1)


def test_a_descriptor_that_is_no_listener(provider: Provider) -> None:
    with socket.socket() as unbound:
        unbound.bind(("127.0.0.1", 0))
        module = ModuleProcess(provider.config("echo"), listener=unbound)
        try:
            assert module.wait() == 1
        finally:
            module.close()
    assert "not a listening socket" in module.records[0]["message"]


# --- with the practice executor ---


@pytest.fixture
def place() -> Iterator[Root]:
    made = Root()
    yield made
    made.close()


def test_contract_executor_module_provider_host(
    start: Start, provider: Provider, place: Root
) -> None:
    module = start(provider.config("echo"), log_level="debug")
    address = "ws://{}:{}".format(*module.address)
    script = 'ask-llm Is it so?\nstore told "$last"\nask-llm-json {"a": [1, 0.5]}\n'
    script += 'return ["$storage.told", "$last"]\n'
    outcome, log = call(place, script, address)
    assert outcome == ("return", ["Is it so?", {"a": [1, "0.5"]}])
    assert "statistics" not in log
    assert module.logged("an executor connected")["cookie"] == "c77"
    module.logged("an executor disconnected")
    assert len([r for r in module.records if r["message"] == "an executor connected"]) == 1


def test_the_practice_executor_when_things_go_wrong(
    start: Start, provider: Provider, place: Root
) -> None:
    module = start(provider.config("status:401"))
    address = "ws://{}:{}".format(*module.address)
    (kind, text), _ = call(place, "ask-llm x\n", address)
    assert kind == "vm_error"
    assert '"status": Number(401.0)' in text
    (kind, text), _ = call(place, "ask-llm x\n", address, "--permissions", "rws")
    assert (kind, text) == ("vm_error", "forbidden: non-deterministic work without permission 'n'")
    (kind, text), _ = call(place, "ask-llm x\n", "http://127.0.0.1:1")
    assert kind == "vm_error"
    assert "expected ws://host:port" in text
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    (kind, text), _ = call(place, "ask-llm x\n", f"ws://127.0.0.1:{port}")
    assert kind == "vm_error"
    assert "refused" in text


def test_an_answer_that_is_too_large_for_an_executor(
    start: Start, provider: Provider, place: Root
) -> None:
    module = start(provider.config(f"long:{17 << 20}"))
    (kind, told), _ = call(place, "ask-llm x\n", "ws://{}:{}".format(*module.address))
    assert (kind, told["message"]) == ("user_error", "ANSWER_TOO_LARGE")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            wire = WSConnection(ConnectionType.SERVER)
            with connection, contextlib.suppress(OSError):  # it may leave before everything is sent
                wire.receive_data(connection.recv(4096))
                connection.sendall(wire.send(AcceptConnection()))
                connection.sendall(wire.send(BytesMessage(data=bytes((16 << 20) + 1))))
                while connection.recv(4096):
                    pass

        other = threading.Thread(target=answer)
        other.start()
        (kind, text), _ = call(place, "ask-llm x\n", f"ws://127.0.0.1:{listener.getsockname()[1]}")
        other.join()
    assert kind == "vm_error"
    assert "too large" in text


def test_a_practice_run_can_be_cancelled_while_it_asks(
    start: Start, provider: Provider, place: Root
) -> None:
    module = start(provider.config("silent"))
    address = "ws://{}:{}".format(*module.address)
    with serving(Host(place.path / "host", "on method m\nask-llm x\n")) as host:
        host.calls({"method": "m", "args": [], "kwargs": {}})
        process = run_executor(place, host, address)
        provider.wait("request")
        process.terminate()
        process.communicate(timeout=WAIT)
        assert process.returncode == 0
        assert host.outcome() == ("vm_error", "timeout")
    provider.wait("dropped")
