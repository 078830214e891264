"""Words of numbers and lists in sentences."""

from __future__ import annotations

import pytest

from pneumofed.common.errors import counted, in_a_row


@pytest.mark.parametrize(
    ("words", "sentence"), [([], ""), (["AP"], "AP"), (["AP", "PA"], "AP and PA"), (iter("abc"), "a, b and c")]
)
def test_a_list_reads_as_a_sentence(words: list[str], sentence: str) -> None:
    assert in_a_row(words) == sentence


def test_a_count_agrees_with_its_noun() -> None:
    assert [counted(n, "image") for n in (0, 1, 5216)] == ["0 images", "1 image", "5,216 images"]
    assert counted(2, "study", "studies") == "2 studies"
