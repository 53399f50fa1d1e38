"""Requests to providers and their answers, the exchange, the check of many."""

from __future__ import annotations

import base64
import gc
import itertools
import json
import re
import secrets
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from OpenSSL import SSL
from service_identity import VerificationError
from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.error import (
    ConnectError,
    ConnectionDone,
    ConnectionLost,
    ConnectionRefusedError,
    DNSLookupError,
    NoRouteError,
    TCPTimedOutError,
)
from twisted.internet.error import TimeoutError as ConnectTimeoutError
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.web.client import (
    RequestTransmissionFailed,
    ResponseDone,
    ResponseFailed,
    ResponseNeverReceived,
)
from twisted.web.error import SchemeNotSupported
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers

from genvm_manager import (
    CHECK_RESPONSE_CHARACTERS,
    INLINE_CHECKS,
    INLINE_LLM_BYTES,
    LLM_ANSWER_MAX_BYTES,
    LLM_SECONDS,
    MAX_JSON_MEMBERS,
    PROVIDER_MESSAGE_CHARACTERS,
    PROVIDERS,
    AnswerMode,
    AvailabilityCheck,
    Backend,
    CheckBody,
    Config,
    ErrorKind,
    Image,
    InvalidRequest,
    LlmAnswer,
    LlmClient,
    LogObserver,
    ManagerError,
    Prompt,
    ProviderError,
    Redactor,
    ResourcesExhausted,
    Usage,
    Variables,
    __version__,
    connection_problem,
    json_of,
    parse_json,
    provider_of,
    provider_url,
    status_problem,
    structure,
)

from .support import ThreadlessReactor, http_client, observing, without_spare_threads

KINDS = ("openai-compatible", "anthropic", "google", "ollama")
KEY = "sk-proj-" + "".join(f"{n:02x}" for n in range(80))
PNG = b"\x89PNG\r\n\x1a\npixels"
PNG_TEXT = "iVBORw0KGgpwaXhlbHM="
JPEG = b"\xff\xd8\xff\xe0"
JPEG_TEXT = "/9j/4A=="
#: Seconds of CPU time that nothing takes unless it is done in a wrong way.
HANG_SECONDS = 10.0
PLAIN = Prompt("Say OK", temperature=0.5, max_tokens=20)
FULL = Prompt(
    user_message="What is this? ☃",
    system_message="Be brief.",
    temperature=0,
    images=(Image.of(PNG), Image.of(JPEG)),
    max_tokens=200,
    use_max_completion_tokens=True,
    seed=42,
)


def backend(kind: str = "openai-compatible", **changes: Any) -> Backend:
    """Return a backend to ask."""
    settings = {"host": "http://h", "provider": kind, "model": "m-1", "key": KEY, **changes}
    return Backend(**settings)


def secret_in(text: str, secret: str = KEY, length: int = 12) -> str | None:
    """Return a piece of a secret that stands in a text."""
    pieces = (secret[at : at + length] for at in range(len(secret) - length + 1))
    return next((piece for piece in pieces if piece in text), None)


# --- requests ---

