"""The API as it describes itself: classes of answers, the document, the page, and what follows."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
from typing import Any

import msgspec
import pytest

import genvm_manager
from genvm_manager import (
    API_ENDPOINTS,
    CheckResult,
    ContractSchema,
    DeploymentWrites,
    DetectedVersion,
    DrainAnswer,
    EndpointList,
    ErrorAnswer,
    ExecutionAnswer,
    ExecutionOutcome,
    ExecutionPage,
    Happening,
    LogLevelAnswer,
    LogLevelSet,
    ManagerStatus,
    ManifestReloaded,
    MissedEvents,
    MissedOutput,
    ModuleRestarted,
    ModuleStarted,
    ModuleStopped,
    OutputText,
    PermitsAnswer,
    PermitsSet,
    Ready,
    Reply,
    RunStarted,
    ShutdownCompleted,
    VariableNames,
    VariableSet,
    VersionList,
)

from .conftest import Start
from .support import TIMESTAMP, WAIT, Root, run_body
from .test_operation import following

MOMENT = {"Deployment-Timestamp": TIMESTAMP}
CODE = b'# v0.1.0\non schema\nreturn "{}"\n'
MODULE = {"module_type": "web", "config": {"bind_address": "127.0.0.1:0"}}


def strictly(data: bytes, kind: Any) -> Any:
    """Return an answer as an instance of its class, which has all of it, in this order."""
    found = msgspec.json.decode(data, type=kind)
    again = msgspec.json.encode(found)
    assert json.loads(again) == json.loads(data)
    if kind is not ExecutionPage:  # whose entries begin with the id
        pairs = [json.loads(text, object_pairs_hook=list) for text in (again, data)]
        assert pairs[0] == pairs[1]
    return found


def test_every_answer_is_of_its_class(root: Root, start: Start) -> None:
    daemon = start("--permits", "4")
    genvm_id = daemon.run("print hello", "log info text", "exit 3")
    daemon.run("sleep 600")
    check = {"host": "http://127.0.0.1:9", "provider": "ollama", "model": "m"}
    checks = {"configs": [check, {}], "test_prompts": [{"user_message": "OK"}]}
    requests: list[tuple[str, str, Any, Any]] = [
        ("GET", "/", None, EndpointList),
        ("GET", "/status", None, ManagerStatus),
        ("GET", "/readyz", None, Ready),
        ("GET", "/versions", None, VersionList),
        ("GET", "/genvm", None, ExecutionPage),
        ("GET", "/genvm?limit=1", None, ExecutionPage),
        ("POST", "/genvm/run", run_body("exit 0"), RunStarted),
        ("GET", f"/genvm/{genvm_id}?wait=60s", None, ExecutionAnswer),
        ("GET", f"/genvm/{genvm_id + 100}", None, ExecutionAnswer),
        ("GET", "/status", None, ManagerStatus),
        ("DELETE", f"/genvm/{genvm_id + 100}", None, ShutdownCompleted),
        ("GET", "/permits", None, PermitsAnswer),
        ("POST", "/permits", {"permits": 3}, PermitsSet),
        ("POST", "/drain", None, DrainAnswer),
        ("POST", "/undrain", None, DrainAnswer),
        ("POST", "/llm/check", checks, list[CheckResult]),
        ("POST", "/module/start", MODULE, ModuleStarted),
        ("GET", "/status", None, ManagerStatus),
        ("POST", "/module/restart", MODULE, ModuleRestarted),
        ("POST", "/module/stop", MODULE, ModuleStopped),
        ("GET", "/log/level", None, LogLevelAnswer),
        ("POST", "/log/level", {"level": "info"}, LogLevelSet),
        ("POST", "/manifest/reload", None, ManifestReloaded),
        ("POST", "/env", {"key": "A_KEY", "value": "v"}, VariableSet),
        ("POST", "/env", {"key": "OTHER", "value": "v"}, VariableSet),
        ("GET", "/env", None, VariableNames),
        ("POST", "/contract/detect-version", CODE, DetectedVersion),
        ("POST", "/contract/pre-deploy-writes", CODE * 10_000, DeploymentWrites),
        ("POST", "/genvm/run/readonly", CODE, ContractSchema),
    ]
    for method, path, body, kind in requests:
        reply = daemon.request(method, path, body, MOMENT)
        assert reply.status == 200, (path, reply.raw)
        strictly(reply.raw, kind)
    daemon.post("/drain")
    for method, path, body in (
        ("GET", "/genvm/7", None),  # status is null
        ("GET", "/readyz", None),  # reasons
        ("POST", "/module/start", {"module_type": "web"}),
        ("POST", "/genvm/run", {}),
        ("POST", "/nothing", None),
    ):
        reply = daemon.request(method, path, body)
        assert reply.status != 200
        strictly(reply.raw, ErrorAnswer)


def test_what_is_streamed_is_of_its_class(root: Root, start: Start) -> None:
    daemon = start()
    genvm_id = daemon.run("spam stdout 900000", "print ä", "log info x", "log-big 300000", "exit 0")
    daemon.result(genvm_id)
    reply = daemon.request("GET", f"/genvm/{genvm_id}")
    answer = strictly(reply.raw, ExecutionAnswer)
    assert (len(reply.raw) > 1_200_000, len(answer.status.genvm_log)) == (True, 2)


EVENTS = {kind.kind: kind for kind in Happening.__subclasses__()}


def test_every_event_is_of_its_class(root: Root, start: Start) -> None:
    daemon = start("--permits", "1", "--capture-max-bytes", "100000")
    seen = set()
    with following(daemon, "/events", {"Last-Event-ID": "other-1"}) as events:
        genvm_id = daemon.run("spam stdout 300000", "print-err x", "log info x", "sleep 600")
        with following(daemon, f"/genvm/{genvm_id}/events") as written:
            written.until("log")
        waiting = daemon.send("POST", "/genvm/run", run_body("exit 0", host_data="{}"))
        daemon.waiting(1)
        daemon.post("/permits", {"permits": 2})
        assert waiting.reply().status == 200
        daemon.post("/drain")
        daemon.post("/undrain")
        (root.path / "executor" / "v0.1.0" / "bin" / "genvm").unlink()
        assert daemon.request("POST", "/genvm/run", run_body()).status == 500
        daemon.post("/module/start", MODULE)
        daemon.request("DELETE", f"/genvm/{genvm_id}")
        for kind, data in events:
            seen.add(kind)
            strictly(json.dumps(data).encode(), EVENTS.get(kind, MissedEvents))
            if seen == {*EVENTS, "missed"}:
                break
    kinds: dict[str, Any] = {"stdout": OutputText, "stderr": OutputText, "missed": MissedOutput}
    kinds |= {"log": dict[str, Any], "finished": ExecutionOutcome}
    with following(daemon, f"/genvm/{genvm_id}/events") as events:
        found = events.until("finished")
    for kind, data in found:
        strictly(json.dumps(data).encode(), kinds[kind])
    assert {kind for kind, _ in found} == {*kinds}


def test_each_class_says_what_it_is() -> None:
    kinds = [
        k for k in vars(genvm_manager).values() if isinstance(k, type) and issubclass(k, Reply)
    ]
    assert len(kinds) > 40
    (_, schemas) = msgspec.json.schema_components(kinds)
    for name, schema in schemas.items():
        assert schema.get("description"), name


# --- the document ---


def validate(document: Any) -> None:
    """Judge a document; what does that takes a second to load, in every worker."""
    import openapi_spec_validator

    openapi_spec_validator.validate(document)


def test_the_document(start: Start) -> None:
    document = start().get("/openapi.json")
    validate(document)
    assert "securitySchemes" not in document["components"]
    described = {(m.upper(), path) for path, methods in document["paths"].items() for m in methods}
    assert described == {(each.method, each.path) for each in API_ENDPOINTS}
    run = document["paths"]["/genvm/run"]["post"]["responses"]
    assert set(run) == {"200", "403", "413", "415", "500", "503"}
    outcome = document["components"]["schemas"]["ExecutionOutcome"]["properties"]
    assert outcome["finished_at"]["description"].endswith("(milliseconds since 1970-01-01 UTC)")
    assert outcome["started_at"]["description"].endswith("(RFC 3339 text, UTC)")


def test_the_document_tells_the_settings(root: Root, start: Start) -> None:
    (root.path / "token").write_text("secret-token-of-a-test")
    (root.path / "token").chmod(0o600)
    flags = ("--auth-token-file", str(root.path / "token"), "--error-status", "http")
    daemon = start(*flags)
    assert daemon.request("GET", "/openapi.json").status == 401
    headers = {"Authorization": "Bearer secret-token-of-a-test"}
    document = daemon.request("GET", "/openapi.json", None, headers).json
    validate(document)
    run = document["paths"]["/genvm/run"]["post"]
    assert run["security"] == [{"token": []}]
    assert "security" not in document["paths"]["/livez"]["get"]
    assert {"400", "401", "422", "429"} < set(run["responses"])
    codes = run["responses"]["429"]["content"]["application/json"]["schema"]["properties"]["code"]
    assert codes == {"enum": ["queue_full"]}


def test_every_example_of_a_request_is_accepted(start: Start) -> None:
    daemon = start("--permits", "8")
    paths = daemon.get("/openapi.json")["paths"]
    sent = 0
    for path, methods in paths.items():
        for method, operation in methods.items():
            if "requestBody" in operation:
                ((form, content),) = operation["requestBody"]["content"].items()
                given = content["example"]
                body = given.encode() if isinstance(given, str) else given
                reply = daemon.request(method.upper(), path, body, {**MOMENT, "Content-Type": form})
                assert reply.status == 200, (path, reply.raw)
                sent += 1
    assert sent == sum(each.body is not None for each in API_ENDPOINTS) >= 10


@pytest.mark.parametrize("style", ["reference", "http"])
def test_every_example_of_an_answer_is_of_its_class(style: str) -> None:
    document = json.loads(genvm_manager.OpenApi(API_ENDPOINTS, style, True).json)
    for each in API_ENDPOINTS:
        responses = document["paths"][each.path][each.method.lower()]["responses"]
        for status, response in responses.items():
            kind = each.answer if status == "200" else ErrorAnswer
            if kind is not None:
                example = response["content"]["application/json"]["example"]
                strictly(json.dumps(example).encode(), kind)


# --- the page ---


def test_the_document_tells_hours_and_a_lack_of_threads() -> None:
    paths = genvm_manager.OpenApi(API_ENDPOINTS, "reference", False).document["paths"]
    wait = next(p for p in paths["/genvm/{genvm_id}"]["get"]["parameters"] if p["name"] == "wait")
    for text in ("1h", "99999999h", "2m", "1.5s"):
        assert re.fullmatch(wait["schema"]["pattern"], text)
        assert genvm_manager.parse_duration(text) > 0
    # A large body is read in a thread, which may not be had.
    assert "`resources_exhausted`" in paths["/permits"]["post"]["responses"]["503"]["description"]


def test_the_page_to_read(start: Start) -> None:
    daemon = start()
    connection = http.client.HTTPConnection(daemon.address, timeout=WAIT)
    connection.request("GET", "/docs")
    response = connection.getresponse()
    page = response.read().decode()
    connection.close()
    assert (response.status, response.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    policy = response.headers["Content-Security-Policy"]
    (style,) = re.findall("<style>(.*?)</style>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'; ")
    assert "<script" not in page and "://" not in re.sub("<pre>.*?</pre>", "", page, flags=re.S)
    for each in API_ENDPOINTS:
        assert f"<h2><code>{each.method} {each.path}</code></h2>" in page
    for name in re.findall('href="#([^"]+)"', page):
        assert f'<section id="{name}">' in page, name
    assert page.count("<section") == page.count("</section>") > 70
    assert (
        "&lt;"
        in genvm_manager.documentation_page(
            {
                "paths": {},
                "components": {"schemas": {"A": {"description": "<b>&", "properties": {}}}},
            }
        )[0].decode()
    )
