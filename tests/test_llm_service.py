"""The LLM service without its process, and what its answers are made of."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from wsproto import ConnectionType, WSConnection
from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage
from wsproto.events import Request as WebSocketRequest

import genvm_manager
from genvm_manager import (
    TEMPLATE_KINDS,
    WHOLE_NUMBER_MAX,
    AnswerMode,
    AnyObject,
    Backend,
    Caller,
    ConfigError,
    ErrorKind,
    LlmAnswer,
    LlmClient,
    LlmService,
    LlmSettings,
    ManagerError,
    PeerConnection,
    Prompt,
    ProviderError,
    Redactor,
    RequestFailure,
    ServiceSetup,
    TemplateText,
    Usage,
    close_json,
    encode_calldata,
    failure_cause,
    filtered,
    json_object_to_calldata,
    parse_json_answer,
    read_llm_settings,
    request_parts,
    rust_debug,
    rust_text,
)
from tests.support import outcome

from .support import json_objects

KEY = "sk-0123456789"
CALLER = Caller("c1", None, {})
PNG = b"\x89PNG\r\n\x1a\n..."


# --- errors as text ---


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", '""'),
        ("plain 'text' é 漢 🎉", "\"plain 'text' é 漢 🎉\""),
        ('a"b\\c', r'"a\"b\\c"'),
        ("\0\t\r\n", r'"\0\t\r\n"'),
        ("\x01\x7f\x85", r'"\u{1}\u{7f}\u{85}"'),
        ("e\u0301", r'"e\u{301}"'),
        ("\u200b\u00a0\ufeff", r'"\u{200b}\u{a0}\u{feff}"'),
    ],
)
def test_rust_text(text: str, shown: str) -> None:
    assert rust_text(text) == shown


def test_error_text() -> None:
    error = RequestFailure("CAUSE", status=401, m="...")
    golden = (
        'ModuleError { causes: ["CAUSE"], fatal: true, '
        'ctx: {"status": Number(401.0), "m": Str("...")} }'
    )
    assert error.answer() == {"FatalError": golden}
    assert RequestFailure("A", "B").answer() == {
        "FatalError": 'ModuleError { causes: ["A", "B"], fatal: true, ctx: {} }'
    }
    user = RequestFailure("A", fatal=False, n=1)
    assert user.answer() == {"UserError": {"causes": ["A"], "ctx": {"n": 1}}}
    assert str(user) == 'ModuleError { causes: ["A"], fatal: false, ctx: {"n": Number(1.0)} }'
    value = {"a": [None, True, False, "x"], "b": {}}
    assert (
        rust_debug(value)
        == 'Map({"a": Array([Null, Bool(true), Bool(false), Str("x")]), "b": Map({})})'
    )
    with pytest.raises(TypeError):
        rust_debug(b"")


# --- messages ---


class Wire(StringTransport):
    """The transport of a connection without a socket."""

    ended = False

    def loseWriteConnection(self) -> None:
        self.ended = True


class Peer(PeerConnection):
    """A connection that keeps its messages."""

    def __init__(self) -> None:
        super().__init__(Clock(), set(), lambda: None)
        self.messages: list[bytes] = []
        self.makeConnection(Wire())
        self.frames = WSConnection(ConnectionType.CLIENT)
        self.dataReceived(self.frames.send(WebSocketRequest("x", "/")))
        self.said()

    def message_received(self, data: bytes) -> None:
        self.messages.append(data)

    def peer_gone(self) -> None:
        pass

    def said(self) -> list[Any]:
        """Return what the connection has sent since the last time."""
        self.frames.receive_data(self.transport.value())
        self.transport.clear()
        return list(self.frames.events())


@given(
    st.lists(
        st.lists(st.sampled_from([0, 1, 125, 126, 400, 70_000]), min_size=1, max_size=4),
        max_size=5,
    ),
    st.integers(1, 80_000),
    st.integers(0, 100_000),
    st.sampled_from(
        [
            lambda size, final: BytesMessage(data=b"x" * size, message_finished=final),
            lambda size, final: TextMessage(data="x" * size, message_finished=final),
        ]
    ),
)
def test_messages_are_bounded_at_the_header(
    messages: list[list[int]], step: int, limit: int, made: Callable[[int, bool], Any]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(genvm_manager, "MESSAGE_MAX_BYTES", limit)
        peer = Peer()
    stream, refusal, whole = bytearray(), None, []
    for sizes in messages:
        for number, size in enumerate(sizes):
            final = number == len(sizes) - 1
            frame = peer.frames.send(made(size, final))
            if sum(sizes[: number + 1]) > limit and refusal is None:
                refusal = len(stream) + len(frame) - size - 4
            stream += frame + peer.frames.send(Ping(b"12345"))
        if refusal is None:
            whole.append(b"x" * sum(sizes))
    taken = 0
    while taken < len(stream) and not peer.closing:
        peer.dataReceived(bytes(stream[taken : taken + step]))
        taken += step
    *pongs, last = peer.said() or [None]
    assert peer.messages == whole
    assert all(isinstance(event, Pong) for event in pongs)
    if refusal is None:
        assert taken >= len(stream)
        assert not peer.closing
    else:
        assert refusal <= taken < refusal + step
        assert isinstance(last, CloseConnection)
        assert (last.code, last.reason) == (1009, "the message is too large")
        assert peer.transport.ended


def test_a_size_that_nobody_has_is_refused() -> None:
    peer = Peer()
    peer.dataReceived(b"\x82\xff" + (2**63 - 1).to_bytes(8))
    assert peer.said()[-1].code == 1009


def test_a_peer_that_does_not_read_its_refusal_has_two_seconds() -> None:
    peer = Peer()
    peer.close(1008, "no")
    peer._reactor.advance(1.9)
    assert not peer.transport.disconnected
    peer._reactor.advance(0.2)
    assert peer.transport.disconnected


def test_requests_are_strings_or_maps_of_one() -> None:
    assert request_parts("GetStats") == ("GetStats", None)
    assert request_parts({"Prompt": [1]}) == ("Prompt", [1])
    wrong: list[Any] = [None, 5, b"GetStats", [], {}, {"a": 1, "b": 2}]
    for request in wrong:
        with pytest.raises(RequestFailure, match="INVALID_REQUEST"):
            request_parts(request)


# --- configuration ---


def backend(**changes: Any) -> dict[str, Any]:
    return {
        "host": "https://api.example.com",
        "provider": "openai-compatible",
        "key": KEY,
        "models": {"m": {"supports_json": True, "supports_image": True}},
        **changes,
    }


def read(config: dict[str, Any], *, allow_empty: bool = False) -> LlmSettings:
    return read_llm_settings(AnyObject(config), allow_empty=allow_empty)


def names(settings: LlmSettings) -> list[list[str]]:
    return [[model.name for model in models] for models in settings.backends]


def test_order_of_backends_and_models() -> None:
    models = {
        "z": {"meta": {"priority": 2}},
        "a": {},
        "b": {"meta": {"priority": -1}},
        "c": None,
        "off": {"enabled": False},
    }
    found = read(
        {
            "backends": {
                "low": backend(meta={"priority": -5}),
                "b": backend(models=models),
                "a": backend(meta={"other": 1}),
                "high": backend(meta={"priority": 0.5}),
                "off": {"enabled": False, "provider": 5},
                "empty": backend(models={}),
                "none": backend(models=None),
                "all_off": backend(models={"m": {"enabled": False}}),
                "no_key": backend(key=None),
            }
        }
    )
    assert names(found) == [["high/m"], ["a/m"], ["b/z", "b/a", "b/c", "b/b"], ["low/m"]]
    assert sorted(found.notes) == [
        "backends.all_off: it has no models; left out",
        "backends.empty: it has no models; left out",
        "backends.no_key: it has no key; left out",
        "backends.none: it has no models; left out",
        "backends.off: disabled; left out",
    ]


def test_unknown_keys_are_noted() -> None:
    models = {"m": {"price": 1, "enabled": True}}
    found = read({"backends": {"a": backend(models=models, region="x")}, "lines": 1})
    assert found.notes == (
        "lines: unknown key: ignored",
        "backends.a.region: unknown key: ignored",
        "backends.a.models.m.price: unknown key: ignored",
    )


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"backend": {}, "backends": {"a": backend()}}, "backend: unknown key; did you mean"),
        ({"backends": {"a": backend(modles={})}}, "backends.a.modles: unknown key; did you mean"),
        (
            {"backends": {"a": backend(models={"m": {"suports_json": True}})}},
            "backends.a.models.m.suports_json: unknown key; did you mean supports_json?",
        ),
    ],
)
def test_nearly_known_keys_are_errors(config: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(config)
    assert caught.value.message.startswith(problem)


def test_timeouts_and_defaults() -> None:
    models = {"m": {"timeout": "5s"}, "n": {"use_max_completion_tokens": True}}
    found = read({"backends": {"a": backend(timeout=7, models=models)}, "timeout": "1m"})
    assert [model.backend.timeout for model in found.backends[0]] == [5, 7]
    assert read({"backends": {"a": backend()}}).backends[0][0].backend == Backend(
        "https://api.example.com", "openai-compatible", "m", KEY, 180
    )
    assert [m.entry.use_max_completion_tokens for m in found.backends[0]] == [False, True]
    assert not any(m.entry.supports_json or m.entry.supports_image for m in found.backends[0])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"backends": []}, "backends: expected an object"),
        ({"backends": {"a": 5}}, "backends.a"),
        ({"backends": {"a": backend(enabled="no")}}, "backends.a.enabled: expected true or false"),
        ({"backends": {"a": backend(provider="x")}}, 'backends.a.provider: unknown "x"; known are'),
        ({"backends": {"a": backend(provider="x", key="")}}, "backends.a.provider: unknown"),
        ({"backends": {"a": backend(host="ftp://x")}}, "backends.a.host: expected a URL"),
        ({"backends": {"a": backend(key=5)}}, "backends.a.key: expected a string"),
        ({"backends": {"a": backend(key=KEY + "\n")}}, "backends.a.key: has characters"),
        ({"backends": {"a": backend(models=["m"])}}, "backends.a.models: expected an object"),
        ({"backends": {"a": backend(models={"m": {"supports_json": 1}})}}, "a.models.m.supports_j"),
        ({"backends": {"a": backend(models={"m": 5})}}, "backends.a.models.m"),
        ({"backends": {"a": backend(models={"m": {"max_tokens": 0}})}}, "a.models.m.max_tokens"),
        ({"backends": {"a": backend(models={"m": {"temperature": "x"}})}}, "a.models.m.temperat"),
        ({"backends": {"a": backend(timeout=0)}}, "backends.a.timeout: expected more than 0"),
        ({"backends": {"a": backend(timeout="x")}}, "backends.a.timeout: expected seconds"),
        ({"backends": {"a": backend(meta={"priority": "x"})}}, "backends.a.meta.priority: expec"),
        ({"backends": {}}, "backends: none can be used"),
        ({}, "backends: none can be used"),
        ({"backends": {"a": backend(key="")}}, "(backends.a: it has no key; left out)"),
        ({"timeout": True}, "timeout: expected seconds"),
        ({"prompt_templates": {"eq_comparative": "x"}}, "prompt_templates.eq_comparative"),
        ({"filter_prompts": "no"}, "filter_prompts: expected true or false"),
        ({"prompt_templates": {"eq_comparative": {"system": "x"}}}, "eq_comparative.user: requir"),
    ],
)
def test_wrong_configurations(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ManagerError) as caught:
        read(config)
    assert reason in caught.value.message
    assert KEY not in caught.value.message


def test_what_is_disabled_or_has_no_key_is_not_looked_at() -> None:
    broken = {"enabled": False, "supports_json": "maybe", "timeout": "soon"}
    found = read(
        {
            "backends": {
                "a": backend(models={"broken": broken, "m": {}}),
                "b": {"enabled": False, "host": 5},
                "c": {"host": "http://x", "provider": "anthropic", "key": ""},
            }
        }
    )
    assert names(found) == [["a/m"]]
    assert found.notes == ("backends.b: disabled; left out", "backends.c: it has no key; left out")


def test_no_backend_may_be_what_is_wanted() -> None:
    assert names(read({}, allow_empty=True)) == []
    found = read({"backends": {"a": backend(provider="x")}}, allow_empty=True)
    assert names(found) == []
    assert 'backends.a.provider: unknown "x"' in found.notes[0]


@pytest.mark.parametrize(
    "wrong",
    [
        5,
        None,
        {},
        backend(provider="x"),
        backend(host="x"),
        backend(key="a b"),
        backend(models=["m"]),
        backend(models={"m": {"timeout": "soon"}}),
        backend(meta={"priority": "high"}),
        {"enabled": False, "models": ["m"]},
    ],
)
def test_a_wrong_backend_does_not_stop_the_others(wrong: Any) -> None:
    found = read({"backends": {"a": wrong, "b": backend()}})
    assert names(found) == [["b/m"]]
    (note,) = found.notes
    assert note.startswith("backends.a")
    assert "left out" in note


@pytest.mark.parametrize(
    "meta", [None, 5, "x", [{"priority": 9}], {}, {"priority": None}, {"greybox": {"a": [1]}}]
)
def test_meta_may_be_anything(meta: Any) -> None:
    first = backend(meta={"priority": 1})
    last = backend(meta={"priority": -1})
    middle = backend(meta=meta, models={"m": {"meta": meta}, "l": {"meta": {"priority": -1}}})
    found = read({"backends": {"a": last, "b": middle, "c": first}})
    assert names(found) == [["c/m"], ["b/m", "b/l"], ["a/m"]]


@pytest.mark.parametrize(
    ("host", "provider", "is_used"),
    [
        ("http://ollama.example.com", "ollama", True),
        ("http://127.0.0.1:8000", "openai-compatible", True),
        ("http://localhost:8000/", "openai-compatible", True),
        ("http://[::1]:8000", "anthropic", True),
        ("http://127.0.0.1.example.com", "openai-compatible", False),
        ("https://api.example.com", "google", False),
    ],
)
@pytest.mark.parametrize("key", [None, ""])
def test_who_needs_no_key(host: str, provider: str, is_used: bool, key: str | None) -> None:
    config = {"backends": {"a": backend(host=host, provider=provider, key=key)}}
    found = read(config, allow_empty=True)
    assert names(found) == ([["a/m"]] if is_used else [])
    assert not is_used or found.backends[0][0].backend.key == ""


def test_setup_lines() -> None:
    line = b'{"config": {"a": 1}, "allow_empty_backends": true, "log_level": "warn", "more": 1}\n'
    assert ServiceSetup.parse(line) == ServiceSetup(AnyObject(a=1), True, "warn")
    for wrong in (b"", b"{", b"[]", b"{}", b'{"config": "secret"}', b"[" * 100_000):
        with pytest.raises(ConfigError) as caught:
            ServiceSetup.parse(wrong)
        assert "secret" not in caught.value.message


# --- templates ---


def test_inserted_text_is_not_looked_at_again() -> None:
    template = TemplateText("<#{a}> #{b} #{a} ${ENV[HOME]} #{", "#{b}#b")
    assert template.fill({"a": "#{b}", "b": r"\1#{a}"}) == (
        r"<#{b}> \1#{a} #{b} ${ENV[HOME]} #{",
        r"\1#{a}#b",
    )


@pytest.mark.parametrize("name", TEMPLATE_KINDS)
def test_default_templates_hold_every_variable(name: str) -> None:
    kind = TEMPLATE_KINDS[name]
    user, system = kind.default.fill({variable: f"<{variable}>" for variable in kind.variables})
    for variable in kind.variables:
        assert f"<{variable}>" in user
    assert ('Its only key is "result"' in (system or "")) == (kind.mode is AnswerMode.BOOL)
    assert "#{" not in user + (system or "")


# --- JSON of models ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": "cut o', {"a": "cut o"}),
        ('{"a": "cut \\', {"a": "cut "}),
        ('{"a": "cut \\u00', {"a": "cut "}),
        ('{"a": "cut \\\\', {"a": "cut \\"}),
        ('{"a": "cut \\ud83d', {"a": "cut \ufffd"}),
        ('{"a": 1, "b', {"a": 1}),
        ('{"a": 1, "b"', {"a": 1}),
        ('{"a": 1, "b":', {"a": 1}),
        ('{"a": 1, "b": [', {"a": 1, "b": []}),
        ('{"a": 1, "b": [1, {"c": [2, 3', {"a": 1, "b": [1, {"c": [2]}]}),
        ('{"a": 12', {}),
        ('{"a": 12,', {"a": 12}),
        ('{"a": -', {}),
        ('{"a": tr', {"a": True}),
        ('{"a": fal', {"a": False}),
        ('{"a": n', {"a": None}),
        ('{"a": tr, "b": 1', None),
        ('{"a": "x\ny"}', {"a": "x\ny"}),
        ("{", {}),
        ('{"', {}),
        ('{"a": {"b": "c"}} and that is it', {"a": {"b": "c"}}),
        ("", None),
        ("[", None),
        ("[1]", None),
        ("5", None),
        ("prose", None),
        ("{\"a\": 'x'}", None),
        ('{"a" 1}', None),
        ('{"a": "\\x", "b": 1}', None),
        ('{"a": "\\u00zz", "b": 1}', None),
        ('{"a": 1]', None),
        ("}", None),
        ('{"a": [1, 2}', None),
        ("{" * 100_000, None),
        ('{"a":' * 100_000, None),
        ('{"a": ' + "[" * 63, "deep"),
        ('{"a": ' + "[" * 65, None),
        ('{"a": "' + "x" * 300_000 + '"}', None),
    ],
)
def test_json_answers(text: str, value: Any) -> None:
    if value is None:
        with pytest.raises(ValueError):
            parse_json_answer(text)
    else:
        found = parse_json_answer(text)
        assert value in ("deep", found)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}',
        '  {"a": 1}\n',
        '```json\n{"a": 1}\n```',
        '```\n{"a": 1}\n```',
        '```JSON\n{"a": 1}```',
        '```json{"a": 1}```',
        'Here it is:\n```json\n{"a": 1}\n```\nAnything else?',
        '```json\n{"a": 1}',
        '```json\n{"a": 1',
    ],
)
def test_code_fences(text: str) -> None:
    if text.endswith("1"):
        assert parse_json_answer(text) == {}
    else:
        assert parse_json_answer(text) == {"a": 1}
    fenced = '{"a": "```json\\n{}\\n```"}'
    assert parse_json_answer(fenced) == json.loads(fenced)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('\ufeff{"a": 1}', {"a": 1}),
        ('<think>\nIs it {"b": 2}?\n</think>\n\n{"a": 1}', {"a": 1}),
        ('<think></think>```json\n{"a": 1}\n```', {"a": 1}),
        ('Is it {"b": 2}?\n</think>\n{"a": 1}', {"a": 1}),
        ('<think>x</think>Here it is: {"a": "cut o', {"a": "cut o"}),
        ('Sure! Here is the JSON:\n{"a": 1}', {"a": 1}),
        ('Given {x} and {}, it is { "a": 1 }. Anything else?', {"a": 1}),
        ('Given {"b": 2}:\n```json\n{"a": 1}\n```', {"a": 1}),
        ("There is nothing: {}\n", {}),
        ("Here it is: {", {}),
        ('{"a": "<think></think>{}"}', {"a": "<think></think>{}"}),
        ('<think>Is it {"b": 2}?', None),
        ('<think>Is it {"b": 2}?</think>', None),
        ('Here they are: [{"a": 1}, {"a": 2}]', None),
        ('<think></think>[1, {"a": 1}]', None),
        ("Use {curly} braces.", None),
        ("Use {} as braces.", None),
    ],
)
def test_what_comes_before_json(text: str, value: dict[str, Any] | None) -> None:
    if value is None:
        with pytest.raises(ValueError):
            parse_json_answer(text)
    else:
        assert parse_json_answer(text) == value


@given(json_objects)
def test_whole_json_is_left_as_it_is(value: dict[str, Any]) -> None:
    text = json.dumps(value)
    assert json.loads(close_json(text)) == value
    assert parse_json_answer(text) == json_object_to_calldata(value)


@given(json_objects, st.randoms(use_true_random=False), st.sampled_from([None, 1]), st.booleans())
def test_cut_json_is_closed(
    value: dict[str, Any], chance: random.Random, indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    cut = text[: chance.randint(1, len(text))]
    closed = json.loads(close_json(cut))
    assert_part_of(closed, value)
    assert close_json(close_json(cut)) == close_json(cut)
    # All members but the last one that is left are whole.
    for name in list(closed)[:-1]:
        assert closed[name] == value[name]


def assert_part_of(part: Any, whole: Any) -> None:
    """What is left of a value only lacks ends."""
    if isinstance(whole, dict):
        assert list(part) == list(whole)[: len(part)]
        for name, inner in part.items():
            assert_part_of(inner, whole[name])
    elif isinstance(whole, list):
        for inner, expected in zip(part, whole, strict=False):
            assert_part_of(inner, expected)
        assert len(part) <= len(whole)
    elif isinstance(whole, str):
        # A cut between the two halves of an escaped character leaves the first half.
        assert whole.startswith(part) or whole.startswith(part[:-1])
    else:
        assert part == whole
        assert type(part) is type(whole)


@given(st.text(alphabet='{}[]",:\\ 12tfne.u\n', max_size=60))
def test_nothing_else_than_value_error(text: str) -> None:
    try:
        value = parse_json_answer(text)
    except ValueError:
        return
    encode_calldata(cast(Any, value))


def test_closing_takes_linear_time() -> None:
    for piece in (
        '"',
        "[",
        "{",
        '{"a":',
        '\\"',
        '"\\',
        "1,",
        ",",
        " ",
        "tru",
        '["a",',
        "```",
        "[ {",
    ):
        for begin in ("", '{"a": "', '{"a": ['):
            text = begin + piece * (250_000 // len(piece))
            start = time.process_time()
            with contextlib.suppress(ValueError):
                parse_json_answer(text)
            assert time.process_time() - start < 20


@pytest.mark.parametrize(
    ("number", "value"),
    [
        ("1", 1),
        ("-7", -7),
        ("1" * 100, "1" * 100),
        ("1" * 5000, "1" * 5000),
        ("1.0", 1),
        ("-0.0", 0),
        ("1e3", 1000),
        ("1.5e1", 15),
        ("9007199254740992.0", 2**53),
        ("9007199254740993.0", "9007199254740993.0"),
        ("0.10", "0.10"),
        ("1.5", "1.5"),
        ("1e300", "1e300"),
        ("1e-300", "1e-300"),
        ("0.99999999999999999999999", "0.99999999999999999999999"),
        ("1e999999999", "1e999999999"),
        ("1e9999999999999999999999", "1e9999999999999999999999"),
        ("-1e-9999999999999999999999", "-1e-9999999999999999999999"),
        ("NaN", "NaN"),
        ("-Infinity", "-Infinity"),
    ],
)
def test_numbers(number: str, value: Any) -> None:
    found = parse_json_answer(f'{{"n": {number}}}')["n"]
    assert found == value
    assert type(found) is type(value)


def test_objects_become_calldata() -> None:
    given_ = {"a": 1.0, "b": [0.5, None, True], "c\ud800": {"d": "x\udfff"}, "e": float(2**60)}
    found = json_object_to_calldata(given_)
    assert found == {
        "a": 1,
        "b": ["0.5", None, True],
        "c\ufffd": {"d": "x\ufffd"},
        "e": "1.152921504606847e+18",
    }
    assert type(found["a"]) is int
    encode_calldata(cast(Any, found))
    assert WHOLE_NUMBER_MAX == 2**53


# --- asking ---


class FakeClient:
    """Records what is asked; the test answers."""

    def __init__(self) -> None:
        self.asked: list[tuple[Backend, Prompt, AnswerMode]] = []
        self.answers: list[Deferred[LlmAnswer]] = []
        self.cancelled = 0

    async def ask(self, backend: Backend, prompt: Prompt, mode: AnswerMode) -> LlmAnswer:
        def cancel(answer: Deferred[LlmAnswer]) -> None:
            self.cancelled += 1
            # This is what the real one fails with when it is cancelled while it sends.
            answer.errback(ProviderError(ErrorKind.CONNECT, "aborted"))

        self.asked.append((backend, prompt, mode))
        self.answers.append(Deferred(cancel))
        return await self.answers[-1]


class Asking:
    """A service with a fake client and clock."""

    def __init__(self, *backends: dict[str, Any], **config: Any) -> None:
        named = {f"b{number}": item for number, item in enumerate(backends)}
        self.clock = Clock()
        self.client = FakeClient()
        self.changes = 0
        redactor = Redactor()
        redactor.keep("keys", [item["key"] for item in backends])
        self.service = LlmService(
            read({"backends": named, **config}, allow_empty=True),
            self.clock,
            cast(LlmClient, self.client),
            redactor,
        )

        def changed() -> None:
            self.changes += 1

        self.service.changed = changed

    def ask(self, name: str, **payload: Any) -> tuple[Deferred[Any], list[Any]]:
        request = {"payload": payload, "remaining_fuel_as_gen": 0}
        waiting = Deferred.fromCoroutine(self.service.answer(name, cast(Any, request), CALLER))
        return waiting, outcome(waiting)

    def prompt(self, **changes: Any) -> list[Any]:
        return self.ask("Prompt", **{"prompt": "p", "response_format": "text", **changes})[1]

    def say(self, value: str | dict[str, Any], *usage: int | None) -> None:
        self.client.answers[-1].callback(LlmAnswer(value, Usage(*usage)))

    def fail(self, kind: ErrorKind, detail: str = "why", **more: Any) -> None:
        self.client.answers[-1].errback(ProviderError(kind, detail, **more))

    def models(self) -> list[str]:
        return [backend.model for backend, _, _ in self.client.asked]

    def counts(self, backend_id: str = "b0", model: str = "m") -> dict[str, Any]:
        return cast(dict[str, Any], self.service.statistics()["backends"][backend_id][model])


def ok(value: Any) -> dict[str, Any]:
    return {"data": value, "consumed_gen": 0}


def test_a_text_prompt() -> None:
    asking = Asking(backend())
    answers = asking.prompt()
    (_, prompt, mode) = asking.client.asked[0]
    assert prompt == Prompt("p", None, temperature=0.7, max_tokens=1000)
    assert mode is AnswerMode.TEXT
    asking.say(f"half a character \ud800 and a key {KEY}")
    assert answers == [ok("half a character \ufffd and a key [redacted]")]


def test_a_json_prompt() -> None:
    asking = Asking(backend())
    answers = asking.prompt(response_format="json")
    (_, prompt, mode) = asking.client.asked[0]
    assert prompt.system_message is not None
    assert "valid JSON object" in prompt.system_message
    assert mode is AnswerMode.JSON
    asking.say('```json\n{"a": 1.5}\n```')
    assert answers == [ok({"a": "1.5"})]
    answers = asking.prompt(response_format="json")
    asking.say({"a": 1.0, "key": KEY})
    assert answers == [ok({"a": 1, "key": "[redacted]"})]


def test_a_key_that_is_a_word_leaves_answers_alone() -> None:
    """Nor does it break their JSON."""
    for key in ("none", "true", "1234"):
        asking = Asking(backend(key=key))
        said = {"a": "none", "b": True, "c": 12345, "d": [None]}
        for value in (json.dumps(said), said):
            answers = asking.prompt(response_format="json")
            asking.say(value)
            assert answers == [ok(said)]


@pytest.mark.parametrize("mode", ["text", "json"])
def test_a_provider_that_repeats_the_key(mode: str) -> None:
    for key in ("sk-0123456789abcdef", 'sk-"0123456789\\abcdef/'):
        asking = Asking(backend(key=key))
        answers = asking.prompt(response_format=mode)
        asking.say(json.dumps({key: [f"<{key}>", {"a": key}]}) if mode == "json" else key * 2)
        masked = {"[redacted]": ["<[redacted]>", {"a": "[redacted]"}]}
        assert answers == [ok(masked if mode == "json" else "[redacted]" * 2)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("as it is: [1, 2]\n- a\n- b", "as it is: [1, 2]\n- a\n- b"),
        ("\uff29gnor\uff45 \ufb01 \u2460", "Ignore fi 1"),
        ("ig\u200bno\u2060re\ufeff\u00ad \U000e0041a\U000e0100", "ignore a"),
        ("a\u00a0 \tb\u3000c\rd", "a b c d"),
        (" a \n b\r\n\n \n\nc\n", "a\nb\n\nc"),
        ("e\u0301 ☃", "é ☃"),
    ],
)
def test_prompts_are_filtered(text: str, expected: str) -> None:
    asking = Asking(backend())
    asking.prompt(prompt=text)
    assert asking.client.asked[0][1].user_message == expected
    asking = Asking(backend(), filter_prompts=False)
    asking.prompt(prompt=text)
    assert asking.client.asked[0][1].user_message == text


def test_filtering_takes_linear_time_for_runs_of_marks() -> None:
    """Unicode's normal forms sort them, for which Python takes the square of their number."""
    begin = time.process_time()
    assert filtered("a" + "\u0301\u0327" * 100_000 + " b").endswith(" b")
    assert time.process_time() - begin < 5, "it took 10 s for a third of that"