PATHS = {
    "openai-compatible": "/v1/chat/completions",
    "anthropic": "/v1/messages",
    "google": "/v1beta/models/m-1:generateContent",
    "ollama": "/api/generate",
}
HEADERS = {
    "openai-compatible": {"Authorization": f"Bearer {KEY}"},
    "anthropic": {"x-api-key": KEY, "anthropic-version": "2023-06-01"},
    "google": {"x-goog-api-key": KEY},
}
OWN_HEADERS = ("Content-Type", "User-Agent")
PLAIN_BODIES: dict[str, dict[str, Any]] = {
    "openai-compatible": {
        "model": "m-1",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Say OK"}]}],
        "stream": False,
        "temperature": 0.5,
        "max_tokens": 20,
    },
    "anthropic": {
        "model": "m-1",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Say OK"}]}],
        "max_tokens": 20,
        "temperature": 0.5,
        "stream": False,
    },
    "google": {
        "generationConfig": {
            "responseMimeType": "text/plain",
            "temperature": 0.5,
            "maxOutputTokens": 20,
        },
        "contents": [{"parts": [{"text": "Say OK"}]}],
    },
    "ollama": {
        "model": "m-1",
        "prompt": "Say OK",
        "stream": False,
        "options": {"temperature": 0.5, "num_predict": 20},
        "images": [],
    },
}
FULL_BODIES: dict[str, dict[str, Any]] = {
    "openai-compatible": {
        "model": "m-1",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is this? ☃"},
                    {
                        "type": "image_url",
                        "image_url": {"url": "data:image/png;base64,iVBORw0KGgpwaXhlbHM="},
                    },
                    {
                        "type": "image_url",
                        "image_url": {"url": "data:image/jpeg;base64,/9j/4A=="},
                    },
                ],
            },
        ],
        "stream": False,
        "temperature": 0,
        "max_completion_tokens": 200,
        "seed": 42,
    },
    "anthropic": {
        "model": "m-1",
        "messages": [
            {
                "role": "user",
                "content": [
                    {
                        "type": "image",
                        "source": {
                            "type": "base64",
                            "media_type": "image/png",
                            "data": "iVBORw0KGgpwaXhlbHM=",
                        },
                    },
                    {
                        "type": "image",
                        "source": {
                            "type": "base64",
                            "media_type": "image/jpeg",
                            "data": "/9j/4A==",
                        },
                    },
                    {"type": "text", "text": "What is this? ☃"},
                ],
            }
        ],
        "system": "Be brief.",
        "max_tokens": 200,
        "temperature": 0,
        "stream": False,
    },
    "google": {
        "generationConfig": {
            "responseMimeType": "text/plain",
            "temperature": 0,
            "maxOutputTokens": 200,
        },
        "system_instruction": {"parts": [{"text": "Be brief."}]},
        "contents": [
            {
                "parts": [
                    {"inline_data": {"mime_type": "image/png", "data": "iVBORw0KGgpwaXhlbHM="}},
                    {"inline_data": {"mime_type": "image/jpeg", "data": "/9j/4A=="}},
                    {"text": "What is this? ☃"},
                ]
            }
        ],
    },
    "ollama": {
        "model": "m-1",
        "prompt": "What is this? ☃",
        "stream": False,
        "options": {"temperature": 0, "num_predict": 200, "seed": 42},
        "images": ["iVBORw0KGgpwaXhlbHM=", "/9j/4A=="],
        "system": "Be brief.",
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_request_for_text(kind: str) -> None:
    body = PROVIDERS[kind].body("m-1", PLAIN, AnswerMode.TEXT)
    assert PROVIDERS[kind].path(backend(kind)) == PATHS[kind]
    assert body == PLAIN_BODIES[kind]
    assert json.loads(json.dumps(body)) == body


@pytest.mark.parametrize("kind", KINDS)
def test_request_with_everything(kind: str) -> None:
    body = PROVIDERS[kind].body("m-1", FULL, AnswerMode.TEXT)
    if kind == "google":  # a seed is not in the protocol, see below
        config = {key: value for key, value in body["generationConfig"].items() if key != "seed"}
        body = {**body, "generationConfig": config}
    assert body == FULL_BODIES[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_goes_where_the_protocol_has_it(kind: str) -> None:
    body = PROVIDERS[kind].body("m-1", FULL, AnswerMode.TEXT)
    if kind in ("openai-compatible", "ollama"):
        assert (body if kind != "ollama" else body["options"])["seed"] == 42
    else:
        assert '"seed"' not in json.dumps(body)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_given_is_not_sent(kind: str) -> None:
    prompt = Prompt("x", system_message=None, seed=None)
    text = json.dumps(PROVIDERS[kind].body("m-1", prompt, AnswerMode.TEXT))
    for word in ("seed", "system", "null", "format", "tool"):
        assert word not in text


@pytest.mark.parametrize("kind", KINDS)
def test_empty_and_zero_are_sent(kind: str) -> None:
    prompt = Prompt("", system_message="", seed=0, temperature=0)
    body = PROVIDERS[kind].body("m-1", prompt, AnswerMode.TEXT)
    text = json.dumps(body)
    assert '"temperature": 0' in text
    assert "system" in text
    assert ('"seed": 0' in text) or kind in ("anthropic", "google")


@pytest.mark.parametrize("kind", KINDS)
def test_without_temperature_and_limit(kind: str) -> None:
    prompt = attrs.evolve(PLAIN, temperature=None, max_tokens=None)
    body = PROVIDERS[kind].body("m-1", prompt, AnswerMode.TEXT)
    assert "temperature" not in json.dumps(body)
    limits = re.findall(r'"(\w*_tokens|maxOutputTokens|num_predict)": (\w+)', json.dumps(body))
    # Anthropic demands one.
    assert limits == ([("max_tokens", "4096")] if kind == "anthropic" else [])


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_with_the_key(kind: str) -> None:
    headers = PROVIDERS[kind].all_headers(KEY)
    assert {name: headers[name] for name in headers if name not in OWN_HEADERS} == HEADERS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_is_not_given_is_not_sent(kind: str) -> None:
    assert PROVIDERS[kind].all_headers("").keys() <= {"anthropic-version", *OWN_HEADERS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_key_is_in_no_path_and_no_body(kind: str) -> None:
    for mode in AnswerMode:
        body = PROVIDERS[kind].body("m-1", FULL, mode)
        assert KEY not in PROVIDERS[kind].path(backend(kind)) + json.dumps(body)


@pytest.mark.parametrize("use", [False, True])
def test_only_one_limit_of_tokens_is_sent(use: bool) -> None:
    prompt = Prompt("x", max_tokens=7, use_max_completion_tokens=use)
    body = PROVIDERS["openai-compatible"].body("m-1", prompt, AnswerMode.TEXT)
    limits = {name: body[name] for name in body if name.startswith("max_")}
    assert limits == {"max_completion_tokens" if use else "max_tokens": 7}


@pytest.mark.parametrize("mode", [AnswerMode.JSON, AnswerMode.BOOL])
@pytest.mark.parametrize(
    ("kind", "addition"),
    [
        ("openai-compatible", {"response_format": {"type": "json_object"}}),
        ("ollama", {"format": "json"}),
        (
            "google",
            {
                "generationConfig": {
                    "responseMimeType": "application/json",
                    "temperature": 0.5,
                    "maxOutputTokens": 20,
                }
            },
        ),
    ],
)
def test_request_for_json(kind: str, addition: dict[str, Any], mode: AnswerMode) -> None:
    body = PROVIDERS[kind].body("m-1", PLAIN, mode)
    assert body == {**PLAIN_BODIES[kind], **addition}


@pytest.mark.parametrize("mode", [AnswerMode.JSON, AnswerMode.BOOL])
def test_anthropic_is_forced_to_use_a_tool_for_json(mode: AnswerMode) -> None:
    body = PROVIDERS["anthropic"].body("m-1", PLAIN, mode)
    (tool,) = body.pop("tools")
    assert body.pop("tool_choice") == {"type": "tool", "name": "json_out"}
    assert body == PLAIN_BODIES["anthropic"]
    assert (tool["name"], tool["input_schema"]["type"]) == ("json_out", "object")
    if mode is AnswerMode.BOOL:
        assert tool["input_schema"]["properties"]["result"] == {"type": "boolean"}


@pytest.mark.parametrize(
    ("model", "segment"),
    [
        ("gemini-2.0-flash", "gemini-2.0-flash"),
        ("a/../../b", "a%2F..%2F..%2Fb"),
        ("m?key=1#x", "m%3Fkey%3D1%23x"),
        ("m n\r\n", "m%20n%0D%0A"),
        ("ü", "%C3%BC"),
        ("\ud800", "%3F"),
    ],
)
def test_a_model_stays_within_its_part_of_the_path(model: str, segment: str) -> None:
    path = PROVIDERS["google"].path(backend("google", model=model))
    assert path == f"/v1beta/models/{segment}:generateContent"


def test_unknown_provider() -> None:
    with pytest.raises(ProviderError) as caught:
        provider_of(backend("OpenAI"))
    assert caught.value.kind is ErrorKind.CONFIG
    for name in ("OpenAI", *KINDS):
        assert name in caught.value.message
    assert set(PROVIDERS) == set(KINDS)


@pytest.mark.parametrize(
    ("data", "media_type"),
    [(PNG, "image/png"), (PNG[:8], "image/png"), (JPEG, "image/jpeg"), (JPEG[:3], "image/jpeg")],
)
def test_images(data: bytes, media_type: str) -> None:
    image = Image.of(data)
    assert (image.media_type, base64.b64decode(image.base64())) == (media_type, data)


@pytest.mark.parametrize("data", [b"", b"GIF89a", PNG[:7], JPEG[:2], b" " + PNG, b"RIFF....WEBP"])
def test_what_is_no_image(data: bytes) -> None:
    with pytest.raises(ProviderError, match="INVALID_IMAGE") as caught:
        Image.of(data)
    assert caught.value.kind is ErrorKind.CONFIG


# --- answers ---


def answer(kind: str, text: str | None, *, cut: bool = False) -> dict[str, Any]:
    """Return an answer as each kind gives it."""
    if kind == "openai-compatible":
        choice = {"message": {"content": text}, "finish_reason": "length" if cut else "stop"}
        usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        return {"choices": [choice], "usage": usage}
    if kind == "anthropic":
        usage = {"input_tokens": 3, "output_tokens": 4}
        return {"content": [{"type": "text", "text": text}], "usage": usage}
    if kind == "google":
        parts = {} if text is None else {"parts": [{"text": text}]}
        candidate = {"content": parts, "finishReason": "MAX_TOKENS" if cut else "STOP"}
        usage = {"promptTokenCount": 3, "candidatesTokenCount": 4, "totalTokenCount": 7}
        return {"candidates": [candidate], "usageMetadata": usage}
    return {"response": text, "prompt_eval_count": 3, "eval_count": 4}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["OK", "", "  ```json\n{}```\n", "☃\ud800\x00"])
def test_text_comes_as_it_is(kind: str, text: str) -> None:
    assert PROVIDERS[kind].answer(answer(kind, text), AnswerMode.TEXT) == text


@pytest.mark.parametrize("kind", ["openai-compatible", "google"])
def test_no_text_within_the_limit_is_an_empty_text(kind: str) -> None:
    assert PROVIDERS[kind].answer(answer(kind, None, cut=True), AnswerMode.TEXT) == ""


@pytest.mark.parametrize(
    "data",
    [
        {"choices": [{"message": {}, "finish_reason": "length"}]},
        {"choices": [{"message": {"content": None}, "finish_reason": "length"}]},
    ],
)
def test_openai_without_content(data: dict[str, Any]) -> None:
    assert PROVIDERS["openai-compatible"].answer(data, AnswerMode.TEXT) == ""


@pytest.mark.parametrize("content", [{}, {"parts": []}, {"parts": [{}]}, {"role": "model"}, None])
def test_google_without_text(content: Any) -> None:
    candidate = {"content": content, "finishReason": "MAX_TOKENS"}
    assert PROVIDERS["google"].answer({"candidates": [candidate]}, AnswerMode.TEXT) == ""
    del candidate["content"]
    assert PROVIDERS["google"].answer({"candidates": [candidate]}, AnswerMode.TEXT) == ""


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (
            "google",
            {
                "candidates": [
                    {
                        "content": {
                            "parts": [
                                {"text": "I think", "thought": True},
                                {"text": "a"},
                                {"functionCall": {}},
                                {"text": "b"},
                            ]
                        }
                    }
                ]
            },
        ),
        (
            "anthropic",
            {
                "content": [
                    {"type": "thinking", "thinking": "hm"},
                    {"type": "text", "text": "a"},
                    {"type": "text", "text": "b"},
                ]
            },
        ),
        (
            "openai-compatible",
            {
                "choices": [
                    {
                        "message": {
                            "content": [
                                {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                                {"type": "text", "text": "a"},
                                {"type": "text", "text": "b"},
                            ]
                        }
                    }
                ]
            },
        ),
    ],
)
def test_the_parts_of_an_answer_that_are_no_thoughts_are_joined(kind: str, data: Any) -> None:
    assert asked(data, kind).answer.value == "ab"


@pytest.mark.parametrize(
    "before", [[], [{"type": "thinking"}], [{"type": "text", "text": "Well:"}]]
)
def test_the_tool_of_anthropic_is_found_wherever_it_stands(before: list[Any]) -> None:
    data = {"content": [*before, {"type": "tool_use", "name": "json_out", "input": {"a": 1}}]}
    assert PROVIDERS["anthropic"].answer(data, AnswerMode.JSON) == {"a": 1}


@pytest.mark.parametrize(
    ("data", "kind", "status"),
    [
        ({"error": {"code": 429, "message": "slow down"}}, ErrorKind.RATE_LIMITED, 429),
        ({"error": {"code": 503, "message": "slow down"}}, ErrorKind.OVERLOADED, 503),
        ({"error": {"code": "oops", "message": "slow down"}}, ErrorKind.HTTP, 500),
        ({"error": "slow down"}, ErrorKind.HTTP, 500),
        (
            {"choices": [{"finish_reason": "error", "message": {"content": ""}}]},
            ErrorKind.HTTP,
            500,
        ),
        (
            {"choices": [{"finish_reason": "error", "error": {"code": 502}, "message": {}}]},
            ErrorKind.HTTP,
            502,
        ),
    ],
)
def test_an_error_inside_an_answer_is_an_error(data: Any, kind: ErrorKind, status: int) -> None:
    problem = asked(data, "openai-compatible").problem
    assert (problem.kind, problem.status) == (kind, status)
    assert "error" not in data or "slow down" in problem.message


@pytest.mark.parametrize("mode", [AnswerMode.JSON, AnswerMode.BOOL])
def test_json_in_several_parts_of_gemini(mode: AnswerMode) -> None:
    parts = [{"text": "hm", "thought": True}, {"text": '{"result": '}, {"text": "true}"}]
    data = {"candidates": [{"content": {"parts": parts}}]}
    assert asked(data, "google", mode).answer.value == '{"result": true}'


def test_a_wrong_key_of_gemini() -> None:
    details = [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}]
    error = {"code": 400, "message": "API key not valid", "details": details}
    problem = asked({"error": error}, "google", status=400).problem
    assert (problem.kind, problem.status) == (ErrorKind.AUTH, 400)
    assert "API key not valid" in problem.message


