"""The embedded host, without a network, and deployment writes."""

from __future__ import annotations

import hashlib
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from genvm_manager import (
    CODE_SLOT,
    HOST_BLOB_LIMIT,
    HostFactory,
    HostOutcome,
    HostProtocol,
    HostProtocolError,
    HostSession,
    HostState,
    HostStorage,
    InvalidRequest,
    decode_calldata,
    deployment_writes,
    describe_outcome,
    encode_calldata,
)

from .support import observing

ME = b"\x01" * 20
OTHER = b"\x02" * 20
SLOT = b"\x05" * 32
CALLDATA = encode_calldata({"method": "get", "args": []})


def u32(number: int) -> bytes:
    return number.to_bytes(4, "little")


def blob(data: bytes) -> bytes:
    return u32(len(data)) + data


def storage_read(index: int, length: int, account: bytes = ME, slot: bytes = SLOT) -> bytes:
    return b"\x01\x00" + account + slot + u32(index) + u32(length)


def storage_write(index: int, data: bytes, slot: bytes = SLOT) -> bytes:
    return b"\x02" + slot + u32(index) + blob(data)


RESULT = b"\x03" + blob(b"\x00" + encode_calldata("done"))

# Method: (request, answer of a writable host, answer of a read-only host).
EXCHANGES: dict[str, tuple[bytes, bytes, bytes]] = {
    "get_calldata": (b"\x00", b"\x00" + blob(CALLDATA), b"\x00" + blob(CALLDATA)),
    "storage_read": (storage_read(7, 3), b"\x00abc", b"\x00abc"),
    "storage_write": (storage_write(0, b"xyz"), b"\x00", b"\x02"),
    "get_leader_nondet_result": (b"\x04" + u32(9), b"\x03", b"\x03"),
    "post_nondet_result": (b"\x05" + u32(9) + blob(b"r"), b"\x00", b"\x02"),
    "post_message": (b"\x06" + OTHER + blob(b"c") + blob(b"{}"), b"\x00", b"\x02"),
    "post_event": (b"\x07\x02" + SLOT * 2 + blob(b"e"), b"\x00", b"\x02"),
    "consume_fuel": (b"\x08" + (5).to_bytes(8, "little"), b"", b""),
    "deploy_contract": (b"\x09" + blob(b"c") + blob(b"code") + blob(b"{}"), b"\x00", b"\x02"),
    "eth_call": (b"\x0a" + OTHER + blob(b"c"), b"\x01", b"\x01"),
    "eth_send": (b"\x0b" + OTHER + blob(b"c") + blob(b"{}"), b"\x00", b"\x02"),
    "get_balance": (b"\x0c" + OTHER, b"\x00" + bytes(32), b"\x00" + bytes(32)),
    "remaining_fuel_as_gen": (
        b"\x0d",
        b"\x00" + (1000).to_bytes(8, "little"),
        b"\x00" + (1000).to_bytes(8, "little"),
    ),
    "notify_nondet_disagreement": (b"\x0e" + u32(9), b"", b""),
    "consume_result": (RESULT, b"\x00", b"\x00"),
}


def make_state(*, writable: bool = False) -> HostState:
    state = HostState(contract=ME, calldata=CALLDATA, writable=writable, fuel=1000)
    state.storage.write(ME, SLOT, 7, b"abc")
    return state


def drain(session: HostSession) -> bytes:
    answers = bytearray()
    while (answer := session.step()) is not None:
        answers += answer
    return bytes(answers)


class Peer:
    """A HostFactory with one connection on a StringTransport."""

    def __init__(
        self,
        state: HostState | None = None,
        transport: type[StringTransport] = StringTransport,
        **options: Any,
    ) -> None:
        self.clock = Clock()
        self.make_transport = transport
        self.state = state or make_state()
        self.factory = HostFactory(self.state, self.clock, **options)
        self.results: list[HostOutcome | Failure] = []
        self.factory.done.wait().addBoth(self.results.append)
        self.transport, self.protocol = self.connect()

    def connect(self) -> tuple[StringTransport, HostProtocol]:
        protocol = self.factory.buildProtocol(None)
        assert protocol is not None
        transport = self.make_transport()
        protocol.makeConnection(transport)
        return transport, protocol

    def problem(self) -> str:
        (result,) = self.results
        assert isinstance(result, Failure)
        result.trap(HostProtocolError)
        return result.getErrorMessage()

    def hang_up(self) -> None:
        self.protocol.connectionLost(Failure(ConnectionDone()))


