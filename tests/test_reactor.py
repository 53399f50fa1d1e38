"""What is added while the reactor dispatches events. See also ``tests/faults``."""

from __future__ import annotations

from typing import Any

from attrs import define, field
from twisted.internet.tcp import Server
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


def test_what_is_added_is_registered_before_the_next_batch() -> None:
    watched: list[Descriptor] = []
    registrations = _Registrations(watched.append, watched.remove)
    one, other, removed = Descriptor(), Descriptor(), Descriptor()
    registrations.add_later(one)
    registrations.add_later(removed)
    registrations.register()
    assert watched in ([one, removed], [removed, one])
    registrations.add_later(other)
    registrations.drop(removed)
    registrations.add_later(removed)
    assert watched == [one]
    registrations.register()
    assert watched in ([one, other, removed], [one, removed, other])


def test_what_is_added_and_removed_in_between_was_never_there() -> None:
    watched: set[Descriptor] = set()
    registrations = _Registrations(watched.add, watched.discard)
    descriptor = Descriptor()
    registrations.add_later(descriptor)
    registrations.drop(descriptor)
    registrations.register()
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
        for descriptor in (first, refused, last):
            registrations.add_later(descriptor)
        registrations.register()
    assert (len(watched), first.lost, last.lost) == (2, [], [])
    assert refused.lost[0].check(OSError)
    assert [str(event["log_format"]) for event in events] == ["a descriptor cannot be watched"]


class Client(Server):
    """A connection of a client's whose last bytes are sent, or not."""

    def __init__(self, registrations: _Registrations, error: Exception | None = None) -> None:
        self.registrations, self.error = registrations, error
        self.lost: list[Failure] = []

    def doWrite(self) -> None:
        if self.error is not None:
            raise self.error
        self.registrations.drop(self)

    def connectionLost(self, reason: Failure) -> None:
        self.registrations.drop(self)
        self.lost.append(reason)


def test_what_a_connection_has_is_written_before_it_is_watched() -> None:
    watched: set[Any] = set()
    registrations = _Registrations(watched.add, watched.discard)
    broken = Client(registrations, ZeroDivisionError())
    ending, other = Client(registrations), Descriptor()
    ending.disconnecting = True
    with observing(lambda event: None):
        for descriptor in (Client(registrations), broken, ending, other):
            registrations.add_later(descriptor)
        registrations.write()
        registrations.register()
    assert watched == {ending, other}, "what ends is the reactor's to close"
    assert broken.lost[0].check(ZeroDivisionError)