def test_a_model_that_refuses() -> None:
    data = {"choices": [{"message": {"content": None, "refusal": "I cannot"}}]}
    problem = asked(data, "openai-compatible").problem
    assert (problem.kind, problem.status) == (ErrorKind.BAD_RESPONSE, 200)
    assert "the model refused: I cannot" in problem.message


NO_ANSWERS: dict[str, list[Any]] = {
    "openai-compatible": [
        {"choices": []},
        {"choices": [{}]},
        {"choices": None},
        {"choices": [{"message": None, "finish_reason": "length"}]},
        answer("openai-compatible", None),
        {"choices": [{"message": {"content": None, "tool_calls": []}, "finish_reason": "stop"}]},
        {"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]},
    ],
    "anthropic": [
        {"content": []},
        {"content": [{"type": "tool_use", "name": "json_out", "input": {}}]},
        {"content": [{"type": "text", "text": None}]},
        {"content": [{"type": "thinking", "thinking": "hm"}]},
        {"content": "OK"},
    ],
    "google": [
        {"candidates": []},
        {"candidates": [{"content": {"parts": [{"functionCall": {}}]}, "finishReason": "STOP"}]},
        {"candidates": [{"finishReason": "SAFETY"}]},
        {"promptFeedback": {"blockReason": "SAFETY"}},
        {"candidates": [{"content": "OK"}]},
    ],
    "ollama": [{"response": None}, {"message": {"content": "OK"}}],
}


@pytest.mark.parametrize(
    ("kind", "data"), [(kind, data) for kind, all_ in NO_ANSWERS.items() for data in [{}, *all_]]
)
def test_what_is_no_answer_is_a_bad_response(kind: str, data: Any) -> None:
    problem = asked(data, kind).problem
    assert (problem.kind, problem.status) == (ErrorKind.BAD_RESPONSE, 200)


@pytest.mark.parametrize("mode", [AnswerMode.JSON, AnswerMode.BOOL])
@pytest.mark.parametrize("kind", KINDS)
def test_json_is_in_the_answer(kind: str, mode: AnswerMode) -> None:
    data = answer(kind, '{"result": true}')
    if kind == "anthropic":
        tool = {"type": "tool_use", "id": "1", "name": "json_out", "input": {"result": True}}
        data["content"] = [tool]
    value = asked(data, kind, mode).answer.value
    assert (value if isinstance(value, dict) else json.loads(value)) == {"result": True}


@pytest.mark.parametrize("given_", [None, "x", [1], 5])
def test_a_tool_that_is_used_for_something_else_is_a_bad_response(given_: object) -> None:
    data = {"content": [{"type": "tool_use", "name": "json_out", "input": given_}]}
    assert asked(data, "anthropic", AnswerMode.JSON).problem.kind is ErrorKind.BAD_RESPONSE


@pytest.mark.parametrize(
    ("kind", "usage"),
    [
        ("openai-compatible", Usage(3, 4, 7)),
        ("anthropic", Usage(3, 4, None)),
        ("google", Usage(3, 4, 7)),
        ("ollama", Usage(3, 4, None)),
    ],
)
def test_usage(kind: str, usage: Usage) -> None:
    assert asked(answer(kind, "OK"), kind).answer.usage == usage


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("usage", [None, [], "3", {"prompt_tokens": "3", "input_tokens": True}])
def test_usage_that_makes_no_sense_is_unknown(kind: str, usage: Any) -> None:
    data = {**answer(kind, "OK"), "usage": usage, "usageMetadata": usage}
    data |= {"prompt_eval_count": 1.5, "eval_count": None} if kind == "ollama" else {}
    assert asked(data, kind).answer == LlmAnswer("OK", Usage(None, None, None))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("choices", "message", "content", "finish_reason", "text", "input"),
                    *("candidates", "parts", "finishReason", "response", "usage", "usageMetadata"),
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.sampled_from(KINDS), st.sampled_from(list(AnswerMode)), JSON_VALUES)
def test_whatever_comes_is_an_answer_or_a_bad_response(
    kind: str, mode: AnswerMode, data: Any
) -> None:
    exchange = asked(data, kind, mode)
    if exchange.error is None:
        assert isinstance(exchange.answer.value, str | dict)
    else:
        assert exchange.problem.kind is ErrorKind.BAD_RESPONSE


# --- addresses ---


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("https://api.openai.com", "https://api.openai.com/p"),
        ("https://api.openai.com/", "https://api.openai.com/p"),
        ("https://api.openai.com///", "https://api.openai.com/p"),
        ("http://127.0.0.1:11434", "http://127.0.0.1:11434/p"),
        ("http://[::1]:80/", "http://[::1]:80/p"),
        ("https://h.example/some/proxy/", "https://h.example/some/proxy/p"),
        ("https://bücher.example", "https://bücher.example/p"),
    ],
)
def test_provider_url(host: str, url: str) -> None:
    assert provider_url(host, "/p") == url


@pytest.mark.parametrize(
    "host",
    [
        *("", "/", "api.openai.com", "localhost:80", "//h", "http://", "http:///p", "https:h"),
        *("ftp://h", "file:///etc/passwd", "unix:///s", "http://h:x", "http://h\r\nX: 1"),
        *("http://h h", "http://h\x00", "http://[::1", "javascript:alert(1)"),
        *("https://user:password@h", "https://user@h"),
    ],
)
def test_what_is_no_address_of_a_provider(host: str) -> None:
    with pytest.raises(ProviderError, match="host: expected a URL") as caught:
        provider_url(host, "/p")
    assert caught.value.kind is ErrorKind.CONFIG


@pytest.mark.parametrize("host", ["http://h?x=1", "http://h/p?", "http://h#part"])
def test_a_host_after_which_no_path_can_follow(host: str) -> None:
    with pytest.raises(ProviderError) as caught:
        provider_url(host, "/p")
    assert caught.value.kind is ErrorKind.CONFIG


# --- problems ---

STATUS_KINDS = {
    **dict.fromkeys((401, 403), ErrorKind.AUTH),
    404: ErrorKind.NOT_FOUND,
    429: ErrorKind.RATE_LIMITED,
    **dict.fromkeys((408, 503, 504, 529), ErrorKind.OVERLOADED),
    **dict.fromkeys((201, 204, 301, 302, 307, 400, 402, 405, 409, 413, 422), ErrorKind.HTTP),
    **dict.fromkeys((500, 501, 502, 520), ErrorKind.HTTP),
}


@pytest.mark.parametrize(("status", "kind"), STATUS_KINDS.items())
def test_kind_of_a_status(status: int, kind: ErrorKind) -> None:
    problem = asked({"error": {"message": "because"}}, status=status).problem
    assert (problem.kind, problem.status) == (kind, status)
    assert f"status {status}: because" in problem.message


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b'{"error": {"message": "a b", "type": "t"}}', "a b"),
        (b'{"type": "error", "error": {"type": "t", "message": "a b"}}', "a b"),
        (b'[{"error": {"code": 400, "message": "a b"}}]', "a b"),
        (b'{"error": "a b"}', "a b"),
        (b'{"message": "a b"}', "a b"),
        (b'"a b"', "a b"),
        (b'{"detail": "a b"}', '{"detail": "a b"}'),
        (b'{"error": {"message": null}}', '{"error": {"message": null}}'),
        (b"[]", "[]"),
        (b"null", "null"),
        (b"<h1>Bad Gateway</h1>", "<h1>Bad Gateway</h1>"),
        (b"  \n a b \r\n", "a b"),
        (b"\xff\xfea", "\ufffd\ufffda"),
        (b"[" * 100_000, "[[["),
    ],
)
def test_the_message_of_the_provider_is_shown(body: bytes, shown: str) -> None:
    assert f"status 418: {shown}" in status_problem(418, "http://h/p", body).message


@pytest.mark.parametrize("body", [b"", b" \r\n"])
def test_an_error_without_a_message(body: bytes) -> None:
    assert status_problem(503, "http://h/p", body).message.endswith("try later: status 503")


