"""``POST /llm/check`` of a real daemon with fake providers; all it says is searched for the key."""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import json
import os
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from .conftest import Start
from .fake_providers import CROWD, KEY, KINDS, LARGE_BYTES, USAGE, WRONG_KEY, FakeProviders
from .support import Daemon, Reply, Root, eventually, report, timed, watched
from .web_support import ProxyServer

OPENAI = "openai-compatible"
TEMPLATE = "${ENV[LLM_TEST_KEY]}"
#: Milliseconds for what never ends: the first of which a provider hears, on a busy machine too.
LIMITS = (400, 4000, 40_000)
BRIEF = LIMITS[0]
#: Seconds that only a hang takes.
HANG = 90.0
PNG = b"\x89PNG\r\n\x1a\nsome pixels"
PNG_TEXT = "iVBORw0KGgpzb21lIHBpeGVscw=="
JPEG_TEXT = "/9j/4A=="

# A piece of a key is secret as well; the first characters are the same for all of a provider.
PIECE = 14
SECRET_PIECES = [
    *(key[at : at + PIECE] for key in (KEY, WRONG_KEY) for at in range(4, len(key) - PIECE)),
    "LLM_TEST_KEY]",
]


def without_secret(text: str, what: str) -> None:
    """Show that a text has no key: not whole, not in part, not as a template."""
    for form in {text, text.replace("\\/", "/"), text.replace("\\", "")}:
        found = next((piece for piece in SECRET_PIECES if piece in form), None)
        at = form.find(found or "")
        assert found is None, f"{what} has {found!r}: ...{form[max(0, at - 200) : at + 200]}..."


class Checker:
    """A daemon that logs everything, and the providers that it asks."""

    def __init__(self, daemon: Daemon, fakes: FakeProviders) -> None:
        self.daemon = daemon
        self.fakes = fakes
        self._searched = 0
        daemon.post("/env", {"key": "LLM_TEST_KEY", "value": KEY})

    def config(self, behaviour: str = "success", kind: str = OPENAI, **changes: Any) -> Any:
        """Return one of ``configs``."""
        base = {"host": self.fakes.host(), "provider": kind, "key": KEY}
        return {**base, "model": self.fakes.model(behaviour), **changes}

    def raw(self, behaviour: str, **changes: Any) -> Any:
        """Return one of ``configs`` whose provider is no web server."""
        return self.config(host=self.fakes.raw(behaviour), **changes)

    def post(self, body: object, timeout: float = HANG) -> Reply:
        """Make a request; neither the reply nor the status nor the log may have the key."""
        reply = self.daemon.request("POST", "/llm/check", body, timeout=timeout)
        without_secret(reply.raw.decode(), "the reply")
        without_secret(json.dumps(reply.json, ensure_ascii=False), "the reply")
        self.search()
        return reply

    def search(self) -> None:
        """Look for the key in the status and in what is new in the log; nothing went wrong."""
        without_secret(self.daemon.request("GET", "/status").raw.decode(), "the status")
        # The log is complete up to this line.
        mark = f"/{uuid.uuid4()}"
        self.daemon.request("GET", mark)
        self.daemon.wait_log(lambda record: mark in str(record.get("message")))
        text = self.daemon.text
        new, self._searched = text[self._searched :], len(text)
        without_secret(new, "the log")
        assert "Traceback" not in new, [one for one in self.daemon.records if "traceback" in one]

    def results(self, configs: list[Any], *prompts: Any, **changes: Any) -> list[Any]:
        """Return the results of a check that must succeed as a whole."""
        body = {"configs": configs, "test_prompts": list(prompts or [prompt(**changes)])}
        reply = self.post(body)
        assert reply.status == 200, reply.raw[:2000]
        pairs = [(found["config_index"], found["prompt_index"]) for found in reply.json]
        count = len(body["test_prompts"])
        assert pairs == [(c, p) for c in range(len(configs)) for p in range(count)]
        for found in reply.json:
            assert sorted(found) == sorted(MEMBERS)
            assert found["available"] is (found["error"] is None)
            assert found["available"] is (found["error_kind"] is None)
            assert found["available"] is (found["response"] is not None)
            assert isinstance(found["latency_ms"], int)
            assert found["latency_ms"] >= 0
        return list(reply.json)

    def result(self, config: Any, **changes: Any) -> Any:
        """Return the result of one check."""
        (found,) = self.results([config], **changes)
        return found

    def fails(self, config: Any, kind: str, status: int | None = None, **changes: Any) -> str:
        """Check one that must fail in this way, next to one that must not; returns the error."""
        found, other = self.results([config, self.config()], **changes)
        assert (found["error_kind"], found["http_status"]) == (kind, status), found
        assert (found["available"], found["response"], found["usage"]) == (False, None, None)
        assert other["available"], other
        return str(found["error"])


def heard_in_time(asked: Callable[[int], bool]) -> None:
    """Ask with longer and longer limits until the provider hears of it; ``asked`` tells if so."""
    assert any(asked(limit) for limit in LIMITS), "the machine was too busy to show anything"