def test_the_exchanges_below_cover_every_method() -> None:
    assert sorted(request[0] for request, _, _ in EXCHANGES.values()) == list(range(15))


@pytest.mark.parametrize("method", EXCHANGES)
@pytest.mark.parametrize("writable", [True, False])
def test_answer(method: str, writable: bool) -> None:
    request, writable_answer, readonly_answer = EXCHANGES[method]
    session = HostSession(make_state(writable=writable))
    session.feed(request)
    assert session.step() == (writable_answer if writable else readonly_answer)
    assert session.step() is None
    assert session.state.requests == {method: 1}
    assert (session.outcome is not None) == (method == "consume_result")


@pytest.mark.parametrize("method", EXCHANGES)
def test_request_split_at_every_byte(method: str) -> None:
    request, answer, _ = EXCHANGES[method]
    for cut in range(1, len(request)):
        session = HostSession(make_state(writable=True))
        session.feed(request[:cut])
        assert session.step() is None
        session.feed(request[cut:])
        assert session.step() == answer


def test_whole_conversation_byte_by_byte() -> None:
    session = HostSession(make_state(writable=True))
    answers = b""
    for request, _, _ in EXCHANGES.values():
        for byte in request:
            session.feed(bytes((byte,)))
            answers += drain(session)
    assert answers == b"".join(
        # By then 5 of the fuel is consumed.
        answer.replace((1000).to_bytes(8, "little"), (995).to_bytes(8, "little"))
        for _, answer, _ in EXCHANGES.values()
    )
    assert session.outcome == HostOutcome("return", encode_calldata("done"))


def test_readonly_host_stores_nothing() -> None:
    session = HostSession(make_state())
    session.feed(storage_write(7, b"new") + storage_read(7, 3))
    assert drain(session) == b"\x02" + b"\x00abc"


def test_refusals_do_not_flood_the_log() -> None:
    session = HostSession(make_state())
    session.feed((storage_write(7, b"new") + EXCHANGES["eth_send"][0]) * 100)
    logged: list[str] = []
    with observing(lambda event: logged.append(str(event.get("method")))):
        assert drain(session) == b"\x02" * 200
    assert logged == ["storage_write", "eth_send"]


def test_storage_is_zero_where_nothing_was_written_and_per_account() -> None:
    session = HostSession(make_state(writable=True))
    session.feed(storage_read(0, 12) + storage_read(7, 3, account=OTHER) + storage_read(7, 0))
    assert drain(session) == b"\x00" + bytes(7) + b"abc\x00\x00" + b"\x00\x00\x00\x00" + b"\x00"
    session.feed(storage_read(2**32 - 2, 2))
    assert drain(session) == b"\x00\x00\x00"


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_every_storage_mode_reads_the_same(mode: int) -> None:
    session = HostSession(make_state())
    session.feed(b"\x01" + bytes((mode,)) + storage_read(7, 3)[2:])
    assert drain(session) == b"\x00abc"


PAGE = HostStorage._PAGE_BYTES
# Around the borders of pages, and as long as two of them.
WRITES = st.tuples(
    st.sampled_from([0, PAGE, 2 * PAGE]),
    st.integers(-5, 5),
    st.one_of(st.integers(1, 10), st.integers(PAGE - 10, PAGE + 10), st.integers(1, 2 * PAGE)),
    st.binary(min_size=1, max_size=7),
    st.booleans(),
).map(lambda w: (max(0, w[0] + w[1]), (w[3] * w[2])[: w[2]], w[4]))


