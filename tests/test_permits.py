"""The gate that decides how many executions run, and the one-shot event."""

from __future__ import annotations

import sys
from collections import deque
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore, ensureDeferred
from twisted.internet.task import Clock

from genvm_manager import Event, Lease, PermitGate


class Waiter:
    """Somebody who wants permits."""

    def __init__(self, gate: PermitGate, weight: int = 1, log: list[Waiter] | None = None) -> None:
        self.weight = weight
        self.lease: Lease | None = None
        self.error: type[Exception] | None = None
        self._log = log
        self.place = gate.reserve(weight)
        self.place.addCallbacks(self._got, self._failed)

    def _got(self, lease: Lease) -> None:
        self.lease = lease
        if self._log is not None:
            self._log.append(self)

    def _failed(self, failure: Any) -> None:
        self.error = failure.type

    def release(self) -> None:
        assert self.lease is not None
        self.lease.release()


def make_gate(limit: int) -> PermitGate:
    return PermitGate(limit, Clock())


def figures(gate: PermitGate) -> tuple[int, int, int, int]:
    """Return limit, permits in use, permits available, and who waits."""
    return gate.limit, gate.in_use, gate.available, gate.queue_length


# --- admission ---


def test_permits_are_had_at_once_while_there_are_some() -> None:
    gate = make_gate(3)
    one, two = Waiter(gate, 1), Waiter(gate, 2)
    assert one.lease is not None
    assert two.lease is not None
    assert (one.lease.weight, two.lease.weight) == (1, 2)
    assert figures(gate) == (3, 3, 0, 0)
    three = Waiter(gate, 1)
    assert three.lease is None
    assert figures(gate) == (3, 3, 0, 1)
    two.release()
    assert three.lease is not None
    assert figures(gate) == (3, 2, 1, 0)


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    gate = make_gate(2)
    order: list[Waiter] = []
    first = Waiter(gate, 1, order)
    heavy = Waiter(gate, 2, order)
    light = [Waiter(gate, 1, order) for _ in range(3)]
    assert order == [first], "one permit is free, but it is kept for the heavy one"
    assert gate.available == 1
    first.release()
    assert order == [first, heavy]
    heavy.release()
    assert order == [first, heavy, *light[:2]]


def test_two_heavy_ones_never_block_each_other() -> None:
    gate = make_gate(3)
    first, second = Waiter(gate, 2), Waiter(gate, 2)
    assert first.lease is not None
    assert second.lease is None, "it holds nothing while it waits"
    assert gate.in_use == 2
    first.release()
    assert second.lease is not None


def test_a_release_counts_once() -> None:
    gate = make_gate(3)
    one, two = Waiter(gate, 1), Waiter(gate, 2)
    for _ in range(3):
        two.release()
    assert figures(gate) == (3, 1, 2, 0)
    one.release()
    assert figures(gate) == (3, 0, 3, 0)


def test_the_age_of_the_head_is_known() -> None:
    clock = Clock()
    gate = PermitGate(0, clock)
    assert gate.oldest_wait == 0
    first = gate.reserve(1)
    clock.advance(2)
    gate.reserve(1)
    clock.advance(3)
    assert gate.oldest_wait == 5
    first.addErrback(lambda failure: failure.trap(CancelledError))
    first.cancel()
    assert gate.oldest_wait == 3
    gate.resize(1)
    assert gate.oldest_wait == 0


@pytest.mark.parametrize(
    ("limit", "held", "queued", "weight", "waits"),
    [
        (2, 0, 0, 2, False),
        (2, 1, 0, 1, False),
        (2, 1, 0, 2, True),
        (2, 2, 0, 1, True),
        (1, 0, 0, 2, False),
        (0, 0, 0, 1, True),
        (3, 2, 1, 1, True),
    ],
)
def test_whether_somebody_would_wait_is_known_beforehand(
    limit: int, held: int, queued: int, weight: int, waits: bool
) -> None:
    gate = make_gate(limit)
    for _ in range(held):
        Waiter(gate, 1)
    for _ in range(queued):
        Waiter(gate, 2)
    assert gate.would_wait(weight) is waits
    assert (Waiter(gate, weight).lease is None) is waits


# --- resizing ---


def test_more_permits_admit_at_once() -> None:
    gate = make_gate(1)
    waiters = [Waiter(gate, weight) for weight in (1, 2, 1, 1)]
    gate.resize(4)
    assert [waiter.lease is not None for waiter in waiters] == [True, True, True, False]
    assert figures(gate) == (4, 4, 0, 1)