MEMBERS = (
    *("config_index", "prompt_index", "available", "error", "response"),
    *("latency_ms", "usage", "error_kind", "http_status"),
)


def prompt(**changes: Any) -> dict[str, Any]:
    """Return one of ``test_prompts``."""
    base = {"system_message": None, "user_message": "Respond with exactly two letters 'OK'"}
    limits = {"temperature": 0.2, "images": [], "max_tokens": 200}
    return {**base, **limits, "use_max_completion_tokens": False, **changes}


def environment(fakes: FakeProviders) -> Mapping[str, str]:
    """Return what makes a daemon trust our authority instead of those of the machine."""
    return {"SSL_CERT_FILE": str(fakes.authority)}


@pytest.fixture(scope="module")
def shared(shared_root: Root, fakes: FakeProviders) -> Iterator[Checker]:
    """A checker for all tests; at the end its whole log is searched."""
    flags = ("--permits", "2", "--log-level", "trace")
    daemon = Daemon.serve(shared_root, *flags, environ=environment(fakes))
    try:
        yield Checker(daemon, fakes)
        assert daemon.stop() == 0
        without_secret(daemon.text + daemon.errors, "the whole log")
        assert daemon.errors == ""
    finally:
        daemon.close()


@pytest.fixture
def checker(shared: Checker) -> Checker:
    """The checker of the module."""
    return shared


@pytest.fixture
def own(start: Start, fakes: FakeProviders) -> Checker:
    """A checker of one's own."""
    return Checker(start("--log-level", "trace", environ=environment(fakes)), fakes)


# --- success ---


@pytest.mark.parametrize("key", [KEY, TEMPLATE])
@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_answer(checker: Checker, kind: str, key: str) -> None:
    config = checker.config(kind=kind, key=key)
    found = checker.result(config)
    latency = found.pop("latency_ms")
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert found == {
        "config_index": 0,
        "prompt_index": 0,
        "available": True,
        "error": None,
        "response": "OK",
        "usage": dict(zip(names, USAGE[kind], strict=True)),
        "error_kind": None,
        "http_status": 200,
    }
    assert latency < HANG * 1000
    (request,) = checker.fakes.requests(config["model"])
    assert (request["kind"], request["problems"]) == (kind, [])
    header = {OPENAI: "authorization", "anthropic": "x-api-key", "google": "x-goog-api-key"}
    if kind in header:
        assert request["headers"][header[kind]].removeprefix("Bearer ") == KEY


def test_what_is_sent_to_openai(checker: Checker) -> None:
    config = checker.config(host=checker.fakes.host() + "/")
    whole = prompt(
        system_message="Be brief ☃",
        images=[PNG_TEXT, JPEG_TEXT],
        seed=5,
        use_max_completion_tokens=True,
    )
    assert checker.results([config], whole)[0]["available"]
    (request,) = checker.fakes.requests(config["model"])
    assert request["path"] == "/v1/chat/completions"
    assert request["body"] == {
        "model": config["model"],
        "messages": [
            {"role": "system", "content": "Be brief ☃"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Respond with exactly two letters 'OK'"},
                    {
                        "type": "image_url",
                        "image_url": {"url": f"data:image/png;base64,{PNG_TEXT}"},
                    },
                    {
                        "type": "image_url",
                        "image_url": {"url": f"data:image/jpeg;base64,{JPEG_TEXT}"},
                    },
                ],
            },
        ],
        "stream": False,
        "temperature": 0.2,
        "max_completion_tokens": 200,
        "seed": 5,
    }
    headers = request["headers"]
    assert headers["authorization"] == f"Bearer {KEY}"
    assert headers["content-type"] == "application/json"
    assert int(headers["content-length"]) > 0
    assert headers["user-agent"].startswith("genvm-manager/")
    assert "cookie" not in headers


@pytest.mark.parametrize("kind", KINDS)
def test_everything_in_a_prompt_arrives(checker: Checker, kind: str) -> None:
    config = checker.config(kind=kind)
    whole = prompt(system_message="Be brief", images=[PNG_TEXT, JPEG_TEXT], seed=5, temperature=0)
    assert checker.results([config], whole)[0]["available"]
    (request,) = checker.fakes.requests(config["model"])
    text = json.dumps(request["body"])
    for word in ("Be brief", "two letters 'OK'", PNG_TEXT, JPEG_TEXT, "200"):
        assert word in text


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_null_is_not_sent(checker: Checker, kind: str) -> None:
    config = checker.config(kind=kind)
    assert checker.results([config], prompt(temperature=None, max_tokens=None))[0]["available"]
    (request,) = checker.fakes.requests(config["model"])
    assert request["problems"] == []
    text = json.dumps(request["body"])
    assert "temperature" not in text
    # Anthropic demands a limit.
    assert ("oken" in text, "num_predict" in text) == (kind == "anthropic", False)