def test_templates_are_not_filtered() -> None:
    asking = Asking(backend(), prompt_templates={"eq_non_comparative_leader": {"user": "#{task}"}})
    variables = {"task": " ﬁ\u200b", "criteria": "", "input": ""}
    asking.ask("PromptTemplate", template="EqNonComparativeLeader", **variables)
    assert asking.client.asked[0][1].user_message == " ﬁ\u200b"


def test_filtering_takes_linear_time() -> None:
    for piece in (" ", "\n", "\t", " \n", "a ", "\u200b", "ﬁ", "e\u0301"):
        start = time.process_time()
        asking = Asking(backend())
        asking.prompt(prompt="x" + piece * 200_000)
        assert time.process_time() - start < 20


def test_half_a_key_is_secret_too() -> None:
    key = KEY * 5
    asking = Asking(backend(key=key))
    for said in (json.dumps([key]), json.dumps({"result": key})):
        variables = {"leader_answer": "", "validator_answer": "", "principle": ""}
        _, answers = asking.ask("PromptTemplate", template="EqComparative", **variables)
        asking.say(said)
        assert answers[0].causes[1] == "READING_BODY"
        assert answers[0].context["body"] == said.replace(key, "[redacted]")
        assert KEY[:8] not in str(answers[0])


def test_images_and_their_limits() -> None:
    asking = Asking(backend())
    asking.prompt(images=[PNG, b"\xff\xd8\xff"])
    assert [i.media_type for i in asking.client.asked[0][1].images] == ["image/png", "image/jpeg"]
    for images, cause in (([PNG, b"x"], "INVALID_IMAGE"), ([PNG] * 3, "TOO_MANY_IMAGES")):
        (error,) = asking.prompt(images=images)
        assert error.causes == (cause,)
        assert not error.fatal
    (error,) = asking.prompt(images=[5])
    assert error.fatal
    assert len(asking.client.asked) == 1