def test_fewer_permits_take_effect_as_leases_end() -> None:
    gate = make_gate(4)
    held = [Waiter(gate, 1) for _ in range(4)]
    waiting = [Waiter(gate, 1) for _ in range(2)]
    gate.resize(2)
    assert figures(gate) == (2, 4, 0, 2)
    held[0].release()
    held[1].release()
    assert figures(gate) == (2, 2, 0, 2), "nobody was admitted on the way down"
    held[2].release()
    assert waiting[0].lease is not None
    assert waiting[1].lease is None
    assert figures(gate) == (2, 2, 0, 1)


def test_no_permits_pause_and_more_resume() -> None:
    gate = make_gate(2)
    held = Waiter(gate, 2)
    gate.resize(0)
    waiting = Waiter(gate, 1)
    held.release()
    assert waiting.lease is None
    assert figures(gate) == (0, 0, 0, 1)
    gate.resize(1)
    assert waiting.lease is not None


def test_a_gate_can_start_paused() -> None:
    gate = make_gate(0)
    waiting = Waiter(gate, 2)
    assert (waiting.lease, figures(gate)) == (None, (0, 0, 0, 1))
    gate.resize(5)
    assert waiting.lease is not None
    assert figures(gate) == (5, 2, 3, 0)


def test_with_one_permit_a_heavy_one_takes_one_and_gives_back_one() -> None:
    gate = make_gate(1)
    first, second = Waiter(gate, 2), Waiter(gate, 2)
    assert first.lease is not None
    assert first.lease.weight == 1
    assert figures(gate) == (1, 1, 0, 1)
    gate.resize(4)
    assert second.lease is not None
    assert second.lease.weight == 2
    assert figures(gate) == (4, 3, 1, 0)
    first.release()
    second.release()
    assert figures(gate) == (4, 0, 4, 0)


def test_a_heavy_one_that_waits_needs_no_more_than_a_lowered_limit() -> None:
    gate = make_gate(3)
    held = [Waiter(gate, 1) for _ in range(2)]
    heavy = Waiter(gate, 2)
    gate.resize(1)
    held[0].release()
    assert heavy.lease is None
    held[1].release()
    assert heavy.lease is not None
    assert heavy.lease.weight == 1
    assert figures(gate) == (1, 1, 0, 0)


# --- cancelling ---


def test_cancelling_the_head_lets_the_next_in() -> None:
    gate = make_gate(2)
    held, heavy, light = Waiter(gate, 1), Waiter(gate, 2), Waiter(gate, 1)
    assert light.lease is None
    heavy.place.cancel()
    assert heavy.error is CancelledError
    assert heavy.lease is None
    assert light.lease is not None
    assert held.lease is not None
    assert figures(gate) == (2, 2, 0, 0)


def test_cancelling_in_the_middle_keeps_the_order() -> None:
    gate = make_gate(0)
    order: list[Waiter] = []
    waiters = [Waiter(gate, 1, order) for _ in range(4)]
    waiters[1].place.cancel()
    gate.resize(9)
    assert order == [waiters[0], waiters[2], waiters[3]]


def test_cancelling_what_was_admitted_does_nothing() -> None:
    gate = make_gate(1)
    waiter = Waiter(gate, 1)
    waiter.place.cancel()
    assert waiter.error is None
    assert figures(gate) == (1, 1, 0, 0)


def test_everybody_may_cancel() -> None:
    gate = make_gate(0)
    waiters = [Waiter(gate, 2) for _ in range(100)]
    for waiter in reversed(waiters):
        waiter.place.cancel()
    assert figures(gate) == (0, 0, 0, 0)
    gate.resize(2)
    assert Waiter(gate, 2).lease is not None


# --- reentrancy ---


@pytest.mark.parametrize("weight", [1, 2])
def test_a_thousand_who_give_back_at_once_do_not_recurse(weight: int) -> None:
    gate = make_gate(2)
    blocker = Waiter(gate, 2)
    served: list[int] = []

    def depth() -> int:
        frame, count = sys._getframe(), 0
        while frame.f_back is not None:
            frame, count = frame.f_back, count + 1
        return count

    def serve(lease: Lease) -> None:
        served.append(depth())
        lease.release()

    for _ in range(1000):
        gate.reserve(weight).addCallback(serve)
    blocker.release()
    assert len(served) == 1000
    assert max(served) == min(served), "each is called from the same loop"
    assert figures(gate) == (2, 0, 2, 0)