def test_an_image_as_an_array_of_bytes(checker: Checker) -> None:
    config = checker.config()
    assert checker.result(config, images=[[*PNG]])["available"]
    (request,) = checker.fakes.requests(config["model"])
    assert request["problems"] == []
    assert PNG_TEXT in json.dumps(request["body"])


REFERENCE = """
      {
        "configs": [
          {
            "host": "https://api.openai.com",
            "provider": "openai-compatible",
            "model": "gpt-4o",
            "key": "${ENV[OPENAIKEY]}"
          }
        ],
        "test_prompts": [
          {
            "system_message": null,
            "user_message": "Respond with exactly two letters 'OK' and nothing else",
            "temperature": 0.2,
            "images": [],
            "max_tokens": 200,
            "use_max_completion_tokens": true
          }
        ]
      }
"""


def test_the_example_of_the_reference(checker: Checker) -> None:
    # The reference has a comma after the key, which is not JSON; apart from that as it stands.
    answer = checker.daemon.post("/env", {"key": "OPENAIKEY", "value": KEY})
    assert answer == {"result": "env_var_set", "key": "OPENAIKEY"}
    text = REFERENCE.replace("https://api.openai.com", checker.fakes.host())
    model = checker.fakes.model("success")
    reply = checker.post(text.replace("gpt-4o", model).encode())
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json; charset=utf-8"
    (found,) = reply.json
    expected = {"config_index": 0, "prompt_index": 0, "available": True, "error": None}
    assert {**expected, "response": "OK"}.items() <= found.items()
    (request,) = checker.fakes.requests(model)
    assert request["headers"]["authorization"] == f"Bearer {KEY}"
    assert request["body"]["max_completion_tokens"] == 200
    assert "OPENAIKEY" not in reply.raw.decode() + json.dumps(checker.daemon.get("/status"))


def test_a_secret_of_the_environment(root: Root, start: Start, fakes: FakeProviders) -> None:
    """A client learns neither what it is nor whether it is there; what files use it may use."""
    environ = {**environment(fakes), "NODE_KEY": KEY, "USED_IN_FILE": KEY, "LISTED": KEY}
    daemon = start("--env-allow", "LISTED,NODE_*", "--log-level", "trace", environ=environ)
    (root.path / "config" / "genvm-module-llm.yaml").write_text("key: ${ENV[USED_IN_FILE]}\n")
    checker = Checker(daemon, fakes)
    fields = ("key", "host", "model")
    for name, field in itertools.product(("NODE_KEY", "NOT_THERE", "PATH"), fields):
        found = checker.result(checker.config(**{field: f"${{ENV[{name}]}}"}))
        assert found["error_kind"] == "config"
        assert found["error"] == (
            f"configs[0].{field}: the environment variable {name} may not be used in a request; "
            "set it by POST /env, use it in a file under config/, or list it in env_allow"
        )
    for name in ("USED_IN_FILE", "LISTED"):
        assert checker.result(checker.config(key=f"${{ENV[{name}]}}"))["available"]
        for field in ("host", "provider"):
            found = checker.result(checker.config(**{field: f"${{ENV[{name}]}}"}))
            assert found["error_kind"] == "config", "and the value is not shown"


def test_a_key_that_is_changed_is_used_at_once(checker: Checker) -> None:
    for value, kind in ((WRONG_KEY, "auth"), (KEY, None)):
        checker.daemon.post("/env", {"key": "LLM_CHANGING", "value": value})
        assert checker.result(checker.config(key="${ENV[LLM_CHANGING]}"))["error_kind"] == kind


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_within_the_limit_is_an_empty_text(checker: Checker, kind: str) -> None:
    found = checker.result(checker.config("null", kind))
    assert (found["available"], found["response"]) == (True, "")


@pytest.mark.parametrize(
    "behaviour",
    ["gzipped.gzip", "gzipped.GZIP", "gzipped.x-gzip", "padded", "chunked", "cookie"],
)
def test_answers_arrive_however_they_are_sent(checker: Checker, behaviour: str) -> None:
    assert checker.result(checker.config(behaviour))["response"] == "OK"


def test_an_answer_of_an_old_server(checker: Checker) -> None:
    assert checker.result(checker.raw("old"))["response"] == "OK"


def test_cookies_are_not_kept(checker: Checker) -> None:
    config = checker.config("cookie")
    for _ in range(2):
        assert checker.result(config)["available"]
    assert ["cookie" in one["headers"] for one in checker.fakes.requests(config["model"])] == [
        False,
        False,
    ]


def test_connections_are_used_again(checker: Checker) -> None:
    assert checker.result(checker.config())["available"]
    before = sockets_of(checker.daemon)
    for _ in range(5):
        assert checker.result(checker.config())["available"]
    assert len(sockets_of(checker.daemon)) <= len(before) + 1


def test_a_client_cannot_set_a_proxy_for_others(start: Start, fakes: FakeProviders) -> None:
    """The manager's own way is that of the environment in which it was started."""
    checker = Checker(start("--log-level", "trace", environ=environment(fakes)), fakes)
    config = checker.config(host=fakes.host("right"))
    proxy = ProxyServer()
    place = f"http://127.0.0.1:{proxy.port}"
    for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        assert "note" in checker.daemon.post("/env", {"key": key, "value": place})
        assert checker.result(config)["available"]
    assert proxy.requests == []
    proxy.close()