@given(st.lists(WRITES, max_size=8))
@settings(max_examples=100)
def test_storage_behaves_like_one_array(writes: list[tuple[int, bytes, bool]]) -> None:
    storage, model = HostStorage(), bytearray(5 * PAGE)
    for index, data, share in writes:
        assert storage.write(ME, SLOT, index, data, share=share)
        model[index : index + len(data)] = data
    assert b"".join(storage.read(ME, SLOT, 0, len(model))) == model
    assert b"".join(storage.read(ME, SLOT, 4000, 2 * PAGE)) == model[4000 : 4000 + 2 * PAGE]


def test_full_storage_answers_out_of_gas_and_keeps_what_it_has() -> None:
    state = HostState(contract=ME, calldata=b"", writable=True, storage=HostStorage(2000))
    session = HostSession(state)
    session.feed(storage_write(0, b"a" * 1000) + storage_write(500, b"b" * 3000))
    assert drain(session) == b"\x00\x04"
    session.feed(storage_read(0, 1000) + storage_write(0, b"c" * 1000))
    assert drain(session) == b"\x00" + b"a" * 1000 + b"\x00"


def test_scattered_single_bytes_cannot_outgrow_the_limit() -> None:
    storage = HostStorage(1_000_000)
    accepted = 0
    tracemalloc.start()
    try:
        while storage.write(ME, SLOT, accepted * 5000, b"x"):
            accepted += 1
        assert tracemalloc.get_traced_memory()[0] < 2_000_000
    finally:
        tracemalloc.stop()
    assert 100 < accepted < 1_000_000 // 256


def test_fuel_ends_at_zero_and_fits_the_protocol() -> None:
    session = HostSession(HostState(contract=ME, calldata=b"", fuel=2**63))
    session.feed(b"\x0d" + b"\x08" + b"\xff" * 8 + b"\x0d")
    assert drain(session) == b"\x00" + (2**53 - 1).to_bytes(8, "little") + b"\x00" + bytes(8)


@pytest.mark.parametrize(
    ("result", "kind"),
    [
        (b"\x00", "return"),
        (b"\x01", "user_error"),
        (b"\x02", "vm_error"),
        (b"\x03", "internal_error"),
    ],
)
def test_result_codes(result: bytes, kind: str) -> None:
    session = HostSession(make_state())
    session.feed(b"\x03" + blob(result + b"data") + b"whatever follows")
    assert drain(session) == b"\x00"
    assert session.outcome is not None
    assert (session.outcome.kind, session.outcome.data) == (kind, b"data")
    session.feed(b"\xff")
    assert session.step() is None


@pytest.mark.parametrize(
    ("sent", "problem"),
    [
        (b"\x0f", "unknown method 15 at byte 0"),
        (b"\xff", "unknown method 255 at byte 0"),
        (b"\x00\x0dGET / HTTP", "unknown method 71 at byte 2"),
        (b"\x03" + blob(b""), "without a known result code"),
        (b"\x03" + blob(b"\x04"), "without a known result code"),
        (b"\x01\x03" + storage_read(0, 1)[2:], "unknown storage mode 3"),
        (storage_read(0, HOST_BLOB_LIMIT + 1), f"the limit is {HOST_BLOB_LIMIT}"),
        (b"\x03" + u32(HOST_BLOB_LIMIT + 1), f"the limit is {HOST_BLOB_LIMIT}"),
        (b"\x02" + SLOT + u32(0) + b"\xff" * 4, "announced 4294967295 bytes for storage_write"),
        (storage_write(2**32 - 1, b"ab"), "beyond the end of a storage slot"),
    ],
)
def test_garbage_fails_the_run_and_cuts_the_connection(sent: bytes, problem: str) -> None:
    peer = Peer(make_state(writable=True))
    peer.protocol.dataReceived(sent)
    assert problem in peer.problem()
    assert peer.transport.disconnected
    peer.protocol.dataReceived(RESULT)
    peer.hang_up()
    assert len(peer.results) == 1


