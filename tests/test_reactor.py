"""What is added while the reactor dispatches events. See also ``tests/faults``."""

from __future__ import annotations

from typing import Any

from attrs import define, field
from twisted.python.failure import Failure

from genvm_manager import _Registrations

from .support import observing


@define(eq=False)
class Descriptor:
    """What a reactor watches."""

    lost: list[Failure] = field(factory=list)

    def connectionLost(self, reason: Failure) -> None:
        """Note why it was closed."""
        self.lost.append(reason)


def test_what_is_added_within_a_batch_is_registered_at_its_end() -> None:
    watched: list[Descriptor] = []
    registrations = _Registrations(watched.append, watched.remove)
    one, other, removed = Descriptor(), Descriptor(), Descriptor()
    registrations.add_later(one)
    registrations.add_later(removed)
    assert watched == [one, removed], "between batches it is done at once"
    registrations.within_batch = True
    registrations.add_later(other)
    registrations.drop(removed)
    registrations.add_later(removed)
    assert watched == [one]
    registrations.end_batch()
    assert watched in ([one, other, removed], [one, removed, other])


def test_what_is_added_and_removed_within_a_batch_was_never_there() -> None:
    watched: set[Descriptor] = set()
    registrations = _Registrations(watched.add, watched.discard)
    descriptor = Descriptor()
    registrations.within_batch = True
    registrations.add_later(descriptor)
    registrations.drop(descriptor)
    registrations.end_batch()
    assert watched == set()


def test_what_the_kernel_refuses_to_watch_is_closed_and_nothing_else() -> None:
    watched: list[Descriptor] = []

    def add(descriptor: Descriptor) -> None:
        if descriptor is refused:
            raise OSError(28, "No space left on device")
        watched.append(descriptor)

    registrations = _Registrations(add, watched.remove)
    first, refused, last = Descriptor(), Descriptor(), Descriptor()
    events: list[dict[str, Any]] = []
    with observing(events.append):
        registrations.within_batch = True
        for descriptor in (first, refused, last):
            registrations.add_later(descriptor)
        registrations.end_batch()
    assert (len(watched), first.lost, last.lost) == (2, [], [])
    assert refused.lost[0].check(OSError)
    assert [str(event["log_format"]) for event in events] == ["a descriptor cannot be watched"]