def test_a_connection_that_is_closed_as_it_is_used_again(checker: Checker) -> None:
    # Servers close idle connections at any time; that says nothing about whether a model answers.
    config = checker.raw("stale")
    for _ in range(3):
        assert checker.result(config)["error"] is None


# --- what providers answer ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("behaviour", "error_kind", "status", "parts"),
    [
        ("unauthorized", "auth", 401, ["Incorrect API key provided. You can find"]),
        ("forbidden", "auth", 403, ["Country, region, or territory"]),
        ("not_found", "not_found", 404, ["The model `no-such-model` does not exist"]),
        ("rate_limited", "rate_limited", 429, ["You exceeded your current quota"]),
        ("html", "http", 500, ["Internal Server Error"]),
        ("empty", "overloaded", 503, []),
        ("overloaded", "overloaded", 529, ["Overloaded"]),
        ("no_content", "http", 204, []),
        ("broken", "bad_response", 200, []),
        ("nothing", "bad_response", 200, []),
        ("shape", "bad_response", 200, ['"object": "list"']),
        ("not_object", "bad_response", 200, ["[1, 2, 3]"]),
        ("deep", "bad_response", 200, []),
    ],
)
def test_errors(
    checker: Checker, kind: str, behaviour: str, error_kind: str, status: int, parts: list[str]
) -> None:
    error = checker.fails(checker.config(behaviour, kind), error_kind, status)
    for part in parts:
        assert part in error
    assert status == 200 or str(status) in error
    assert len(error) < 700


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ollama"])
def test_a_tool_is_no_answer_to_a_question_for_text(checker: Checker, kind: str) -> None:
    checker.fails(checker.config("tool", kind), "bad_response", 200)


def test_only_the_first_500_characters_of_a_message_are_shown(checker: Checker) -> None:
    error = checker.fails(checker.config("long_message"), "http", 400)
    assert error.count("\u0416") == 500


def test_a_body_that_is_not_compressed_as_it_says(checker: Checker) -> None:
    found = checker.result(checker.config("not_gzip"))
    assert (found["available"], found["error_kind"]) == (False, "bad_response")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(checker: Checker, status: int) -> None:
    before = len(checker.fakes.events("elsewhere"))
    checker.fails(checker.config(f"redirect.{status}"), "http", status)
    assert len(checker.fakes.events("elsewhere")) == before


def test_the_other_host_would_have_been_seen(checker: Checker) -> None:
    before = len(checker.fakes.events("elsewhere"))
    assert checker.result(checker.config(host=checker.fakes.host("elsewhere")))["available"]
    checker.fakes.wait("elsewhere", count=before + 1)


# --- what happens to connections ---