def test_the_blobs_of_a_request_are_limited_together() -> None:
    session = HostSession(make_state(), blob_limit=100)
    session.feed(b"\x09" + blob(b"a" * 50) + blob(b"b" * 50) + u32(1))
    with pytest.raises(HostProtocolError, match="announced 101 bytes for deploy_contract"):
        session.step()
    session = HostSession(make_state(), blob_limit=100)
    session.feed(b"\x09" + blob(b"a" * 50) + blob(b"b" * 50) + u32(0))
    assert session.step() == b"\x02"


def test_an_announced_blob_allocates_nothing() -> None:
    tracemalloc.start()
    try:
        session = HostSession(make_state())
        session.feed(b"\x03" + u32(HOST_BLOB_LIMIT) + b"\x00")
        assert session.step() is None
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_outcome_closes_the_connection_and_fires_once() -> None:
    peer = Peer()
    peer.protocol.dataReceived(b"\x00" + RESULT)
    assert peer.transport.value() == b"\x00" + blob(CALLDATA) + b"\x00"
    assert peer.results == [HostOutcome("return", encode_calldata("done"))]
    # A transport with a producer would never close.
    assert peer.transport.producer is None
    assert peer.transport.disconnecting
    peer.hang_up()
    assert len(peer.results) == 1


@pytest.mark.parametrize(
    ("sent", "problem"),
    [
        (b"", "without a result, after 0 requests"),
        (b"\x00\x0d", "without a result, after 2 requests"),
        (b"\x00" + storage_read(0, 1)[:30], "inside a storage_read request, after 1 request"),
        (RESULT[:-1], "inside a consume_result request, after 0 requests"),
    ],
)
def test_lost_connection_says_where(sent: bytes, problem: str) -> None:
    peer = Peer()
    peer.protocol.dataReceived(sent)
    assert peer.results == []
    peer.hang_up()
    assert problem in peer.problem()


def test_a_connection_lost_over_unserved_garbage_is_an_error_too() -> None:
    peer = Peer()
    peer.protocol.pauseProducing()
    peer.protocol.dataReceived(b"\xff")
    peer.hang_up()
    assert "without a result" in peer.problem()


def test_nothing_is_served_or_read_while_the_peer_does_not_read() -> None:
    peer = Peer()
    peer.protocol.dataReceived(b"\x00")
    assert peer.transport.producer is peer.protocol
    assert peer.transport.streaming
    peer.transport.clear()
    peer.protocol.pauseProducing()
    assert peer.transport.producerState == "paused"
    peer.protocol.dataReceived(b"\x00" * 1000)
    assert peer.transport.value() == b""
    peer.protocol.resumeProducing()
    peer.clock.advance(0)
    assert peer.transport.value() == (b"\x00" + blob(CALLDATA)) * 1000
    assert peer.transport.producerState == "producing"


class FullTransport(StringTransport):
    """A transport whose peer reads nothing: full after ``room`` bytes, as a real one says."""

    room = 65536

    def write(self, data: bytes) -> None:
        self.io.write(data)
        if self.io.tell() > self.room and self.producer is not None:
            self.producer.pauseProducing()


def test_a_flood_without_reading_does_not_grow_the_backlog() -> None:
    clock = Clock()
    state = HostState(contract=ME, calldata=b"c" * 1000)
    factory = HostFactory(state, clock)
    protocol = factory.buildProtocol(None)
    assert protocol is not None
    transport: Any = FullTransport()
    protocol.makeConnection(transport)
    protocol.dataReceived(b"\x00" * 65536)
    for _ in range(1000):
        clock.advance(0)
    assert len(transport.value()) <= FullTransport.room + 1005
    assert transport.producerState == "paused"
    assert not clock.getDelayedCalls()


