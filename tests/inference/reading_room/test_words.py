"""The page's words: both languages say everything, and everything that the page or the server says has words."""

from __future__ import annotations

import json
import re
from typing import get_args

from pneumofed.common.data.manifest import LABELS
from pneumofed.common.imaging.patient_groups import KINDS
from pneumofed.common.model_bundle.population import PopulationStatus
from pneumofed.common.model_bundle.suitability import Reason
from pneumofed.inference.reading_room import schema
from pneumofed.inference.reading_room.app import STATIC

SCRIPTS = [path for path in sorted(STATIC.glob("*.js")) if not path.name.startswith("words_")]
PAGE = (STATIC / "index.html").read_text(encoding="utf-8")


def words(language: str) -> dict[str, str]:
    text = (STATIC / f"words_{language}.js").read_text(encoding="utf-8")
    body = text[text.index("export default ") + len("export default ") :].rstrip().removesuffix(";")
    table: dict[str, str] = json.loads(re.sub(r",\s*}$", "}", body))
    assert len(table) == len(re.findall(r'^  "', body, re.MULTILINE)), "a key stands twice"
    return table


ENGLISH, CHINESE = words("en"), words("zh")


def has(key: str) -> bool:
    return key in ENGLISH or f"{key}.other" in ENGLISH


def test_both_languages_have_the_same_keys_and_none_is_empty() -> None:
    assert list(ENGLISH) == list(CHINESE)
    assert all(text.strip() for table in (ENGLISH, CHINESE) for text in table.values())


def test_both_languages_fill_in_the_same_values() -> None:
    holes = [{key: set(re.findall(r"\{(\w+)\}", text)) for key, text in table.items()} for table in (ENGLISH, CHINESE)]
    assert holes[0] == holes[1]


def test_chinese_is_chinese() -> None:
    same = {key for key in ENGLISH if ENGLISH[key] == CHINESE[key]}
    assert same <= {"gauge.tick"}
    assert all(re.search(r"[\u4e00-\u9fff]", CHINESE[key]) for key in set(CHINESE) - same)


def test_every_word_of_the_server_is_translated() -> None:
    expected = [f"error.{code}" for code in get_args(schema.ErrorCode)]
    expected += [f"reason.{reason.value}" for reason in Reason]
    expected += [f"label.{label}" for label in (*LABELS, "unsure", "tuberculosis")]
    expected += [f"verdict.{verdict.replace(' ', '_')}" for verdict in get_args(schema.Verdict)]
    expected += [f"status.{status}" for status in get_args(schema.Status)]
    expected += [f"population.{status.value}" for status in PopulationStatus]
    expected += [f"group.{group}" for groups in KINDS.values() for group in groups]
    expected += [f"heat.warning_{warning}" for warning in get_args(schema.MapWarning) if warning != "empty"]
    assert [key for key in expected if not has(key)] == []


def test_every_key_that_the_page_uses_has_words() -> None:
    used = set(re.findall(r'data-t(?:-\w+)?="([^"]+)"', PAGE))
    for script in SCRIPTS:
        used |= set(re.findall(r'\bt(?:Or)?\("([\w.]+)"', script.read_text(encoding="utf-8")))
    assert used
    assert sorted(key for key in used if not has(key)) == []


def test_the_page_needs_nothing_from_outside_and_nothing_inline() -> None:
    for path in STATIC.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|url\(|@import", text), path.name
    assert not re.search(r"\sstyle=|<style|\son\w+=|<script(?![^>]*\ssrc=)", PAGE)


def test_what_the_browser_keeps_is_the_language_and_the_keys_alone() -> None:
    kept = [line for path in SCRIPTS for line in path.read_text(encoding="utf-8").splitlines() if "Storage" in line]
    assert all("KEPT" in line for line in kept)
    values = {match for path in SCRIPTS for match in re.findall(r'KEPT = "([^"]+)"', path.read_text(encoding="utf-8"))}
    assert values == {"pneumofed-language", "pneumofed-keys"}


def test_text_is_never_set_as_markup() -> None:
    for path in SCRIPTS:
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", path.read_text(encoding="utf-8")
        ), path.name