def test_a_waiter_may_reserve_again_when_it_is_admitted() -> None:
    gate = make_gate(1)
    blocker = Waiter(gate, 1)
    order: list[str] = []

    def note(lease: Lease, name: str) -> None:
        order.append(name)
        lease.release()

    def again(lease: Lease) -> None:
        gate.reserve(1).addCallback(note, "again")
        note(lease, "first")

    gate.reserve(1).addCallback(again)
    gate.reserve(1).addCallback(note, "second")
    blocker.release()
    assert order == ["first", "second", "again"]
    assert figures(gate) == (1, 0, 1, 0)


def test_a_waiter_may_resize_or_cancel_another_when_it_is_admitted() -> None:
    gate = make_gate(1)
    blocker = Waiter(gate, 1)
    first = gate.reserve(1)
    second, third = Waiter(gate, 1), Waiter(gate, 1)

    def meddle(_: Lease) -> None:
        second.place.cancel()
        gate.resize(2)

    first.addCallback(meddle)
    blocker.release()
    assert second.error is CancelledError
    assert third.lease is not None
    assert figures(gate) == (2, 2, 0, 0)


def test_an_error_in_a_callback_does_not_stop_the_queue() -> None:
    gate = make_gate(1)
    blocker = Waiter(gate, 1)
    errors: list[Any] = []

    def fail(lease: Lease) -> None:
        lease.release()
        raise ZeroDivisionError

    gate.reserve(1).addCallback(fail).addErrback(errors.append)
    last = Waiter(gate, 1)
    blocker.release()
    assert [error.type for error in errors] == [ZeroDivisionError]
    assert last.lease is not None


# --- the contract of the base class ---


def test_it_is_a_semaphore_of_twisted() -> None:
    gate = make_gate(2)
    assert isinstance(gate, DeferredSemaphore)
    got: list[object] = []
    for _ in range(3):
        gate.acquire().addCallback(got.append)
    assert got == [gate, gate]
    assert (gate.tokens, gate.limit) == (0, 2)
    gate.release()
    assert got == [gate] * 3
    for _ in range(2):
        gate.release()
    assert (gate.tokens, figures(gate)) == (2, (2, 0, 2, 0))


def test_a_release_too_many_is_an_error_as_in_the_base_class() -> None:
    for gate in (DeferredSemaphore(2), make_gate(2)):
        with pytest.raises(AssertionError):
            gate.release()
        assert gate.tokens == 2


def test_run_holds_a_permit_while_the_function_works() -> None:
    gate = make_gate(1)
    work: Deferred[str] = Deferred()
    result = gate.run(lambda: work)
    second: list[Any] = []
    gate.run(lambda: second.append(gate.in_use))
    assert (gate.in_use, second) == (1, [])
    work.callback("done")
    assert result.result == "done"
    assert (second, figures(gate)) == ([1], (1, 0, 1, 0))


