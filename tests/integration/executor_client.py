"""A client of a module's process, as an executor has one, built on wsproto alone."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, Event, Ping, Request

from genvm_manager import decode_calldata, encode_calldata

from .support import WAIT

HELLO: Any = {"cookie": "c1", "host_data": {"node_address": "0xaa", "tx_id": "0xbb"}}


class Client:
    """A WebSocket client as an executor has one; everything blocks."""

    def __init__(self, address: tuple[str, int], *, path: str = "/", early: bytes = b"") -> None:
        self.socket = socket.create_connection(address, WAIT)
        self._ws = WSConnection(ConnectionType.CLIENT)
        self._events: Iterator[Event] = iter(())
        request = Request(host=f"{address[0]}:{address[1]}", target=path)
        self.socket.sendall(self._ws.send(request) + early)
        accepted = self.event()
        assert isinstance(accepted, AcceptConnection), accepted
        assert accepted.subprotocol is None
        assert not accepted.extensions

    def event(self) -> Event:
        """Return the next event; pings are answered."""
        while True:
            event = next(self._events, None)
            if event is None:
                data = self.socket.recv(1 << 20)
                self._ws.receive_data(data or None)
                self._events = self._ws.events()
            elif isinstance(event, Ping):
                self.socket.sendall(self._ws.send(event.response()))
            else:
                return event

    def send_raw(self, data: bytes) -> None:
        self.socket.sendall(data)

    def encode(self, event: Event) -> bytes:
        return self._ws.send(event)

    def send_event(self, event: Event) -> None:
        self.socket.sendall(self.encode(event))

    def send_bytes(self, data: bytes) -> None:
        self.send_event(BytesMessage(data=data))

    def send(self, value: Any) -> None:
        self.send_bytes(encode_calldata(value))

    def receive(self) -> Any:
        data = bytearray()
        while True:
            event = self.event()
            assert isinstance(event, BytesMessage), event
            data += event.data
            if event.message_finished:
                return decode_calldata(bytes(data))

    def ask(self, request: Any) -> Any:
        self.send(request)
        return self.receive()

    def prompt(self, text: str, **changes: Any) -> Any:
        return self.ask(prompt(text, **changes))

    def closed(self) -> int:
        """Wait for the server's end of the conversation; returns the close code."""
        event = self.event()
        assert isinstance(event, CloseConnection), event
        assert self.socket.recv(1) == b""
        return int(event.code)

    def leave(self) -> int:
        """End the conversation as the protocol has it; returns the server's close code."""
        self.send_event(CloseConnection(code=1000))
        code = self.closed()
        self.close()
        return code

    def close(self) -> None:
        self.socket.close()


def prompt(text: str, **changes: Any) -> dict[str, Any]:
    payload = {"prompt": text, "response_format": "text", "images": [], **changes}
    return {"Prompt": {"payload": payload, "remaining_fuel_as_gen": 1 << 60}}


def ok(value: Any) -> dict[str, Any]:
    return {"Ok": {"data": value, "consumed_gen": 0}}