def test_a_flood_of_requests_without_answers_yields_to_the_reactor() -> None:
    peer = Peer()
    peer.protocol.dataReceived((b"\x0e" + u32(1)) * 3000)
    per_turn = []
    while peer.clock.getDelayedCalls():
        assert peer.transport.producerState == "paused"
        per_turn.append(peer.state.requests.total())
        # Run one turn only: advance() would also run the turns that it schedules.
        (turn,) = peer.clock.calls
        peer.clock.calls.remove(turn)
        turn.called = 1
        turn.func()
    assert len(per_turn) > 1
    assert max(b - a for a, b in zip([0, *per_turn], per_turn, strict=False)) <= 1000
    assert peer.state.requests["notify_nondet_disagreement"] == 3000
    assert peer.transport.producerState == "producing"


def test_a_connection_lost_between_turns_leaves_no_timer() -> None:
    peer = Peer()
    peer.protocol.dataReceived(b"\x0d" * 3000)
    assert peer.clock.getDelayedCalls()
    peer.hang_up()
    assert not peer.clock.getDelayedCalls()
    assert "closed the host connection" in peer.problem()


def test_one_run_takes_one_connection() -> None:
    peer = Peer()
    assert peer.factory.buildProtocol(None) is None
    peer.protocol.dataReceived(RESULT)
    peer.hang_up()
    assert peer.factory.buildProtocol(None) is None
    assert len(peer.results) == 1


def test_every_waiter_gets_the_outcome_early_or_late() -> None:
    peer = Peer()
    seen: list[HostOutcome] = []

    def take(outcome: HostOutcome) -> None:
        seen.append(outcome)

    peer.factory.done.wait().addCallback(take)
    peer.protocol.dataReceived(RESULT)
    peer.factory.done.wait().addCallback(take)
    assert seen == [HostOutcome("return", encode_calldata("done"))] * 2
    assert len(peer.results) == 1


def test_a_cancelled_waiter_only_unsubscribes() -> None:
    peer = Peer()
    errors: list[Failure] = []
    waiter: Deferred[HostOutcome] = peer.factory.done.wait()
    waiter.addErrback(errors.append)
    waiter.cancel()
    assert [error.type for error in errors] == [CancelledError]
    peer.protocol.dataReceived(RESULT)
    assert [r.kind for r in peer.results if isinstance(r, HostOutcome)] == ["return"]


def test_abandon_before_during_and_after() -> None:
    clock = Clock()
    unconnected = HostFactory(make_state(), clock)
    errors: list[Failure] = []
    unconnected.done.wait().addErrback(errors.append)
    unconnected.abandon("the executor exited with status 1")
    assert errors[0].getErrorMessage() == "the executor exited with status 1"
    assert unconnected.buildProtocol(None) is None

    connected = Peer()
    connected.factory.abandon("took too long")
    assert connected.problem() == "took too long"
    assert connected.transport.producer is None
    connected.hang_up()

    ended = Peer()
    ended.protocol.dataReceived(RESULT)
    assert not ended.transport.disconnected, "the acknowledgement may still be on its way"
    ended.factory.abandon("too late")
    assert ended.results == [HostOutcome("return", encode_calldata("done"))]
    assert ended.transport.disconnected, "whoever does not read it keeps no connection open"


@pytest.mark.parametrize(
    ("kind", "data", "text"),
    [
        ("return", encode_calldata({"a": [1, None, "ü"]}), 'return: {"a": [1, null, "ü"]}'),
        ("return", encode_calldata(b"\x01\xff"), 'return: "0x01ff"'),
        ("return", b"\x07", "return: 1 bytes that are not calldata"),
        (
            "user_error",
            encode_calldata({"message": "no {funds}", "fingerprint": None}),
            "user error: no {funds}",
        ),
        (
            "vm_error",
            encode_calldata({"message": "exit", "fingerprint": {"x": 1}}),
            'vm error: exit [{"x": 1}]',
        ),
        ("vm_error", encode_calldata({"code": 1}), 'vm error: {"code": 1}'),
        ("vm_error", b"timeout", "vm error: timeout"),
        # This text is also the calldata of another text.
        ("vm_error", b"demo message!", "vm error: demo message!"),
        ("internal_error", b"bad \xff", "internal error: bad \ufffd"),
        ("internal_error", b"", "internal error: "),
    ],
)
def test_outcome_for_a_person(kind: Any, data: bytes, text: str) -> None:
    assert describe_outcome(HostOutcome(kind, data)).startswith(text)