def test_templates_that_are_configured() -> None:
    template = {"system": "S #{principle} #{x}", "user": "#{leader_answer}=#{validator_answer}"}
    asking = Asking(backend(), prompt_templates={"eq_comparative": template})
    variables = {"leader_answer": "#{principle}", "validator_answer": "V", "principle": "P"}
    _, answers = asking.ask("PromptTemplate", template="EqComparative", **variables)
    (_, prompt, mode) = asking.client.asked[0]
    assert prompt.user_message == "#{principle}=V"
    assert prompt.system_message == "S P #{x}"  # as it is configured, without our own words
    assert mode is AnswerMode.BOOL
    asking.say('{"result": fal')
    assert answers == [ok(False)]
    _, answers = asking.ask("PromptTemplate", template="EqNonComparativeLeader")
    assert "task: expected a string" in str(answers[0])
    variables = {"task": "T", "criteria": "C", "input": "I"}
    _, answers = asking.ask("PromptTemplate", template="EqNonComparativeLeader", **variables)
    asking.say('{"not": "parsed"}')
    assert answers == [ok('{"not": "parsed"}')]


@pytest.mark.parametrize(
    ("mode", "images", "asked"),
    [
        ("text", [], ["a"]),
        ("json", [], ["j"]),
        ("text", [PNG], ["i"]),
        ("json", [PNG], ["both"]),
    ],
)
def test_the_first_model_that_can(mode: str, images: list[bytes], asked: list[str]) -> None:
    models: dict[str, Any] = {
        "a": {},
        "both": {"supports_json": True, "supports_image": True, "meta": {"priority": -1}},
        "i": {"supports_image": True},
        "j": {"supports_json": True},
    }
    asking = Asking(backend(models=models))
    asking.prompt(response_format=mode, images=images)
    assert asking.models() == asked