def wrapped(error: Exception) -> Exception:
    """Return an exception as the HTTP client wraps it."""
    return ResponseNeverReceived([Failure(error)])


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DNSLookupError("no address"), ErrorKind.DNS),
        (ConnectionRefusedError(), ErrorKind.CONNECT),
        (NoRouteError(), ErrorKind.CONNECT),
        (ConnectError(), ErrorKind.CONNECT),
        (wrapped(ConnectionLost()), ErrorKind.CONNECT),
        (wrapped(ConnectionDone()), ErrorKind.CONNECT),
        (RequestTransmissionFailed([Failure(ConnectionLost())]), ErrorKind.CONNECT),
        (ResponseFailed([Failure(ConnectionLost())]), ErrorKind.CONNECT),
        (ConnectTimeoutError(), ErrorKind.TIMEOUT),
        (TCPTimedOutError(), ErrorKind.TIMEOUT),
        (wrapped(SSL.Error([("SSL routines", "", "wrong version number")])), ErrorKind.TLS),
        (wrapped(VerificationError(errors=[])), ErrorKind.TLS),
        (SSL.Error(), ErrorKind.TLS),
        (SchemeNotSupported("ftp"), ErrorKind.CONFIG),
    ],
)
def test_kind_of_an_exception(error: Exception, kind: ErrorKind) -> None:
    problem = asked(error=error).problem
    assert (problem.kind, problem.status) == (kind, None)
    assert connection_problem(error)[0] == kind.value
    assert problem.message


# --- the exchange ---


class FakeBody:
    """The connection that a response comes from."""

    dropped = False

    def loseConnection(self) -> None:
        """See ``ITransport``."""
        self.dropped = True

    abortConnection = loseConnection

    def stopProducing(self) -> None:
        """See ``IPushProducer``."""
        self.dropped = True


class FakeResponse:
    """A response whose body comes when the test says so."""

    def __init__(self, code: int = 200) -> None:
        self.code = code
        self.headers = Headers()
        self.length = None
        self.transport = FakeBody()
        self.protocol: Any = None

    def deliverBody(self, protocol: Any) -> None:
        """See ``IResponse``."""
        self.protocol = protocol
        protocol.makeConnection(self.transport)

    def send(self, data: bytes, end: type[Exception] | None = ResponseDone) -> None:
        """Let the body come, and end unless ``end`` is none."""
        self.protocol.dataReceived(data)
        if end is not None:
            self.protocol.connectionLost(Failure(end()))


