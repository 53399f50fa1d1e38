"""What figures are compared with: Twisted and treq without the manager, in processes of their own.

``python -m tests.bench.yardsticks`` serves on a free port, which it prints.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import treq
from twisted.internet.defer import Deferred
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site


class Yardsticks(Resource):
    """``GET /N`` answers N bytes; a POST is answered as by an LLM provider.

    ``GET /exchange?url`` makes such a POST with treq, and answers how long that took.
    """

    isLeaf = True

    def __init__(self, reactor: Any) -> None:
        Resource.__init__(self)
        self._reactor = reactor
        message = {"role": "assistant", "content": "OK"}
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        self._completion = json.dumps({"choices": [{"message": message}], "usage": usage}).encode()
        self._bodies: dict[bytes, bytes] = {}

    def render_GET(self, request: Request) -> bytes | int:
        """Answer a body of some size, or the seconds of an exchange."""
        if request.path != b"/exchange":
            if (body := self._bodies.get(request.path)) is None:
                body = self._bodies[request.path] = b"x" * int(request.path[1:])
            request.setHeader("content-type", "application/json; charset=utf-8")
            return body

        def answer(seconds: float) -> None:
            body = json.dumps(seconds).encode()
            request.setHeader("content-length", str(len(body)))
            request.write(body)
            request.finish()

        url = request.uri.partition(b"?")[2].decode()
        Deferred.fromCoroutine(self._exchange(url)).addCallback(answer)
        return NOT_DONE_YET

    async def _exchange(self, url: str) -> float:
        begin = time.perf_counter()
        response = await treq.post(url, json=chat("0"))
        await treq.json_content(response)
        return time.perf_counter() - begin

    def render_POST(self, request: Request) -> bytes | int:
        """Answer after as many seconds as the name of the model says."""
        assert request.content is not None
        body = json.load(request.content)
        request.setHeader("content-type", "application/json")
        seconds = float(body["model"])
        if not seconds:
            return self._completion

        def answer() -> None:
            request.write(self._completion)
            request.finish()

        self._reactor.callLater(seconds, answer)
        return NOT_DONE_YET


def chat(model: str) -> dict[str, Any]:
    """Return what an LLM provider is asked."""
    return {"model": model, "messages": [{"role": "user", "content": "Say OK."}]}


def main(say: Callable[[str], object] = sys.stdout.write) -> None:
    """Serve until stdin is closed."""
    from twisted.internet import reactor as installed
    from twisted.internet.protocol import Protocol
    from twisted.internet.stdio import StandardIO

    reactor: Any = installed

    class Until(Protocol):
        def connectionLost(self, *_: object) -> None:
            if reactor.running:
                reactor.stop()

    site = Site(Yardsticks(reactor))
    site.noisy = False
    port = reactor.listenTCP(0, site, interface="127.0.0.1").getHost().port
    StandardIO(Until())
    say(f"{port}\n")
    sys.stdout.flush()
    reactor.run()


if __name__ == "__main__":
    main()
