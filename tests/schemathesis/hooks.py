"""What keeps one request of schemathesis from deciding what becomes of the others."""

from __future__ import annotations

import json
import os
import urllib.request
from typing import Any

import schemathesis

UNDONE = {"/drain": ("undrain", None), "/permits": ("permits", {"permits": 8})}


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """A drain would wait for results that nobody reads."""
    if case.operation.path == "/drain":
        case.query = {n: v for n, v in (case.query or {}).items() if n not in {"wait", "wait_ms"}}


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """Where new runs are refused or have no permits, none would get further."""
    if case.operation.path in UNDONE:
        path, body = UNDONE[case.operation.path]
        data = json.dumps(body).encode()
        with urllib.request.urlopen(f"{os.environ['MANAGER_URL']}/{path}", data, 10) as answer:
            answer.read()