@pytest.mark.parametrize(
    ("behaviour", "kinds"),
    [
        ("reset", ["connect"]),
        ("close", ["connect"]),
        ("reset_body", ["connect"]),
        ("short", ["connect", "bad_response"]),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_connections_that_break(
    checker: Checker, kind: str, behaviour: str, kinds: list[str]
) -> None:
    found, other = checker.results([checker.config(behaviour, kind), checker.config()])
    assert (found["available"], other["available"]) == (False, True)
    assert found["error_kind"] in kinds
    assert found["error"]


def test_a_refused_port(checker: Checker) -> None:
    host = checker.fakes.host("refused")
    error = checker.fails(checker.config(host=host), "connect")
    assert "refused" in error.lower()


def test_an_unknown_name(checker: Checker) -> None:
    error = checker.fails(checker.config(host="http://no-such-name.invalid"), "dns")
    assert "no-such-name.invalid" in error


@pytest.mark.parametrize("port", ["0", "65536", "99999999"])
def test_a_port_that_cannot_be(checker: Checker, port: str) -> None:
    found, other = checker.results(
        [checker.config(host=f"http://127.0.0.1:{port}"), checker.config()]
    )
    assert (found["available"], other["available"]) == (False, True)
    assert found["error_kind"] in ("config", "connect")
    assert found["error"]


def test_what_is_no_web_server(checker: Checker) -> None:
    checker.fails(checker.raw("not_http"), "bad_response")


def test_certificates_are_verified(checker: Checker) -> None:
    # This one is right, so the others are refused for the reason that their names tell.
    assert checker.result(checker.config(host=checker.fakes.host("right")))["available"]
    for name in ("wrong_name", "self_signed", "expired"):
        config = checker.config(host=checker.fakes.host(name))
        error = checker.fails(config, "tls")
        assert "certificate" in error.lower(), error
        assert checker.fakes.requests(config["model"]) == []


def test_the_authorities_of_the_machine_do_not_know_ours(
    start: Start, fakes: FakeProviders
) -> None:
    checker = Checker(start("--log-level", "trace"), fakes)
    checker.fails(checker.config(host=fakes.host("right")), "tls")


def test_tls_and_plain_http_do_not_mix(checker: Checker) -> None:
    host = checker.fakes.host("plain").replace("http:", "https:")
    checker.fails(checker.config(host=host), "tls")
    host = checker.fakes.host("right").replace("https:", "http:")
    assert not checker.result(checker.config(host=host))["available"]


# --- time ---


@pytest.mark.parametrize("behaviour", ["silent", "trickle"])
@pytest.mark.parametrize("kind", KINDS)
def test_providers_that_take_too_long(checker: Checker, kind: str, behaviour: str) -> None:
    config = checker.config(behaviour, kind)

    def asked(limit: int) -> bool:
        error = checker.fails({**config, "timeout_ms": limit}, "timeout")
        assert f"{limit / 1000:g} s" in error
        return bool(checker.fakes.requests(config["model"]))

    heard_in_time(asked)
    checker.fakes.wait("dropped", model=config["model"])


def was_raw(checker: Checker, config: Any) -> bool:
    """Tell whether a provider that is no web server has heard of a check."""
    return bool(checker.fakes.events("raw", tag=config["host"].rpartition("/")[2]))


@pytest.mark.parametrize("behaviour", ["silent", "trickle_head"])
def test_heads_that_take_too_long(checker: Checker, behaviour: str) -> None:
    before = len(checker.fakes.events("raw_lost", what=behaviour))

    def asked(limit: int) -> bool:
        config = checker.raw(behaviour, timeout_ms=limit)
        checker.fails(config, "timeout")
        return was_raw(checker, config)

    heard_in_time(asked)
    checker.fakes.wait("raw_lost", what=behaviour, count=before + 1)


def test_a_tls_handshake_that_takes_too_long(checker: Checker) -> None:
    # What is sent is no HTTP request, so this provider says nothing.
    host = checker.fakes.host("raw").replace("http:", "https:")
    before = len(checker.fakes.events("raw_lost", what=""))
    checker.fails(checker.config(host=host, timeout_ms=2000), "timeout")
    checker.fakes.wait("raw_lost", what="", count=before + 1)


def test_the_limit_of_a_prompt_goes_over_that_of_a_configuration(checker: Checker) -> None:
    configs = [checker.config("slow", timeout_ms=limit) for limit in (BRIEF, 60_000)]
    prompts = [prompt(), prompt(timeout_ms=BRIEF), prompt(timeout_ms=60_000)]
    results = checker.results(configs, *prompts)
    kinds = [found["error_kind"] for found in results]
    assert kinds == ["timeout", "timeout", None, None, "timeout", None]


def test_one_that_trickles_makes_no_other_unavailable(checker: Checker) -> None:
    configs = [checker.config("trickle", timeout_ms=BRIEF), *(checker.config() for _ in range(4))]
    results = checker.results(configs, *[prompt()] * 2)
    assert [found["available"] for found in results] == [False] * 2 + [True] * 8
    assert [found["error_kind"] for found in results[:2]] == ["timeout"] * 2
    latencies = [found["latency_ms"] for found in results[2:]]
    report(f"next to one that trickles: {max(latencies)} ms at most")


def test_pairs_are_checked_together(checker: Checker) -> None:
    """5 configurations with 4 prompts, all of which take a second once all are asked."""
    kinds = [*KINDS, OPENAI]
    configs = [checker.config("crowd", kind, timeout_ms=60_000) for kind in kinds]
    prompts = [prompt(user_message=f"question {n}") for n in range(CROWD // len(kinds))]
    start_ = time.monotonic()
    results = checker.results(configs, *prompts)
    timed("5 configurations x 4 prompts that take 1 s each", time.monotonic() - start_, 2.0)
    assert [found["response"] for found in results] == ["OK"] * CROWD
    requests = [checker.fakes.requests(config["model"]) for config in configs]
    for kind, some in zip(kinds, requests, strict=True):
        assert [one["kind"] for one in some] == [kind] * 4
        texts = sorted(json.dumps(one["body"]) for one in some)
        assert all(f"question {n}" in text for n, text in enumerate(texts))


def test_no_more_pairs_are_checked_at_once_than_the_setting_allows(
    start: Start, fakes: FakeProviders
) -> None:
    flags = ("--llm-check-concurrency", "3", "--log-level", "trace")
    checker = Checker(start(*flags, environ=environment(fakes)), fakes)
    configs = [checker.config("slow", kind) for kind in KINDS]
    results = checker.results(configs, prompt(), prompt())
    assert [found["response"] for found in results] == ["OK"] * 8
    requests = [one for config in configs for one in checker.fakes.requests(config["model"])]
    assert 2 <= max(one["open"] for one in requests) <= 3


def test_another_client_does_not_wait(checker: Checker) -> None:
    """All slots are taken by models that do not answer, some for longer than anybody waits."""
    silent = [checker.config("silent") for _ in range(20)]
    body = {"configs": silent, "test_prompts": [prompt()] * 2}
    pending = checker.daemon.send("POST", "/llm/check", body)
    for config in silent[:10]:  # with two prompts each
        checker.fakes.wait("request", model=config["model"], count=2)
    start_ = time.monotonic()
    assert checker.post({"configs": [], "test_prompts": [prompt()]}).json == []
    assert all(found["available"] for found in checker.results([checker.config()] * 3))
    report(f"3 checks while another client's 20 do not end: {time.monotonic() - start_:.2f} s")
    pending.close()


# --- wrong requests ---


def test_nothing_to_check(checker: Checker) -> None:
    for configs, prompts in (([], [prompt()]), ([checker.config()], []), ([], []), ([{}], [])):
        reply = checker.post({"configs": configs, "test_prompts": prompts})
        assert (reply.status, reply.json) == (200, [])


def test_wrong_configurations_are_the_problem_of_their_pairs(checker: Checker) -> None:
    def less(name: str) -> dict[str, Any]:
        return {key: value for key, value in checker.config().items() if key != name}

    wrong = [
        (checker.config(provider="openai"), "provider: unknown"),
        (less("model"), "configs[1].model: required"),
        (checker.config(model=""), "configs[2].model: "),
        (less("host"), "configs[3].host: required"),
        (less("provider"), "configs[4].provider: required"),
        (checker.config(host="api.openai.com"), "host: expected a URL"),
        (checker.config(model="${nothing}"), "unknown variable ${nothing}"),
        (checker.config(key=f"{KEY} \n"), "key: "),
        (checker.config(key=5), "configs[8].key: expected a string"),
        ({}, "configs[9].host: required"),
    ]
    good = checker.config()
    results = checker.results([*(config for config, _ in wrong), good], prompt(), prompt())
    assert [found["available"] for found in results] == [False] * 20 + [True] * 2
    for found in results[:20]:
        path = wrong[found["config_index"]][1]
        assert path in found["error"]
        assert (found["error_kind"], found["http_status"]) == ("config", None)
    assert len(checker.fakes.requests(good["model"])) == 2


def test_wrong_prompts_are_the_problem_of_their_pairs(checker: Checker) -> None:
    wrong = [
        (prompt(images=["bm8gaW1hZ2U="]), "images[0]: INVALID_IMAGE"),
        (prompt(images=[PNG_TEXT, "not base64"]), "images[1]: INVALID_IMAGE"),
        (prompt(user_message=5), "test_prompts[2].user_message: expected a string"),
        (prompt(max_tokens=0), "test_prompts[3].max_tokens: "),
        ({}, "test_prompts[4].user_message: required"),
    ]
    configs = [checker.config(), checker.config()]
    results = checker.results(configs, *(one for one, _ in wrong), prompt())
    assert [found["available"] for found in results] == ([False] * 5 + [True]) * 2
    for found in results:
        if not found["available"]:
            assert wrong[found["prompt_index"]][1] in found["error"]
            assert found["error_kind"] == "config"
    for config in configs:
        assert len(checker.fakes.requests(config["model"])) == 1


def test_a_number_that_json_does_not_have_is_not_sent(checker: Checker) -> None:
    config = checker.config()
    body = {"configs": [config], "test_prompts": [prompt(temperature=0.123)]}
    reply = checker.post(json.dumps(body).replace("0.123", "1e999").encode())
    assert reply.json["code"] == "invalid_request", reply.json
    assert "expected a number within range" in reply.json["error"]
    assert checker.fakes.requests(config["model"]) == []


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (b"", "body: "),
        (b"{", "body: not JSON"),
        (b"[]", "body: "),
        ({"test_prompts": []}, "configs: required, but missing"),
        ({"configs": []}, "test_prompts: required, but missing"),
        ({"configs": {}, "test_prompts": []}, "configs: expected an array"),
        ({"configs": None, "test_prompts": []}, "configs: expected an array"),
        ({"configs": [], "test_prompts": "x"}, "test_prompts: expected an array"),
        ({"configs": [{}, 5], "test_prompts": []}, "configs[1]: expected an object"),
        ({"configs": [], "test_prompts": [[]]}, "test_prompts[0]: expected an object"),
        ({"configs": {"host": "h", "key": KEY}, "test_prompts": []}, "configs: expected an array"),
        ({"configs": {"key": KEY}, "test_prompts": []}, "configs: expected an array"),
        ({"configs": [KEY], "test_prompts": []}, "configs[0]: expected an object"),
        ({"configs": [TEMPLATE], "test_prompts": []}, "configs[0]: expected an object"),
        ([{"key": KEY}], "body: "),
        (b'{"configs": [{"key": "' + KEY.encode() + b'",}]}', "body: not JSON"),
    ],
)
def test_a_request_that_is_wrong_as_a_whole(checker: Checker, body: object, path: str) -> None:
    reply = checker.post(body)
    assert (reply.status, reply.json["code"]) == (500, "invalid_request")
    assert path in reply.json["error"]
    assert reply.json["retryable"] is False


def test_many_wrong_ones_behind_one_that_is_slow(own: Checker) -> None:
    # As many as there are slots, and a great many that need none.
    slow = own.config("slow")
    prompts = [prompt()] * 16
    results = own.results([slow, *[{}] * 100], *prompts)
    assert [found["available"] for found in results] == [True] * 16 + [False] * 1600
    assert own.results([own.config()], *prompts)[0]["available"]


# --- secrets ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", [KEY, TEMPLATE, WRONG_KEY])
def test_a_provider_that_repeats_the_key(checker: Checker, kind: str, key: str) -> None:
    config = checker.config("repeats_key", kind, key=key)
    found = checker.result(config)
    if key == WRONG_KEY and kind != "ollama":
        assert found["error_kind"] == "auth"
        assert "Incorrect API key provided: [redacted]. Use another." in found["error"]
    else:
        assert found["response"] == "<[redacted]>"
    (request,) = checker.fakes.requests(config["model"])
    expected = KEY if key == TEMPLATE else key
    assert kind == "ollama" or expected in json.dumps(request["headers"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "behaviour",
    [
        "half_key",
        "key_many_times",
        "key_in_wrong_shape",
        "key_escaped",
        "key_escaped_in_wrong_shape",
        "key_in_header",
    ],
)
def test_no_error_has_the_key(checker: Checker, kind: str, behaviour: str) -> None:
    assert not checker.result(checker.config(behaviour, kind, key=TEMPLATE))["available"]


# --- clients that go, and the end ---


@pytest.mark.parametrize("behaviour", ["silent", "trickle"])
def test_a_client_that_goes_takes_its_requests_along(checker: Checker, behaviour: str) -> None:
    configs = [checker.config(behaviour, kind) for kind in KINDS]
    before = len(checker.fakes.events("request"))
    body = {"configs": configs, "test_prompts": [prompt()] * 6}
    pending = checker.daemon.send("POST", "/llm/check", body)
    for config in configs[:3]:
        checker.fakes.wait("request", model=config["model"], count=6)
    checker.fakes.wait("request", model=configs[3]["model"], count=2)
    pending.close()
    for config, count in zip(configs, (6, 6, 6, 2), strict=True):
        checker.fakes.wait("dropped", model=config["model"], count=count)
    assert checker.result(checker.config())["available"]
    assert len(checker.fakes.events("request")) == before + 21, "nobody is asked afterwards"
    checker.search()


def test_a_client_that_goes_while_nothing_is_connected(checker: Checker) -> None:
    host = checker.fakes.host("raw").replace("http:", "https:")
    body = {"configs": [checker.config(host=host)], "test_prompts": [prompt()]}
    checker.daemon.send("POST", "/llm/check", body).close()
    assert checker.result(checker.config())["available"]
    # The connection may never have been made; if it was, it is gone.
    eventually(lambda: not provider_sockets(checker, host), what="no connection is left")


def test_the_manager_ends_during_a_check(own: Checker) -> None:
    configs = [own.config("silent"), own.config("trickle")]
    pending = own.daemon.send(
        "POST", "/llm/check", {"configs": configs, "test_prompts": [prompt()] * 8}
    )
    for config in configs:
        own.fakes.wait("request", model=config["model"], count=8)
    start_ = time.monotonic()
    assert own.daemon.stop() == 0
    timed("end of the manager during a check", time.monotonic() - start_, 1.0)
    pending.close()
    for config in configs:
        own.fakes.wait("dropped", model=config["model"], count=8)
    said = own.daemon.text + own.daemon.errors
    without_secret(said, "the log")
    assert "Traceback" not in said


def sockets_of(daemon: Daemon) -> set[str]:
    """Return the numbers of the sockets that a daemon has open."""
    found = set()
    for path in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            kind, _, number = os.readlink(path).partition(":")
            if kind == "socket":
                found.add(number[1:-1])
    return found


def provider_sockets(checker: Checker, host: str) -> list[str]:
    """Return the daemon's TCP sockets that are connected to a provider's port."""
    port = int(host.split("/")[2].rpartition(":")[2])
    own = sockets_of(checker.daemon)
    lines = Path(f"/proc/{checker.daemon.pid}/net/tcp").read_text().splitlines()[1:]
    rows = [line.split() for line in lines]
    return [row[2] for row in rows if row[9] in own and int(row[2].rpartition(":")[2], 16) == port]


def test_a_provider_that_never_answers_the_end_of_tls(
    start: Start, fakes: FakeProviders, authority: tuple[Path, ssl.SSLContext]
) -> None:
    """Its connection is cut: nobody waits for its farewell, or reads what it still sends."""
    daemon = start(environ={"SSL_CERT_FILE": str(authority[0])})
    checker = Checker(daemon, fakes)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(HANG)
        host = f"https://127.0.0.1:{server.getsockname()[1]}"

        def asked(limit: int) -> bool:
            configs = [checker.config(host=host, timeout_ms=limit)]
            body = {"configs": configs, "test_prompts": [prompt()]}
            pending = daemon.send("POST", "/llm/check", body)
            with server.accept()[0] as connection:
                try:
                    peer = authority[1].wrap_socket(connection, server_side=True)
                    is_heard = peer.recv(65536) != b""
                    peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
                except OSError:  # it has given up
                    return False
                with peer:
                    assert pending.reply().json[0]["error_kind"] == "timeout"
                    eventually(lambda: not provider_sockets(checker, host), what="it is closed")
            return is_heard

        heard_in_time(asked)


@pytest.mark.parametrize("gone", ["timeout", "client"])
def test_a_provider_that_does_not_read_the_request(checker: Checker, gone: str) -> None:
    # It answers a little and reads nothing more, so the end of the request can never be sent.
    image = base64.b64encode(PNG + bytes(12 << 20)).decode()

    def asked(limit: int) -> bool:
        config = checker.raw("deaf", **({"timeout_ms": limit} if gone == "timeout" else {}))
        body = {"configs": [config], "test_prompts": [prompt(images=[image])]}
        pending = checker.daemon.send("POST", "/llm/check", body)
        if gone == "timeout":
            assert pending.reply().json[0]["error_kind"] == "timeout"
        else:
            checker.fakes.wait("raw", tag=config["host"].rpartition("/")[2])
        pending.close()
        eventually(
            lambda: not provider_sockets(checker, config["host"]), what="the connection is closed"
        )
        return was_raw(checker, config)

    heard_in_time(asked)


# --- size ---


def forget_peak(daemon: Daemon) -> int:
    """Let the peak of a daemon's memory start again; returns what it uses now."""
    Path(f"/proc/{daemon.pid}/clear_refs").write_text("5")
    return daemon.peak_memory()


@pytest.mark.parametrize("behaviour", ["large", "large.chunked", "bomb"])
def test_a_body_of_a_hundred_megabytes(checker: Checker, behaviour: str) -> None:
    before = forget_peak(checker.daemon)
    config = checker.config(behaviour)
    found, other = checker.results([config, checker.config()])
    growth = checker.daemon.peak_memory() - before
    report(f"{behaviour}: {growth / 1e6:.0f} MB more memory at most")
    assert (found["error_kind"], other["available"]) == ("bad_response", True)
    assert "longer than 33554432 bytes" in found["error"]
    assert growth < LARGE_BYTES
    if behaviour != "bomb":
        dropped = checker.fakes.wait("dropped", model=config["model"])
        assert dropped["sent"] < LARGE_BYTES


def test_several_bodies_of_a_hundred_megabytes(checker: Checker) -> None:
    before = forget_peak(checker.daemon)
    results = checker.results([*(checker.config("large") for _ in range(4)), checker.config()])
    growth = checker.daemon.peak_memory() - before
    report(f"4 bodies of 100 MB at once: {growth / 1e6:.0f} MB more memory at most")
    assert [found["error_kind"] for found in results] == [*["bad_response"] * 4, None]
    assert growth < 3 * LARGE_BYTES


def test_large_images_and_the_status(checker: Checker) -> None:
    data = PNG + os.urandom(3 << 20)
    configs = [checker.config(kind=kind) for kind in KINDS]
    body = {
        "configs": configs,
        "test_prompts": [prompt(images=[base64.b64encode(data).decode()] * 2)],
    }

    def ask() -> Reply:
        return checker.daemon.request("POST", "/llm/check", body)

    reply = watched(checker.daemon, "4 models get 2 images of 3 MB each", ask)
    assert [found["available"] for found in reply.json] == [True] * 4
    for config in configs:
        (request,) = checker.fakes.requests(config["model"])
        assert request["problems"] == []
        assert int(request["headers"]["content-length"]) > 2 * len(data) * 4 / 3


def test_each_result_as_soon_as_it_is_known(checker: Checker) -> None:
    """With ``Accept: application/x-ndjson`` one line comes for each, while others still wait."""
    configs = [checker.raw("silent"), checker.config(), {"host": 5}]
    body = {"configs": configs, "test_prompts": [prompt()]}
    connection = http.client.HTTPConnection(checker.daemon.address, timeout=HANG)
    headers = {"Accept": "application/x-ndjson"}
    connection.request("POST", "/llm/check", json.dumps(body), headers)
    response = connection.getresponse()
    assert (response.status, response.headers["content-type"]) == (200, "application/x-ndjson")
    lines = [response.readline() for _ in range(2)]
    connection.close()
    without_secret(str(lines), "the reply")
    found = {entry["config_index"]: entry for entry in map(json.loads, lines)}
    assert {index: entry["available"] for index, entry in found.items()} == {1: True, 2: False}
    assert all(sorted(entry) == sorted(MEMBERS) for entry in found.values())
    reply = checker.daemon.request("POST", "/llm/check", {"configs": 1}, headers)
    assert (reply.status, reply.json["code"]) == (500, "invalid_request")
    refused = {"Accept": "application/json, application/x-ndjson;q=0"}
    one = {"configs": [{"host": 5}], "test_prompts": [prompt()]}
    reply = checker.daemon.request("POST", "/llm/check", one, refused)
    assert [entry["available"] for entry in reply.json] == [False]
    checker.search()
