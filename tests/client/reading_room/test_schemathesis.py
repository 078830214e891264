"""Generated requests, right and wrong ones, to every route (schemathesis): each answer is as the description says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.web.headers import CSRF_HEADER
from tests.client.reading_room.stage import ADMIN, PASSWORD, Stage, phantom_png


@pytest.mark.slow
def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    requests = sum(check_operation(stage, operation, examples=30) for operation in operations(stage))
    print(requests, "requests")
    assert requests > 400
    stage.room.close()


def operations(stage: Stage) -> list[Any]:
    """Every route but those that end the session which the others need."""
    import schemathesis

    described = schemathesis.openapi.from_asgi("/api/openapi.json", stage.app)
    found = [result.ok() for result in described.get_all_operations()]
    return [operation for operation in found if operation.path not in ("/api/logout", "/api/password", "/api/login")]


def check_operation(stage: Stage, operation: Any, examples: int) -> int:
    """Sends generated requests as an admin and counts them; raises if an answer is not as the description says."""
    from schemathesis.python import asgi

    sent = 0
    with asgi.get_client(stage.app) as client:
        login = client.post("/api/login", json={"user": ADMIN, "password": PASSWORD})
        headers = {CSRF_HEADER: login.json()["csrf"]}
        file = {"files": ("x", phantom_png())}
        case = client.post("/api/cases", files=file, headers=headers).json()["files"][0]["case"]

        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(generated=operation.as_strategy(), known=st.booleans())
        def check(generated: Any, known: bool) -> None:
            nonlocal sent
            sent += 1
            if "case" in generated.path_parameters and generated.method == "GET" and known:
                generated.path_parameters["case"] = case
            generated.call_and_validate(session=client, headers=headers)

        check()
    return sent