def test_nobody_can() -> None:
    asking = Asking(backend(models={"m": {}}))
    (error,) = asking.prompt(response_format="json", images=[PNG])
    assert str(error) == (
        'ModuleError { causes: ["NO_PROVIDER_FOR_PROMPT"], fatal: true, '
        'ctx: {"reason": Str("no backend has a model for json answers and images")} }'
    )


Failing = Callable[[Asking], None]


def refused(status: int, kind: ErrorKind = ErrorKind.HTTP) -> Failing:
    def fail(asking: Asking) -> None:
        url = f"https://x/{status}"
        asking.fail(kind, f"status {status}", url=url, status=status, body=f"<{status} {KEY}>")

    return fail


OVERLOADED: list[Failing] = [
    refused(429, ErrorKind.RATE_LIMITED),
    refused(503, ErrorKind.OVERLOADED),
    lambda asking: asking.fail(ErrorKind.DNS),
    lambda asking: asking.fail(ErrorKind.CONNECT),
    lambda asking: asking.fail(ErrorKind.TIMEOUT),
]


@pytest.mark.parametrize("first", [*OVERLOADED, refused(500), refused(401, ErrorKind.AUTH)])
def test_the_next_backend_answers(first: Callable[[Asking], None]) -> None:
    asking = Asking(backend(), backend(models={"n": {}}))
    answers = asking.prompt()
    first(asking)
    assert asking.models() == ["m", "n"]
    asking.say("from the second")
    assert answers == [ok("from the second")]