class FakeHttp:
    """An HTTP client that sends nothing."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, Any]]] = []
        self.responses: list[Deferred[Any]] = []
        self.cancelled = 0

    def request(self, method: str, url: str, **options: Any) -> Deferred[Any]:
        """See ``treq.client.HTTPClient``."""

        def cancelled(_: object) -> None:
            self.cancelled += 1

        self.requests.append((method, url, options))
        self.responses.append(Deferred(cancelled))
        return self.responses[-1]


class Exchange:
    """One question to a fake provider."""

    def __init__(
        self,
        target: Backend | None = None,
        prompt: Prompt = PLAIN,
        mode: Any = AnswerMode.TEXT,
        loading: Deferred[None] | None = None,
    ) -> None:
        self.http = FakeHttp()
        self.clock = ThreadlessReactor()
        self.result: list[Any] = []
        client = LlmClient(self.clock, http_client(self.http, loading))
        asking = client.ask(target or backend(), prompt, mode)
        self.waiting = Deferred.fromCoroutine(asking)
        self.waiting.addBoth(self.result.append)

    def respond(self, code: int = 200) -> FakeResponse:
        """Let the head of a response come."""
        response = FakeResponse(code)
        self.http.responses[0].callback(response)
        return response

    @property
    def error(self) -> BaseException | None:
        """What went wrong."""
        (result,) = self.result
        return result.value if isinstance(result, Failure) else None

    @property
    def problem(self) -> ProviderError:
        """What went wrong, which must be a ``ProviderError``."""
        assert isinstance(self.error, ProviderError), self.result
        return self.error

    @property
    def answer(self) -> LlmAnswer:
        """The answer, which there must be."""
        (result,) = self.result
        assert isinstance(result, LlmAnswer), result
        return result


def asked(
    data: Any = None,
    kind: str = "openai-compatible",
    mode: AnswerMode = AnswerMode.TEXT,
    *,
    status: int = 200,
    error: Exception | None = None,
) -> Exchange:
    """Return a whole exchange whose reply has ``data`` as JSON, or that fails with ``error``."""
    exchange = Exchange(backend(kind), mode=mode)
    if error is not None:
        exchange.http.responses[0].errback(error)
        if not exchange.result:  # it is sent once more where a kept connection was closed
            exchange.http.responses[1].errback(error)
    else:
        exchange.respond(status).send(json.dumps(data).encode())
    return exchange


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_sent(kind: str) -> None:
    exchange = asked(answer(kind, "OK"), kind)
    ((method, url, options),) = exchange.http.requests
    assert (method, url) == ("POST", f"http://h{PATHS[kind]}")
    assert json.loads(options["data"]) == PLAIN_BODIES[kind]
    headers = options["headers"]
    headers = {k: v for k, v in headers.items() if kind != "ollama" or k != "Authorization"}
    own = {"Content-Type": "application/json", "User-Agent": f"genvm-manager/{__version__}"}
    assert headers == {**HEADERS.get(kind, {}), **own}
    assert options["allow_redirects"] is False
    assert exchange.clock.getDelayedCalls() == []


@pytest.mark.parametrize("key", ["a b", "a\r\nX-Evil: 1", "schlüssel", "a\x00b", "a\tb", "\ud800"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_fits_no_header_is_not_sent(kind: str, key: str) -> None:
    exchange = Exchange(backend(kind, key=key))
    assert exchange.problem.kind is ErrorKind.CONFIG
    assert "key: " in exchange.problem.message
    assert key not in exchange.problem.message
    assert exchange.http.requests == []


@pytest.mark.parametrize(
    "changes", [{"host": "h"}, {"provider": "gpt"}, {"host": "http://h/" + "x" * 8192}]
)
def test_a_configuration_that_cannot_be_used_sends_nothing(changes: dict[str, str]) -> None:
    exchange = Exchange(backend(**changes))
    assert exchange.problem.kind is ErrorKind.CONFIG
    assert exchange.http.requests == []


def test_time_runs_out_before_there_is_a_connection() -> None:
    exchange = Exchange(backend(timeout=5))
    exchange.clock.advance(4.9)
    assert exchange.result == []
    exchange.clock.advance(0.2)
    assert exchange.problem.kind is ErrorKind.TIMEOUT
    assert "5 s" in exchange.problem.message
    assert exchange.http.cancelled == 1


def test_what_has_to_be_loaded_first_takes_none_of_the_time() -> None:
    loading: Deferred[None] = Deferred()
    exchange = Exchange(backend(timeout=5), loading=loading)
    exchange.clock.advance(10)
    assert (exchange.result, exchange.http.requests) == ([], [])
    loading.callback(None)
    assert len(exchange.http.requests) == 1
    exchange.clock.advance(4.9)
    assert exchange.result == []
    exchange.clock.advance(0.2)
    assert exchange.problem.kind is ErrorKind.TIMEOUT


def test_what_cannot_be_loaded() -> None:
    exchange = Exchange(backend(), loading=fail(ResourcesExhausted("no thread")))
    assert "no thread" in exchange.problem.message
    assert exchange.http.requests == []


def test_a_question_is_withdrawn_while_it_has_to_wait_for_what_is_loaded() -> None:
    exchange = Exchange(backend(), loading=Deferred())
    exchange.waiting.cancel()
    assert isinstance(exchange.error, CancelledError)
    assert exchange.http.requests == []


def test_time_runs_out_within_the_body() -> None:
    exchange = Exchange(backend(timeout=5))
    exchange.clock.advance(3)
    response = exchange.respond()
    for _ in range(19):
        response.send(b" ", end=None)
        exchange.clock.advance(0.1)
    assert exchange.result == []
    exchange.clock.advance(0.2)
    assert exchange.problem.kind is ErrorKind.TIMEOUT
    assert response.transport.dropped
    response.send(b"late")
    assert len(exchange.result) == 1


def test_the_default_time_is_a_minute() -> None:
    exchange = Exchange()
    exchange.clock.advance(59.9)
    assert (exchange.result, LLM_SECONDS) == ([], 60)
    exchange.clock.advance(0.2)
    assert exchange.problem.kind is ErrorKind.TIMEOUT


def test_cancelling_before_there_is_a_response() -> None:
    exchange = Exchange()
    exchange.waiting.cancel()
    assert isinstance(exchange.error, CancelledError)
    assert exchange.http.cancelled == 1
    assert exchange.clock.getDelayedCalls() == []


def test_cancelling_within_the_body_drops_the_connection() -> None:
    exchange = Exchange()
    response = exchange.respond()
    response.send(b"{", end=None)
    exchange.waiting.cancel()
    assert isinstance(exchange.error, CancelledError)
    assert response.transport.dropped
    assert exchange.clock.getDelayedCalls() == []


def test_a_body_that_is_too_large_is_dropped() -> None:
    exchange = Exchange()
    response = exchange.respond()
    piece = b" " * (1 << 20)
    for _ in range(LLM_ANSWER_MAX_BYTES >> 20):
        response.send(piece, end=None)
    assert exchange.result == []
    assert LLM_ANSWER_MAX_BYTES == 32 << 20
    response.send(b" ", end=None)
    assert (exchange.problem.kind, exchange.problem.status) == (ErrorKind.BAD_RESPONSE, 200)
    assert response.transport.dropped
    assert exchange.clock.getDelayedCalls() == []


def test_a_body_of_the_largest_size_is_read() -> None:
    exchange = Exchange()
    data = json.dumps(answer("openai-compatible", "OK")).encode()
    exchange.respond().send(data + b" " * (LLM_ANSWER_MAX_BYTES - len(data)))
    exchange.clock.work()
    assert exchange.answer.value == "OK"


@pytest.mark.parametrize("large", ["user_message", "system_message", "images"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_large_prompt_is_encoded_in_a_thread(kind: str, large: str) -> None:
    text = "x" * (INLINE_LLM_BYTES + 1)
    value: Any = (Image(text.encode(), "image/png"),) if large == "images" else text
    exchange = Exchange(backend(kind), attrs.evolve(PLAIN, **{large: value}))
    assert exchange.http.requests == []
    assert len(exchange.clock.jobs) == 1
    exchange.clock.work()
    ((_, _, options),) = exchange.http.requests
    assert len(options["data"]) > INLINE_LLM_BYTES


def test_cancelling_while_a_prompt_is_encoded() -> None:
    exchange = Exchange(prompt=attrs.evolve(PLAIN, user_message="x" * 100_000))
    exchange.waiting.cancel()
    assert isinstance(exchange.error, CancelledError)
    exchange.clock.work()
    assert exchange.http.requests == []
    assert exchange.clock.getDelayedCalls() == []


def test_a_large_answer_is_read_in_a_thread_and_within_the_time() -> None:
    data = json.dumps(answer("openai-compatible", "x" * INLINE_LLM_BYTES)).encode()
    exchange = Exchange()
    exchange.respond().send(data)
    assert exchange.result == []
    exchange.clock.work()
    assert exchange.answer.value == "x" * INLINE_LLM_BYTES
    late = Exchange(backend(timeout=5))
    late.respond().send(data)
    late.clock.advance(5.1)
    assert late.problem.kind is ErrorKind.TIMEOUT
    late.clock.work()
    assert len(late.result) == 1


def test_an_answer_of_a_great_many_members_is_refused() -> None:
    """In memory they are a hundred times as large."""
    exchange = Exchange()
    exchange.respond().send(b'{"choices": [' + b"[]," * (MAX_JSON_MEMBERS + 1) + b"[]]}")
    exchange.clock.work()
    assert (exchange.problem.kind, exchange.problem.status) == (ErrorKind.BAD_RESPONSE, 200)
    assert "members" in exchange.problem.message


def test_a_byte_order_mark_before_an_answer() -> None:
    data = json.dumps(answer("openai-compatible", "OK")).encode()
    exchange = Exchange()
    exchange.respond().send(b"\xef\xbb\xbf" + data)
    assert exchange.answer.value == "OK"


def test_a_body_whose_end_only_the_connection_tells_is_read() -> None:
    exchange = Exchange()
    data = json.dumps(answer("openai-compatible", "OK")).encode()
    exchange.respond().send(data, end=PotentialDataLoss)
    assert exchange.answer.value == "OK"


@pytest.mark.parametrize("data", [b"", b"{", b"OK", b"<html>", b"\xff\xfe\xff", b"[" * 100_000])
def test_a_body_that_is_no_json(data: bytes) -> None:
    exchange = Exchange()
    exchange.respond().send(data)
    exchange.clock.work()
    assert (exchange.problem.kind, exchange.problem.status) == (ErrorKind.BAD_RESPONSE, 200)


def test_a_body_that_breaks_off() -> None:
    exchange = Exchange()
    response = exchange.respond()
    response.send(b'{"choices"', end=None)
    response.protocol.connectionLost(Failure(ResponseFailed([Failure(ConnectionLost())])))
    assert (exchange.problem.kind, exchange.problem.status) == (ErrorKind.CONNECT, 200)
    assert "in the body" in exchange.problem.message
    assert exchange.problem.url == f"http://h{PATHS['openai-compatible']}"


# --- the check ---


class FakeClient:
    """Stands in for ``LlmClient``; the test answers."""

    def __init__(self, *, at_once: Any = None) -> None:
        self.asked: list[tuple[Backend, Prompt, AnswerMode]] = []
        self.answers: list[Deferred[Any]] = []
        self.cancelled = 0
        self._at_once = at_once

    def ready(self) -> Deferred[None]:
        """There is nothing to load."""
        return succeed(None)

    def ask(self, target: Backend, prompt: Prompt, mode: AnswerMode) -> Deferred[Any]:
        """See ``LlmClient``."""

        def cancelled(_: object) -> None:
            self.cancelled += 1

        self.asked.append((target, prompt, mode))
        self.answers.append(Deferred(cancelled))
        if self._at_once is not None:
            return succeed(None).addCallback(lambda _: self._at_once(target))
        return self.answers[-1]

    @property
    def open(self) -> int:
        """How many are asked and have not answered."""
        return sum(not waiting.called for waiting in self.answers)

    def answer(self, index: int, text: str = "OK") -> None:
        """Let one answer."""
        self.answers[index].callback(LlmAnswer(text, Usage(1, 2, 3)))


class Checked:
    """A check with a fake client."""

    def __init__(
        self,
        configs: list[Any],
        prompts: list[Any],
        *,
        client: Any = None,
        redactor: Redactor | None = None,
        check: AvailabilityCheck | None = None,
        variables: Variables | None = None,
        threads: bool = True,
        **settings: Any,
    ) -> None:
        self.clock = ThreadlessReactor()
        self.client = cast(Any, client or FakeClient())
        self.redactor = redactor or Redactor()
        config = Config(root=Path("/genvm"), **settings)
        self.check = check or AvailabilityCheck(
            config,
            self.clock,
            self.client,
            variables or Variables(config.root / "config"),
            self.redactor,
        )
        self.threads = cast(Any, self.check)._reactor
        self.outcome: list[Any] = []
        body = structure({"configs": configs, "test_prompts": prompts}, CheckBody)
        self.waiting = Deferred.fromCoroutine(self.check.check(body))
        self.waiting.addBoth(self.outcome.append)
        self.threads.advance(0)
        if threads:
            self.threads.work()
            self.threads.advance(0)

    @property
    def results(self) -> list[dict[str, Any]]:
        """What the check says, which must be over."""
        (outcome,) = self.outcome
        assert isinstance(outcome, list), outcome
        return [json.loads(json_of(result)) for result in outcome]

    def answer(self, index: int) -> None:
        """Let a model answer, and the next ones be asked."""
        self.client.answer(index)
        self.threads.advance(0)

    def asked(self) -> list[tuple[str, str]]:
        """Return model and message of everything that was asked."""
        return [(target.model, prompt.user_message) for target, prompt, _ in self.client.asked]


def config(model: str = "m-1", **changes: Any) -> dict[str, Any]:
    """Return one of ``configs``."""
    host = "http://h"
    return {"host": host, "provider": "openai-compatible", "model": model, "key": KEY, **changes}


def prompt(message: str = "hi", **changes: Any) -> dict[str, Any]:
    """Return one of ``test_prompts``."""
    return {"user_message": message, **changes}


def test_pairs_are_asked_and_answered_by_configuration_first() -> None:
    checked = Checked([config("a"), config("b")], [prompt("1"), prompt("2"), prompt("3")])
    pairs = [("a", "1"), ("a", "2"), ("a", "3"), ("b", "1"), ("b", "2"), ("b", "3")]
    assert checked.asked() == pairs
    assert all(mode is AnswerMode.TEXT for *_, mode in checked.client.asked)
    for index in (5, 0, 3, 2, 4, 1):
        checked.client.answer(index, "".join(pairs[index]))
    found = [(r["config_index"], r["prompt_index"], r["response"]) for r in checked.results]
    assert found[:3] == [(0, 0, "a1"), (0, 1, "a2"), (0, 2, "a3")]
    assert found[3:] == [(1, 0, "b1"), (1, 1, "b2"), (1, 2, "b3")]


def test_a_result() -> None:
    checked = Checked([config()], [prompt()])
    checked.clock.advance(0.25)
    checked.client.answer(0, "Hello")
    assert checked.results == [
        {
            "config_index": 0,
            "prompt_index": 0,
            "available": True,
            "error": None,
            "response": "Hello",
            "latency_ms": 250,
            "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
            "error_kind": None,
            "http_status": 200,
        }
    ]


def test_an_empty_answer_is_an_answer() -> None:
    checked = Checked([config()], [prompt()])
    checked.client.answer(0, "")
    assert (checked.results[0]["available"], checked.results[0]["response"]) == (True, "")


def test_a_problem() -> None:
    checked = Checked([config()], [prompt()])
    problem = ProviderError(ErrorKind.RATE_LIMITED, "status 429: slow down", status=429)
    checked.client.answers[0].errback(problem)
    (result,) = checked.results
    assert result.pop("error").endswith("status 429: slow down")
    assert result == {
        "config_index": 0,
        "prompt_index": 0,
        "available": False,
        "response": None,
        "latency_ms": 0,
        "usage": None,
        "error_kind": "rate_limited",
        "http_status": 429,
    }


@pytest.mark.parametrize(("configs", "prompts"), [([], [{}]), ([{}], []), ([], [])])
def test_nothing_to_check(configs: list[Any], prompts: list[Any]) -> None:
    assert Checked(configs, prompts).results == []


def test_at_most_so_many_are_asked_at_once() -> None:
    checked = Checked([config("a"), config("b")], [prompt()] * 5, llm_check_concurrency=3)
    assert len(checked.client.asked) == 3
    for index in range(10):
        assert checked.client.open == min(3, 10 - index)
        checked.answer(index)
    assert [result["available"] for result in checked.results] == [True] * 10


def test_the_default_is_20_at_once() -> None:
    assert len(Checked([config()], [prompt()] * 24).client.asked) == 20


def test_time_starts_when_a_model_is_asked() -> None:
    checked = Checked([config()], [prompt()] * 2, llm_check_concurrency=1)
    checked.clock.advance(5)
    checked.client.answer(0)
    checked.clock.advance(1)
    checked.client.answer(1)
    assert [result["latency_ms"] for result in checked.results] == [5000, 1000]


def test_one_that_fails_affects_no_other() -> None:
    checked = Checked([config("a"), config("b")], [prompt()])
    checked.client.answers[0].errback(ProviderError(ErrorKind.DNS, "no such name"))
    assert checked.outcome == []
    checked.client.answer(1)
    assert [result["available"] for result in checked.results] == [False, True]


def test_one_that_fails_in_a_way_that_nobody_foresaw_affects_no_other() -> None:
    checked = Checked([config("a"), config("b")], [prompt()])
    checked.client.answers[0].errback(RuntimeError("a bug"))
    checked.client.answer(1)
    assert [result["available"] for result in checked.results] == [False, True]


def test_each_turn_of_the_reactor_asks_one() -> None:
    """Whoever waits for a turn and is cancelled costs nothing."""
    first = Checked([config()], [prompt()], llm_check_concurrency=8)
    body = structure({"configs": [config()], "test_prompts": [prompt()] * 3}, CheckBody)
    cancelled, other = (Deferred.fromCoroutine(first.check.check(body)) for _ in range(2))
    cancelled.addErrback(lambda _: None)
    asked = [len(first.client.asked)]
    while calls := first.threads.calls[:]:
        for call in calls:  # as a reactor does, not what they schedule
            first.threads.calls.remove(call)
            call.func(*call.args, **call.kw)
        asked.append(len(first.client.asked))
        if asked[-1] == 3:
            cancelled.cancel()
    assert {after - before for before, after in itertools.pairwise(asked)} <= {0, 1}
    assert 4 <= asked[-1] < 7
    other.addErrback(lambda _: None).cancel()


def test_cancelling_cancels_everything() -> None:
    checked = Checked([config()], [prompt()] * 3)
    checked.waiting.cancel()
    assert checked.client.cancelled == 3
    assert len(checked.outcome) == 1


def test_nobody_is_asked_after_cancelling() -> None:
    checked = Checked([config()], [prompt()] * 6, llm_check_concurrency=2)
    checked.waiting.cancel()
    assert len(checked.client.asked) == 2
    assert checked.client.cancelled == 2


def test_cancelling_one_check_leaves_another_alone() -> None:
    first = Checked([config("a")], [prompt()] * 3, llm_check_concurrency=2)
    second = Checked([config("b")], [prompt()] * 2, check=first.check)
    assert [model for model, _ in first.asked()] == ["a", "a", "b"]
    first.waiting.cancel()
    asked_models = [target.model for target, *_ in first.client.asked]
    assert asked_models.count("b") == 2
    for waiting in [waiting for waiting in first.client.answers if not waiting.called]:
        waiting.callback(LlmAnswer("OK", Usage()))
    assert [result["available"] for result in second.results] == [True, True]
    third = Checked([config("c")], [prompt()] * 2, check=first.check)
    assert [target.model for target, *_ in first.client.asked][-2:] == ["c", "c"]
    assert third.outcome == []


def test_nobody_waits_for_the_models_of_another() -> None:
    """One model is asked for each request in any case; the other slots are given in turn."""
    first = Checked([config("a")], [prompt()] * 9, llm_check_concurrency=3)
    second = Checked([config("b")], [prompt()] * 4, check=first.check)
    assert [model for model, _ in first.asked()] == ["a", "a", "a", "b"]
    first.answer(3)  # its only one
    assert [model for model, _ in first.asked()][4:] == ["b"]
    first.answer(0)
    first.answer(1)
    assert [model for model, _ in first.asked()][5:] == ["a", "b"]
    for index in (4, 6, 8):  # one of the first in between: they get slots in turn
        first.answer(index)
    assert [found["available"] for found in second.results] == [True] * 4
    assert first.outcome == []
    first.waiting.cancel()


def test_whoever_ends_last_leaves_nothing_behind() -> None:
    problems: list[dict[str, Any]] = []
    with observing(lambda event: problems.append(event) if "log_failure" in event else None):
        first = Checked([config("a")], [prompt()] * 9, llm_check_concurrency=3)
        second = Checked([config("b")], [prompt()] * 4, check=first.check)
        for index in (3, 0, 1, 4, 6, 8):
            first.answer(index)
        assert [found["available"] for found in second.results] == [True] * 4
        first.waiting.cancel()
        del first, second
        gc.collect()
    assert problems == []


@pytest.mark.parametrize(
    ("configs", "prompts"),
    [
        ([{}] * (INLINE_CHECKS + 1), []),
        ([], [prompt()] * (INLINE_CHECKS + 1)),
        ([config()], [prompt(images=["iVBORw0KGgpwaXhlbHM="])]),
        ([config(key="k" * INLINE_LLM_BYTES)], [prompt()]),
        ([dict.fromkeys(map(str, range(INLINE_LLM_BYTES)), 0)], [prompt()]),
    ],
)
def test_large_requests_are_read_in_a_thread(configs: list[Any], prompts: list[Any]) -> None:
    checked = Checked(configs, prompts, threads=False)
    assert checked.client.asked == checked.outcome == []
    assert len(checked.threads.jobs) == 1
    checked.threads.work()
    assert checked.client.asked or checked.outcome


def test_a_request_that_is_cancelled_while_it_is_read() -> None:
    checked = Checked([config()] * 40, [prompt()], threads=False)
    checked.waiting.cancel()
    checked.threads.work()
    assert checked.client.asked == []
    (failure,) = checked.outcome
    assert failure.check(CancelledError)


def test_thousands_of_wrong_ones_do_not_hold_the_reactor() -> None:
    checked = Checked([{}] * 5000, [prompt()] * 2, threads=False)
    checked.redactor.keep("others", [f"an older key {number}" for number in range(1000)])
    calls: list[Callable[[], object]] = []
    checked.threads.callFromThread = lambda call, *args: calls.append(partial(call, *args))
    begin = time.thread_time()
    checked.threads.work()
    in_thread = time.thread_time() - begin
    (go_on,) = calls
    begin = time.thread_time()
    go_on()
    in_reactor = time.thread_time() - begin
    assert len(checked.results) == 10_000
    assert in_reactor < in_thread / 3


def test_only_the_beginning_of_a_long_answer_is_shown() -> None:
    key = "sk-0123456789abcdef"
    for before in range(CHECK_RESPONSE_CHARACTERS - 25, CHECK_RESPONSE_CHARACTERS + 5):
        checked = Checked([config(key=key)], [prompt()])
        checked.client.answer(0, "~" * before + key + "~" * 1000)
        (found,) = checked.results
        assert len(found["response"]) <= CHECK_RESPONSE_CHARACTERS
        assert found["response"].endswith("…")
        assert secret_in(found["response"], key, 4) is None
    checked = Checked([config(key=key)], [prompt()])
    checked.client.answer(0, "~" * CHECK_RESPONSE_CHARACTERS)
    assert checked.results[0]["response"] == "~" * CHECK_RESPONSE_CHARACTERS


def test_many_wrong_configurations_behind_one_that_is_asked() -> None:
    checked = Checked([config(), *[{}] * 3000], [prompt()], llm_check_concurrency=1)
    checked.client.answer(0)
    results = checked.results
    assert [result["available"] for result in results] == [True, *[False] * 3000]
    assert {result["error_kind"] for result in results[1:]} == {"config"}
    again = Checked([config()], [prompt()], check=checked.check)
    checked.client.answer(1)
    assert again.results[0]["available"]


def test_so_many_pairs_are_refused_as_a_whole() -> None:
    checked = Checked([{}] * 101, [{}] * 100)
    (failure,) = checked.outcome
    assert isinstance(failure.value, InvalidRequest)
    assert "configs, test_prompts: 10100 pairs" in failure.value.message
    assert len(Checked([{}] * 100, [{}] * 100).results) == 10_000
    for configs, prompts in (([{}] * 10_001, []), ([], [{}] * 10_001)):
        (failure,) = Checked(configs, prompts).outcome
        assert isinstance(failure.value, InvalidRequest)


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"provider": "gpt"}, "provider: unknown"),
        ({"provider": None}, "configs[0].provider: expected a string"),
        ({"model": ""}, "configs[0].model: "),
        ({"model": 4}, "configs[0].model: expected a string"),
        ({"host": 5}, "configs[0].host: expected a string"),
        ({"key": 12345678}, "configs[0].key: expected a string"),
        ({"key": None}, "configs[0].key: expected a string"),
        ({"host": "${nothing}"}, "unknown variable ${nothing}"),
        ({"timeout_ms": 0}, "configs[0].timeout_ms: expected an integer of at least 1"),
        ({"timeout_ms": 1.5}, "configs[0].timeout_ms: "),
        ({"timeout_ms": True}, "configs[0].timeout_ms: "),
        ({"timeout_ms": "60"}, "configs[0].timeout_ms: "),
    ],
)
def test_a_wrong_configuration_is_the_problem_of_its_pairs(
    changes: dict[str, Any], path: str
) -> None:
    checked = Checked([config(**changes), config("good")], [prompt("1"), prompt("2")])
    assert checked.asked() == [("good", "1"), ("good", "2")]
    checked.client.answer(0)
    checked.client.answer(1)
    results = checked.results
    assert [result["available"] for result in results] == [False, False, True, True]
    for result in results[:2]:
        assert path in result["error"]
        assert (result["error_kind"], result["http_status"]) == ("config", None)
        assert (result["response"], result["usage"]) == (None, None)
    assert [result["error"] for result in results[2:]] == [None, None]


@pytest.mark.parametrize("name", ["host", "provider", "model"])
def test_a_missing_key_of_a_configuration(name: str) -> None:
    wrong = {key: value for key, value in config().items() if key != name}
    checked = Checked([config("first"), wrong], [prompt()])
    checked.client.answer(0)
    assert checked.results[1]["error"] == f"configs[1].{name}: required, but missing"
    assert checked.results[1]["error_kind"] == "config"


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"user_message": None}, "test_prompts[0].user_message: expected a string"),
        ({"system_message": 5}, "test_prompts[0].system_message: "),
        ({"temperature": "hot"}, "test_prompts[0].temperature: "),
        ({"temperature": True}, "test_prompts[0].temperature: "),
        ({"temperature": float("inf")}, "test_prompts[0].temperature: "),
        ({"temperature": float("nan")}, "test_prompts[0].temperature: "),
        ({"images": "x"}, "test_prompts[0].images: expected an array"),
        ({"images": [5]}, "test_prompts[0].images[0]: expected a string"),
        ({"images": [PNG_TEXT, "AAAA"]}, "images[1]: INVALID_IMAGE"),
        ({"images": [PNG_TEXT + "!"]}, "images[0]: INVALID_IMAGE"),
        ({"images": ["☃"]}, "images[0]: INVALID_IMAGE"),
        ({"images": [""]}, "images[0]: INVALID_IMAGE"),
        ({"images": [PNG_TEXT, [1, 2, 3]]}, "images[1]: INVALID_IMAGE"),
        ({"images": [[*PNG, 256]]}, "images[0]: INVALID_IMAGE"),
        ({"images": [[*PNG, "x"]]}, f"images[0][{len(PNG)}]: expected a"),
        ({"max_tokens": 0}, "test_prompts[0].max_tokens: "),
        ({"max_tokens": 1.5}, "test_prompts[0].max_tokens: "),
        ({"max_tokens": "200"}, "test_prompts[0].max_tokens: "),
        ({"use_max_completion_tokens": "yes"}, "test_prompts[0].use_max_completion_tokens: "),
        ({"seed": 1.5}, "test_prompts[0].seed: "),
        ({"timeout_ms": -1}, "test_prompts[0].timeout_ms: "),
    ],
)
def test_a_wrong_prompt_is_the_problem_of_its_pairs(changes: dict[str, Any], path: str) -> None:
    checked = Checked([config("a"), config("b")], [prompt(**changes), prompt("good")])
    assert checked.asked() == [("a", "good"), ("b", "good")]
    checked.client.answer(0)
    checked.client.answer(1)
    results = checked.results
    assert [result["available"] for result in results] == [False, True, False, True]
    for result in results[::2]:
        assert path in result["error"]
        assert result["error_kind"] == "config"


def test_a_prompt_as_it_is_asked() -> None:
    whole = {
        "system_message": "s",
        "user_message": "u",
        "temperature": 0.2,
        "images": [PNG_TEXT, JPEG_TEXT],
        "max_tokens": 200,
        "use_max_completion_tokens": True,
        "seed": 7,
        "something_newer": 1,
    }
    checked = Checked([{**config(), "something_newer": 1}], [whole])
    images = (Image(PNG, "image/png"), Image(JPEG, "image/jpeg"))
    assert checked.client.asked[0][1] == Prompt("u", "s", 0.2, images, 200, True, 7)


def test_images_as_arrays_of_bytes() -> None:
    checked = Checked([config()], [prompt(images=[[*PNG], JPEG_TEXT])])
    images = (Image(PNG, "image/png"), Image(JPEG, "image/jpeg"))
    assert checked.client.asked[0][1].images == images


def test_a_prompt_needs_only_a_message() -> None:
    checked = Checked([config()], [{"user_message": "u"}])
    assert checked.client.asked[0][1] == Prompt("u", None, 0.7, (), 1000, False, None)


@pytest.mark.parametrize("key", [None, 5, ["k"], {"k": 1}])
def test_a_key_that_is_no_text(key: object) -> None:
    checked = Checked([config(key=key), config()], [prompt()])
    checked.client.answer(0)
    wrong, right = checked.results
    assert (wrong["error_kind"], wrong["error"]) == ("config", "configs[0].key: expected a string")
    assert right["available"]


def test_a_key_is_not_required() -> None:
    without = {key: value for key, value in config(provider="ollama").items() if key != "key"}
    assert Checked([without], [prompt()]).client.asked[0][0].key == ""


@pytest.mark.parametrize(
    ("of_config", "of_prompt", "seconds"),
    [
        ({}, {}, 60),
        ({"timeout_ms": 500}, {}, 0.5),
        ({}, {"timeout_ms": 90_000}, 90),
        ({"timeout_ms": 500}, {"timeout_ms": 1500}, 1.5),
        ({"timeout_ms": 1500}, {"timeout_ms": 500}, 0.5),
        ({"timeout_ms": None}, {"timeout_ms": None}, 60),
        ({"timeout_ms": 10**30}, {}, 3600),
    ],
)
def test_the_time_limit_of_a_prompt_goes_over_that_of_a_configuration(
    of_config: dict[str, Any], of_prompt: dict[str, Any], seconds: float
) -> None:
    checked = Checked([config(**of_config)], [prompt(**of_prompt)])
    assert checked.client.asked[0][0].timeout == seconds


def replied(body: bytes, status: int = 400, key: str = KEY, **changes: Any) -> dict[str, Any]:
    """Return the result of a check whose provider answers with a body."""
    http = FakeHttp()
    client = LlmClient(Clock(), http_client(http))
    checked = Checked(
        [config(**{"key": key, **changes})],
        [prompt()],
        client=client,
        variables=given_variables(T_SECRET=KEY),
    )
    if http.responses:
        response = FakeResponse(status)
        http.responses[0].callback(response)
        response.send(body)
    return checked.results[0]


# --- templates ---


def given_variables(**values: str) -> Variables:
    """Return variables that POST /env set."""
    variables = Variables(Path("/nowhere"))
    for name, value in values.items():
        variables.set(name, value)
    return variables


def test_every_text_of_a_configuration_is_a_template() -> None:
    variables = given_variables(
        T_HOST="http://x", T_KIND="google", T_KEY="${ENV[T_HOST]}", T_NONE=""
    )
    target = config(
        "${genvmRoot}|${exeDir}|${ENV[T_NONE]}|${nope",
        host="${ENV[T_HOST]}:80",
        provider="${ENV[T_KIND]}",
        key="${ENV[T_KEY]}-1",
    )
    found = Checked([target], [prompt("${genvmRoot}")], variables=variables).client.asked[0]
    assert (found[0].host, found[0].provider) == ("http://x:80", "google")
    assert found[0].model == "/genvm|/genvm/bin||${nope"
    assert found[0].key == "${ENV[T_HOST]}-1", "inserted text is not expanded again"
    assert found[1].user_message == "${genvmRoot}", "a prompt is no template"


# --- secrets ---


@pytest.mark.parametrize("key", [KEY, "${ENV[T_SECRET]}", "a-${ENV[T_SECRET]}-b"])
@pytest.mark.parametrize("status", [200, 401])
def test_no_result_has_the_key(key: str, status: int) -> None:
    sent = key.replace("${ENV[T_SECRET]}", KEY)
    echo_ = f"you said {sent}, and meant {key}."
    body = answer("openai-compatible", echo_) if status == 200 else {"error": {"message": echo_}}
    result = replied(json.dumps(body).encode(), status, key)
    assert result["available"] is (status == 200)
    text = result["response"] or result["error"]
    assert text.endswith("you said [redacted], and meant [redacted].")
    assert secret_in(json.dumps(result)) is None


def test_a_key_that_cannot_be_sent_is_secret_all_the_same() -> None:
    key = f"{KEY}\n"
    wrong = [config(key=key), config(model="${" + "nope}", key=f"x{KEY}")]
    checked = Checked([*wrong, config()], [prompt()])  # the last one keeps the request going
    assert checked.redactor.scrub(key + f"x{KEY}") == "[redacted][redacted]"


@pytest.mark.parametrize("before", range(380, 520, 3))
@pytest.mark.parametrize("status", [200, 400])
def test_a_message_is_never_cut_within_the_key(before: int, status: int) -> None:
    error = replied(("~" * before + KEY + "~" * 1000).encode(), status)["error"]
    assert "~" * 380 in error
    assert secret_in(error, length=4) is None


@pytest.mark.parametrize("status", [400, 404, 529])
def test_the_first_500_characters_of_a_message_are_shown(status: int) -> None:
    assert PROVIDER_MESSAGE_CHARACTERS == 500
    body = {"error": {"message": "☃" * 499 + "☁" + "☂" * 1000}}
    error = replied(json.dumps(body).encode(), status)["error"]
    assert error.count("☃") == 499
    assert error.count("☁") == 1, "500 characters are shown"
    assert error.count("☂") == 0, "and no more"
    assert f"status {status}" in error


def test_a_message_of_500_characters_is_shown_whole() -> None:
    assert replied(("☃" * 500).encode(), 529)["error"].endswith(": " + "☃" * 500)


LONG_KEY = "eyJ" + "".join(f"{n:05x}" for n in range(400))


def leak_by(body: bytes, key: str, status: int) -> str | None:
    """Return a piece of the key that a check shows where a provider answers with a body."""
    found = json.dumps(replied(body, status, key), ensure_ascii=False)
    return secret_in(found, key) or secret_in(found.replace("\\", ""), key)


@pytest.mark.parametrize("status", [200, 400, 401])
@pytest.mark.parametrize("key", [KEY, LONG_KEY])
@pytest.mark.parametrize("between", [b"", b" ", b"-" * 7])
def test_a_key_that_is_repeated_often_is_not_cut(status: int, key: str, between: bytes) -> None:
    # Masked, such a text becomes so short that its end is shown: it may not have been cut before.
    for count in (20, 500):
        assert leak_by(between.join([key.encode()] * count), key, status) is None


@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("key", ["sk-with/slashes/as+base64/has=", 'sk-"quoted\\"-key'])
def test_a_key_is_recognized_in_a_body_that_is_shown_as_it_came(status: int, key: str) -> None:
    body = json.dumps({"reason": f"no: {key}"})
    assert leak_by(body.encode(), key, status) is None
    # PHP writes "/" like this.
    assert leak_by(body.replace("/", "\\/").encode(), key, status) is None


@pytest.mark.parametrize("name", ["host", "provider", "model", "timeout_ms"])
def test_a_key_that_stands_in_the_wrong_place_too(name: str) -> None:
    # A slip: the key's variable is used for something else as well. Long values are shown in part.
    assert secret_in(json.dumps(replied(b"no", 404, **{name: KEY}))) is None


def test_short_texts_are_no_secrets() -> None:
    checked = Checked([config(key="OK")], [prompt()])
    checked.client.answer(0, "OK")
    assert checked.results[0]["response"] == "OK"


@pytest.mark.parametrize(
    "body",
    [
        {"configs": {"host": "h", "key": KEY}, "test_prompts": []},
        {"configs": {"key": KEY}, "test_prompts": []},
        {"configs": [KEY], "test_prompts": []},
        {"configs": KEY, "test_prompts": []},
        {"configs": [[KEY]], "test_prompts": []},
        {"configs": [], "test_prompts": [KEY]},
        [{"key": KEY}],
        KEY,
    ],
)
def test_a_request_that_is_wrong_as_a_whole_does_not_come_back(body: Any) -> None:
    with pytest.raises(ManagerError) as caught:
        parse_json(json.dumps(body).encode(), CheckBody)
    assert secret_in(caught.value.message) is None


def echo(target: Backend) -> LlmAnswer:
    """Answer with the key."""
    return LlmAnswer(f"you are {target.key}", Usage())


def test_all_keys_of_a_request_are_secret() -> None:
    configs = [config(key=f"sk-{secrets.token_hex(20)}") for _ in range(1500)]
    checked = Checked(configs, [prompt()], client=FakeClient(at_once=echo))
    assert {result["response"] for result in checked.results} == {"you are [redacted]"}


def test_many_keys_cost_little() -> None:
    # All of this holds up the reactor; it should take milliseconds.
    configs = [config(key=f"sk-{secrets.token_hex(60)}") for _ in range(300)]
    start = time.process_time()
    checked = Checked(configs, [prompt()], client=FakeClient(at_once=echo))
    assert len(checked.results) == 300
    assert time.process_time() - start < HANG_SECONDS


def test_a_key_of_megabytes_costs_little() -> None:
    key = "k" * (2 << 20)
    start = time.process_time()
    checked = Checked([config(key=key)], [prompt()])
    if checked.client.answers:
        checked.client.answer(0)
    assert len(checked.results) == 1
    assert checked.redactor.scrub("ordinary text") == "ordinary text"
    assert time.process_time() - start < HANG_SECONDS


@pytest.mark.parametrize("key", ['": "', "true", "null", '"}, {"', "1234"])
def test_a_key_that_looks_like_json_does_not_lose_log_lines(key: str) -> None:
    lines: list[bytes] = []
    observer = LogObserver(Config(), lines.append)
    observer.redactor.keep("key", [key])
    event = {"a": None, "b": True, "c": [1234, {"d": f"<{key}>"}], "e": [{}, {"f": "g"}]}
    observer({"log_format": "hello", "log_time": 0.0, "fields": event})
    (line,) = lines
    record = json.loads(line)
    assert (record["message"], record["fields"]["c"][1]["d"]) == ("hello", "<[redacted]>")


@pytest.mark.parametrize("field", ["key", "host", "model", "provider"])
@pytest.mark.parametrize("name", ["T_SECRET", "T_NOT_SET"])
def test_a_variable_that_requests_may_not_use(
    field: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_spare_threads(monkeypatch)
    monkeypatch.setenv("T_SECRET", KEY)
    template = f"${{ENV[{name}]}}"
    checked = Checked([config(**{field: template})], [prompt()])
    (refused,) = checked.results
    assert refused["error_kind"] == "config"
    assert refused["error"].startswith(f"configs[0].{field}: ")
    assert f"{name} may not be used in a request" in refused["error"]
    assert secret_in(json.dumps(refused)) is None
    assert checked.client.asked == []


@pytest.mark.parametrize("field", ["host", "model", "provider"])
@pytest.mark.parametrize("after", ["", "\n", "x" * 100])
def test_what_a_template_inserted_is_in_no_result(field: str, after: str) -> None:
    """It is no less secret for standing in a wrong place."""
    variables = given_variables(T_SECRET=KEY)
    changes = {field: "${ENV[T_SECRET]}" + after}
    said = FakeClient(at_once=lambda target: LlmAnswer(f"you are {target.model}", Usage(1, 2, 3)))
    checked = Checked([config(**changes)], [prompt()], variables=variables, client=said)
    assert secret_in(json.dumps(checked.results)) is None