def test_a_huge_outcome_is_described_in_bounds() -> None:
    values: list[Any] = [1 << 10_000_000, "x" * 10_000_000, [[1] * 1000] * 100]
    for value in values:
        text = describe_outcome(HostOutcome("return", encode_calldata(value)))
        assert 4000 < len(text) < 4100
        assert "characters)" in text


@pytest.mark.parametrize("kind", ["return", "user_error"])
def test_what_is_not_shown_of_an_outcome_is_not_rendered(kind: Any) -> None:
    outcome = HostOutcome(kind, encode_calldata([bytes(10_000_000), "\0" * 10_000_000]))
    tracemalloc.start()
    try:
        text = describe_outcome(outcome)
        # The decoded value alone has as many bytes as the outcome.
        assert tracemalloc.get_traced_memory()[1] < 1.6 * len(outcome.data)
    finally:
        tracemalloc.stop()
    assert 4000 < len(text) < 4100


def test_a_huge_error_is_described_in_bounds() -> None:
    assert len(describe_outcome(HostOutcome("vm_error", b"y" * 10_000_000))) < 4100


def test_deployment_writes_have_the_documented_layout() -> None:
    slot = hashlib.sha3_256(bytes(32) + b"\x01\x00\x00\x00").digest()
    assert slot == CODE_SLOT
    assert deployment_writes(b"code!") == [
        (slot + bytes(4), b"\x05\x00\x00\x00"),
        (slot + b"\x04\x00\x00\x00", b"code!"),
    ]
    with pytest.raises(InvalidRequest, match="empty"):
        deployment_writes(b"")


def test_a_deployed_contract_is_read_back() -> None:
    code = bytes(range(256)) * 400
    state = HostState(contract=ME, calldata=b"")
    state.deploy(deployment_writes(code))
    session = HostSession(state)
    session.feed(storage_read(0, 4, slot=CODE_SLOT) + storage_read(4, len(code), slot=CODE_SLOT))
    assert drain(session) == b"\x00" + u32(len(code)) + b"\x00" + code
    small = HostState(contract=ME, calldata=b"", storage=HostStorage(1000))
    with pytest.raises(HostProtocolError, match="does not fit"):
        small.deploy(deployment_writes(code))


def test_deployed_code_is_not_copied() -> None:
    code = bytes(20_000_000)
    tracemalloc.start()
    try:
        state = HostState(contract=ME, calldata=b"")
        state.deploy(deployment_writes(code))
        session = HostSession(state)
        session.feed(storage_read(4, len(code), slot=CODE_SLOT) + storage_read(0, HOST_BLOB_LIMIT))
        sent = 0
        while (piece := session.step()) is not None:
            sent += len(piece)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert sent == 1 + len(code) + 1 + HOST_BLOB_LIMIT


def test_a_large_answer_waits_for_its_reader() -> None:
    """Nothing of the next request is served before the last piece of an answer is sent."""
    peer = Peer(make_state(), transport=FullTransport)
    peer.protocol.dataReceived(storage_read(0, HOST_BLOB_LIMIT) + RESULT)
    assert len(peer.transport.value()) < 4 * FullTransport.room
    received = 0
    while not peer.results:
        received += len(peer.transport.value())
        peer.transport.clear()
        peer.protocol.resumeProducing()
    received += len(peer.transport.value())
    assert received == 1 + HOST_BLOB_LIMIT + 1
    assert not peer.clock.getDelayedCalls()


def test_the_calldata_of_an_outcome_decodes() -> None:
    peer = Peer()
    peer.protocol.dataReceived(RESULT)
    (outcome,) = peer.results
    assert isinstance(outcome, HostOutcome)
    assert decode_calldata(outcome.data) == "done"