@pytest.mark.parametrize(
    ("first", "asked"),
    [
        (refused(429, ErrorKind.RATE_LIMITED), ["m", "n"]),
        (refused(500), ["m", "n"]),
        (refused(503, ErrorKind.OVERLOADED), ["m", "n"]),
        (refused(401, ErrorKind.AUTH), ["m", "o"]),
        (refused(400), ["m", "o"]),
        (lambda asking: asking.fail(ErrorKind.TIMEOUT), ["m", "o"]),
        (lambda asking: asking.fail(ErrorKind.CONNECT), ["m", "o"]),
    ],
)
def test_a_limit_or_a_fault_may_be_one_models_alone(first: Failing, asked: list[str]) -> None:
    asking = Asking(backend(models={"m": {}, "n": {}}), backend(models={"o": {}}))
    answers = asking.prompt()
    first(asking)
    assert asking.models() == asked
    asking.say("from the next")
    assert answers == [ok("from the next")]


def test_temperature_and_limit_of_a_model() -> None:
    models = {"m": {"temperature": None, "max_tokens": None}, "n": {"temperature": 0}}
    asking = Asking(backend(models=models))
    asking.prompt()
    refused(500)(asking)
    told = [(prompt.temperature, prompt.max_tokens) for _, prompt, _ in asking.client.asked]
    assert told == [(None, None), (0, 1000)]


