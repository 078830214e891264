"""The interface is what its description says."""

from __future__ import annotations

import json
import re

from pneumofed.inference.reading_room.app import STATIC
from pneumofed.inference.reading_room.errors import SENTENCES, sentence
from pneumofed.inference.reading_room.schema import ErrorBody, ErrorCode
from tests.inference.reading_room.stage import Stage
from tests.test_architecture import circles

IMPORT = re.compile(r"""^(?:import|export)\b[^;]*?["']\./([\w.-]+\.js)["']""", re.MULTILINE)


def test_every_error_has_a_sentence() -> None:
    codes = ErrorCode.__args__  # type: ignore[attr-defined]
    assert all(sentence(code) for code in codes)
    assert set(SENTENCES) <= set(codes)


def test_every_refusal_is_described(stage: Stage) -> None:
    described = stage.app.openapi()
    assert "HTTPValidationError" not in json.dumps(described)
    for path, item in described["paths"].items():
        for operation in item.values():
            for status, answer in operation["responses"].items():
                if status >= "400" and (path, status) != ("/api/health", "503"):
                    [content] = answer["content"].values()
                    assert content["schema"]["$ref"].endswith("/ErrorBody")


def test_a_problem_has_no_room_for_values() -> None:
    """`column` is a name of the model's schema, see `test_clinical_values`."""
    assert set(ErrorBody.model_fields) == {"error", "detail", "retry_sec", "column"}


def test_no_circle_of_imports_in_the_page() -> None:
    graph = {path.name: set(IMPORT.findall(path.read_text(encoding="utf-8"))) for path in STATIC.glob("*.js")}
    assert "api.js" in graph["session.js"] and set().union(*graph.values()) <= set(graph)
    assert circles(graph) == []