def test_run_gives_the_permit_back_when_the_function_fails() -> None:
    gate = make_gate(1)
    caught: list[Any] = []
    gate.run(lambda: 1 // 0).addErrback(caught.append)
    assert caught[0].type is ZeroDivisionError
    assert gate.in_use == 0


def test_a_waiting_acquire_can_be_cancelled() -> None:
    gate = make_gate(0)
    waiting = gate.acquire()
    caught: list[Any] = []
    waiting.addErrback(caught.append)
    waiting.cancel()
    assert caught[0].type is CancelledError
    gate.resize(1)
    assert figures(gate) == (1, 0, 1, 0)


def test_async_with_holds_a_permit() -> None:
    gate = make_gate(1)
    gap: Deferred[None] = Deferred()

    async def work() -> int:
        async with gate:
            await gap
            return gate.in_use

    result = ensureDeferred(work())
    assert gate.in_use == 1
    gap.callback(None)
    assert (result.result, gate.in_use) == (1, 0)


# --- any sequence of calls ---


class GateModel(RuleBasedStateMachine):
    """Compares the gate with the plainest model of it after any sequence of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = make_gate(3)
        self.limit = 3
        self.order: list[Waiter] = []
        self.admitted: list[Waiter] = []
        self.waiting: deque[Waiter] = deque()
        self.holders: dict[Waiter, int] = {}

    def settle(self) -> None:
        """Admit in the model whoever the specification admits."""
        while self.waiting and self.limit:
            weight = min(self.waiting[0].weight, self.limit)
            if sum(self.holders.values()) + weight > self.limit:
                break
            waiter = self.waiting.popleft()
            self.holders[waiter] = weight
            self.admitted.append(waiter)

    @rule(weight=st.integers(min_value=1, max_value=3))
    def reserve(self, weight: int) -> None:
        waits = self.gate.would_wait(weight)
        waiter = Waiter(self.gate, weight, self.order)
        self.waiting.append(waiter)
        self.settle()
        assert waits == (waiter in self.waiting)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), times=st.integers(min_value=1, max_value=2))
    def release(self, data: st.DataObject, times: int) -> None:
        waiter = data.draw(st.sampled_from(list(self.holders)))
        del self.holders[waiter]
        for _ in range(times):
            waiter.release()
        self.settle()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        waiter = data.draw(st.sampled_from(list(self.waiting)))
        self.waiting.remove(waiter)
        waiter.place.cancel()
        assert waiter.error is CancelledError
        self.settle()

    @rule(limit=st.integers(min_value=0, max_value=5))
    def resize(self, limit: int) -> None:
        before = sum(self.holders.values())
        self.limit = limit
        self.gate.resize(limit)
        self.settle()
        assert self.gate.in_use <= max(limit, before), "only what was held may exceed the limit"

    @invariant()
    def agrees(self) -> None:
        held = sum(self.holders.values())
        assert self.order == self.admitted
        assert figures(self.gate) == (
            self.limit,
            held,
            max(0, self.limit - held),
            len(self.waiting),
        )
        for waiter, weight in self.holders.items():
            assert waiter.lease is not None
            assert waiter.lease.weight == weight

    def teardown(self) -> None:
        """Nobody starves: once all give back and there is a permit, everybody has been served."""
        if self.limit == 0:
            self.resize(1)
        while self.holders:
            waiter = next(iter(self.holders))
            del self.holders[waiter]
            waiter.release()
            self.settle()
            self.agrees()
        assert not self.waiting
        assert self.gate.queue_length == 0
        assert self.gate.in_use == 0


GateModel.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestGate = GateModel.TestCase


# --- events ---


def outcome(waiter: Deferred[Any]) -> list[Any]:
    """Return a list that gets the result of a Deferred, or the type of its error."""
    result: list[Any] = []
    waiter.addCallbacks(result.append, lambda failure: result.append(failure.type))
    return result


def test_an_event_tells_everybody_who_waits_and_who_comes_later() -> None:
    event: Event[int] = Event()
    before = [outcome(event.wait()) for _ in range(3)]
    assert (event.happened, event.waiters, before) == (False, 3, [[]] * 3)
    event.fire(7)
    assert (event.happened, event.waiters) == (True, 0)
    assert [*before, outcome(event.wait())] == [[7]] * 4


def test_an_event_happens_once() -> None:
    event: Event[int] = Event()
    waiter = outcome(event.wait())
    event.fire(1)
    event.fire(2)
    event.fail(ValueError())
    assert [waiter, outcome(event.wait())] == [[1], [1]]


def test_an_event_can_fail_for_everybody() -> None:
    event: Event[int] = Event()
    waiter = outcome(event.wait())
    event.fail(ValueError("x"))
    event.fire(1)
    event.fail(KeyError())
    assert event.happened
    assert [waiter, outcome(event.wait())] == [[ValueError], [ValueError]]


def test_a_failed_event_that_nobody_waited_for_says_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    event: Event[int] = Event()
    event.fail(ValueError("x"))
    del event
    assert "Unhandled" not in capsys.readouterr().err


def test_cancelling_a_waiter_unsubscribes_it_alone() -> None:
    event: Event[int] = Event()
    first, second = event.wait(), event.wait()
    results = [outcome(first), outcome(second)]
    first.cancel()
    assert (results, event.waiters, event.happened) == ([[CancelledError], []], 1, False)
    event.fire(3)
    assert results == [[CancelledError], [3]]


def test_each_waiter_has_a_value_of_its_own() -> None:
    event: Event[int] = Event()
    spoilt = event.wait()
    spoilt.addCallback(lambda _: None)
    other = outcome(event.wait())
    event.fire(3)
    assert other == [3]


def test_a_waiter_may_wait_fire_and_cancel_others_when_it_is_told() -> None:
    event: Event[int] = Event()
    first, second, third = (event.wait() for _ in range(3))
    again: list[Any] = []

    def meddle(value: int) -> None:
        again.append(outcome(event.wait()))
        event.fire(99)
        second.cancel()

    first.addCallback(meddle)
    results = [outcome(second), outcome(third)]
    event.fire(1)
    assert (again, results) == ([[1]], [[CancelledError], [1]])
    assert event.waiters == 0