def test_an_answer_of_the_wrong_form_hands_over() -> None:
    able = {"supports_json": True}
    asking = Asking(*(backend(models={f"m{n}": able}) for n in range(4)))
    variables = {"leader_answer": "", "validator_answer": "", "principle": ""}
    _, answers = asking.ask("PromptTemplate", template="EqComparative", **variables)
    for wrong in ("no JSON", "[true]", '{"result": "true"}'):
        asking.say(wrong)
    asking.say({"result": True})
    assert answers == [ok(True)]
    assert asking.counts("b1", "m1")["errors"] == {"bad_response": 1}


@pytest.mark.parametrize("said", ["{}", '{"reason": "it differs"}', '{"result": false}'])
def test_no_result_is_false(said: str) -> None:
    asking = Asking(backend())
    variables = {"leader_answer": "", "validator_answer": "", "principle": ""}
    _, answers = asking.ask("PromptTemplate", template="EqComparative", **variables)
    asking.say(said)
    assert answers == [ok(False)]


def test_all_overloaded() -> None:
    asking = Asking(backend(), backend(models={"n": {}}))
    answers = asking.prompt()
    OVERLOADED[0](asking)
    OVERLOADED[4](asking)
    assert str(answers[0]) == (
        'ModuleError { causes: ["NO_PROVIDER_FOR_PROMPT", "STATUS_NOT_OK"], fatal: true, '
        'ctx: {"url": Str("https://x/429"), "status": Number(429.0), '
        'body_placeholder "reasons": Map({"b0/m": Str("the provider limits the rate or the quota '
        'is used up; try later: status 429"), "b1/n": Str("the provider did not answer in time: '
        'why")})} }'.replace("body_placeholder", '"body": Str("<429 [redacted]>"),')
    )


