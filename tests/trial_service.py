"""The assembled service inside a reactor that it does not own; run by trial.

pytest cannot run trial's test cases once pytest-twisted runs the reactor, so
``test_under_trial.py`` starts trial in a process of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import treq
from twisted.internet import reactor
from twisted.internet.defer import inlineCallbacks
from twisted.trial.unittest import TestCase
from twisted.web.client import Agent, HTTPConnectionPool

from genvm_manager import Config, ManagerService, make_practice_root, makeService

ACCOUNT = "AAAAAAAAAAAAAAAAAAAAAAAAAAE="
MESSAGE = {
    **dict.fromkeys(("contract_address", "sender_address", "origin_address"), ACCOUNT),
    "chain_id": "1",
    "value": None,
    "is_init": False,
}


class ServiceTests(TestCase):
    """Trial itself checks that the service leaves no timer, connection or process behind."""

    timeout = 120

    def setUp(self) -> None:
        root = Path(self.mktemp()).absolute()
        make_practice_root(root)
        config = Config(port=0, root=root, manifest_path=root / "data" / "manifest.yaml", permits=2)
        self.service: ManagerService = makeService(config, reactor)
        self.addCleanup(self.service.stopService)
        self.service.privilegedStartService()
        self.service.startService()
        pool = HTTPConnectionPool(reactor, persistent=False)
        self.http = treq.client.HTTPClient(Agent(reactor, pool=pool))  # type: ignore[arg-type]  # zope interfaces have no types here

    @inlineCallbacks
    def request(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        url = f"http://{self.service.addresses[0]}{path}"
        response = yield self.http.request(method, url, data=data)
        answer = yield response.json()
        return response.code, answer

    def run_body(self, steps: str) -> dict[str, object]:
        return {
            "major": 0,
            "message": MESSAGE,
            "is_sync": True,
            "capture_output": True,
            "max_execution_minutes": 1,
            "host_data": json.dumps({"node_address": "0x", "tx_id": "0x", "practice": steps}),
            "timestamp": "2025-06-01T00:00:00Z",
            "host": "unix:///nowhere",
        }

    @inlineCallbacks
    def test_a_run_goes_from_request_to_result(self) -> Any:
        code, started = yield self.request("POST", "/genvm/run", self.run_body("print hi\nexit 3"))
        self.assertEqual((code, started["result"]), (200, "started"))
        code, answer = yield self.request("GET", f"/genvm/{started['id']}?wait=30s")
        self.assertEqual(code, 200)
        self.assertEqual(answer["status"]["stdout"], "hi\n")
        self.assertEqual(answer["status"]["exit_code"], 3)
        self.assertEqual(answer["status"]["cause"], "exited")
        code, permits = yield self.request("GET", "/permits")
        self.assertEqual(permits["available"], 2)

    @inlineCallbacks
    def test_stopping_the_service_ends_its_runs(self) -> Any:
        _, started = yield self.request("POST", "/genvm/run", self.run_body("sleep 600"))
        execution = self.service.executions.get(started["id"])
        child = execution.child
        assert child is not None
        self.assertFalse(child.exited)
        yield self.service.stopService()
        self.assertTrue(child.exited)
        assert execution.cause is not None
        self.assertEqual(execution.cause.value, "shutdown")

    @inlineCallbacks
    def test_status_names_what_runs(self) -> Any:
        _, started = yield self.request("POST", "/genvm/run", self.run_body("sleep 600"))
        code, status = yield self.request("GET", "/status")
        self.assertEqual(code, 200)
        genvm_id = started["id"]
        self.assertEqual(status["executions"][str(genvm_id)]["state"], "running")
        self.assertEqual(status["permits"]["in_use"], 1)
        code, answer = yield self.request("DELETE", f"/genvm/{genvm_id}")
        self.assertEqual(answer, {"result": "shutdown_completed", "genvm_id": genvm_id})
