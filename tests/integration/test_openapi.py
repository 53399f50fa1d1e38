"""The API as it describes itself: classes of answers, the document, the page, and what follows."""

from __future__ import annotations

import json
from typing import Any

import msgspec

import genvm_manager
from genvm_manager import (
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
from .support import TIMESTAMP, Root, run_body
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
    daemon.run("sleep 60")
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
        genvm_id = daemon.run("spam stdout 300000", "print-err x", "log info x", "sleep 60")
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