def test_the_first_error_that_is_no_overload_is_reported() -> None:
    asking = Asking(*(backend(models={f"m{n}": {}}) for n in range(4)))
    answers = asking.prompt()
    OVERLOADED[3](asking)
    refused(401, ErrorKind.AUTH)(asking)
    refused(500)(asking)
    OVERLOADED[1](asking)
    error = answers[0]
    assert error.causes == ("NO_PROVIDER_FOR_PROMPT", "STATUS_NOT_OK")
    assert error.context["status"] == 401
    assert list(error.context["reasons"]) == ["b0/m0", "b1/m1", "b2/m2", "b3/m3"]
    assert error.fatal


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ProviderError(ErrorKind.CONNECT, ""), "SENDING_REQUEST"),
        (ProviderError(ErrorKind.TLS, ""), "SENDING_REQUEST"),
        (ProviderError(ErrorKind.CONFIG, ""), "SENDING_REQUEST"),
        (ProviderError(ErrorKind.TIMEOUT, ""), "TIMEOUT"),
        (ProviderError(ErrorKind.BAD_RESPONSE, ""), "SENDING_REQUEST"),
        (ProviderError(ErrorKind.BAD_RESPONSE, "", status=200), "READING_BODY"),
        (ProviderError(ErrorKind.CONNECT, "", status=200), "READING_BODY"),
        (ProviderError(ErrorKind.CONNECT, "", status=500), "STATUS_NOT_OK"),
        (ProviderError(ErrorKind.HTTP, "", status=500), "STATUS_NOT_OK"),
        (ProviderError(ErrorKind.OVERLOADED, "", status=504), "STATUS_NOT_OK"),
    ],
)
def test_causes(error: ProviderError, cause: str) -> None:
    assert failure_cause(error) == cause


