"""Generated requests, right and wrong ones, to every route (schemathesis): each answer is as the description says."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from pneumofed.common.ops.web import CSRF_HEADER
from tests.inference.reading_room.stage import ADMIN, PASSWORD, Stage, phantom_png

NOT_SAID = {
    "/api/predict": ["positive_data_acceptance"],
    "/api/explain": ["positive_data_acceptance"],
    "/api/cases": ["negative_data_rejection", "positive_data_acceptance"],
}
"""Bodies that are files, and JSON in a form: a schema can say no more than that they are bytes. In a form a number is bytes as well."""


REFUSALS = ["400", "401", "403", "404", "405", "406", "409", "413", "415", "422", "428", "429", "5xx"]
"""Schemathesis' own list of answers to a wrong request, and 413: a wrong body may also be too large to be looked at."""


@pytest.mark.slow
def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    assert sum(check_operation(stage, operation, examples=30) for operation in operations(stage)) > 500
    stage.room.close()


def operations(stage: Stage) -> list[Any]:
    """Every route but those that begin and end sessions."""
    import schemathesis
    from schemathesis.config import SchemathesisConfig

    stage.app.openapi_schema = _without_security(stage.app.openapi())
    config = SchemathesisConfig.from_dict({"checks": {"negative_data_rejection": {"expected-statuses": REFUSALS}}})
    described: Any = schemathesis.openapi.from_asgi("/api/openapi.json", stage.app, config=config)
    found = [result.ok() for result in described.get_all_operations()]
    return [operation for operation in found if operation.path not in ("/api/logout", "/api/password", "/api/login")]


def _without_security(described: dict[str, Any]) -> dict[str, Any]:
    """The description without who may ask: schemathesis would leave the session's cookie away, and its client send it all the same.

    `test_access.py` asks every route without it.
    """
    plain: dict[str, Any] = copy.deepcopy(described)
    for item in plain["paths"].values():
        for operation in item.values():
            operation.pop("security", None)
    return plain


def check_operation(stage: Stage, operation: Any, examples: int) -> int:
    """Sends generated requests as an admin and counts them; raises if an answer is not as the description says."""
    from schemathesis import GenerationMode
    from schemathesis.checks import CHECKS
    from schemathesis.python import asgi

    without = CHECKS.get_by_names(NOT_SAID[operation.path]) if operation.path in NOT_SAID else []
    sent, app = 0, cast(Any, stage.app)
    with asgi.get_client(app) as client:
        login = client.post("/api/login", json={"user": ADMIN, "password": PASSWORD})
        headers = {CSRF_HEADER: login.json()["csrf"]}
        file = {"files": ("x", phantom_png())}
        case = client.post("/api/cases", files=file, headers=headers).json()["files"][0]["case"]

        def check(generated: Any, known: bool) -> None:
            nonlocal sent
            sent += 1
            if known and generated.method == "GET" and "case" in generated.path_parameters:
                generated.path_parameters["case"] = case
            generated.call_and_validate(session=client, headers=headers, excluded_checks=without)

        quiet = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        for mode, known in ((GenerationMode.POSITIVE, st.booleans()), (GenerationMode.NEGATIVE, st.just(False))):
            with suppress(Unsatisfiable):  # a route that takes nothing has no wrong requests
                quiet(given(generated=operation.as_strategy(generation_mode=mode), known=known)(check))()
    return sent