def test_reports_are_bounded() -> None:
    asking = Asking(backend())
    answers = asking.prompt()
    asking.fail(ErrorKind.HTTP, "x" * 100_000, status=500, url="u" * 100_000, body="y" * 100_000)
    assert len(str(answers[0])) < 5000


def test_whoever_is_gone_asks_nobody_else() -> None:
    asking = Asking(backend(), backend(models={"n": {}}))
    waiting, answers = asking.ask("Prompt", prompt="p")
    waiting.cancel()
    assert asking.client.cancelled == 1
    assert asking.models() == ["m"]
    assert isinstance(answers[0], CancelledError)
    assert asking.counts()["errors"] == {"cancelled": 1}


@pytest.mark.parametrize("request_", [None, "x", {}, {"payload": []}])
def test_payloads_that_are_none(request_: Any) -> None:
    asking = Asking(backend())
    answers = outcome(Deferred.fromCoroutine(asking.service.answer("Prompt", request_, CALLER)))
    assert answers[0].causes == ("INVALID_REQUEST",)


def test_statistics() -> None:
    asking = Asking(backend())
    before = encode_calldata(cast(Any, asking.service.statistics()))
    asking.prompt()
    asking.clock.advance(0.25)
    asking.say("x", 5, 2)
    asking.prompt()
    asking.clock.advance(0.5)
    asking.say("x", 5, 2, 9)
    asking.prompt()
    asking.clock.advance(0.125)
    refused(429, ErrorKind.RATE_LIMITED)(asking)
    asking.prompt()
    assert asking.counts() == {
        "requests": 4,
        "errors": {"rate_limited": 1},
        "prompt_tokens": 10,
        "completion_tokens": 4,
        "total_tokens": 16,
        "latency_count": 3,
        "latency_sum_ms": 875,
        "latency_max_ms": 500,
    }
    assert asking.changes == 7
    assert encode_calldata(cast(Any, asking.service.statistics())) != before


@pytest.mark.parametrize(
    "hello",
    [
        None,
        {},
        {"host_data": {}},
        {"cookie": "c"},
        {"cookie": "c", "host_data": []},
        {"cookie": b"c", "host_data": {}},
        {"genvm_id": True, "host_data": {}},
    ],
)
def test_what_is_no_hello(hello: Any) -> None:
    with pytest.raises(ValueError):
        Caller.of(hello)


def test_hellos() -> None:
    caller = Caller.of({"cookie": "c" * 200, "genvm_id": 5, "host_data": {"a": 1}, "more": 1})
    assert caller.log_fields() == {"cookie": "c" * 100, "genvm_id": 5}
    assert Caller.of({"genvm_id": 0, "host_data": {}}).log_fields() == {"genvm_id": 0}


@pytest.mark.parametrize(
    ("number", "value"),
    [
        (2**64 - 1, 2**64 - 1),
        (2**64, str(2**64)),
        (-(2**63), -(2**63)),
        (-(2**63) - 1, str(-(2**63) - 1)),
        (10**30, "1" + "0" * 30),
    ],
)
def test_an_integer_that_executors_cannot_hold_is_text(number: int, value: object) -> None:
    """An amount in wei would end the run."""
    assert parse_json_answer(json.dumps({"a": [number]})) == {"a": [value]}
    assert json_object_to_calldata({"a": [number]}) == {"a": [value]}


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b \ufeff"])
def test_an_empty_prompt_is_an_error_that_the_contract_can_catch(text: str) -> None:
    (error,) = Asking(backend()).prompt(prompt=text)
    assert (error.causes, error.fatal) == (("EMPTY_PROMPT",), False)
