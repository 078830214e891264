"""Promise: who withdraws is gone. Attack: lists as spreadsheets and hospital systems write them, which match nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.client.site_folder import make_site, manifest_of, run_data
from tests.common.data.conftest import write_image, write_table


@pytest.fixture
def site(tmp_path: Path) -> Path:
    site = make_site(tmp_path / "site")
    patients = ("00042", "0007", "ab-9", "Zoë")
    rows = [f"{write_image(tmp_path / f'{n}.png', n)},{patient},normal" for n, patient in enumerate(patients)]
    write_table(tmp_path / "t.csv", "path,patient,label", *rows)
    assert run_data(site, "add", "table", str(tmp_path / "t.csv"))[1]["total"] == 4
    return site


@pytest.mark.parametrize(
    ("line", "change"),
    [
        ("42", "with 3 more leading zeros"),
        ("42.0", "without the decimals and with 3 more leading zeros"),
        ("00042.0", "without the decimals"),
        ("'00042'", "without quotes"),
        ("007", "with 1 more leading zero"),
        ("AB-9", "in small letters"),
        ("4711", ""),
    ],
)
def test_nobody_is_left_in_silently(site: Path, line: str, change: str) -> None:
    (site / "list.txt").write_text(f"Zoë\n{line}\n")
    for rows in (1, 0):  # the second time too
        code, told = run_data(site, "remove", "--patients", str(site / "list.txt"))
        assert (code, told["rows"], told["not_found"]["2"]) == (5, rows, change)
    assert len(manifest_of(site)) == 3


def test_the_numbers_themselves_are_not_repeated(site: Path) -> None:
    (site / "list.txt").write_text("42.0\nDOE\n")
    assert "42" not in str(run_data(site, "remove", "--patients", str(site / "list.txt"))[1])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("name", ["Zoë", "Zoe\u0308"])
def test_the_encoding_of_the_list_does_not_keep_anybody_in(site: Path, encoding: str, name: str) -> None:
    if encoding == "cp1252" and not name.isascii() and len(name) > 3:
        pytest.skip("this spelling does not exist there")
    (site / "list.txt").write_bytes(f"{name}\r\n".encode(encoding))
    assert run_data(site, "remove", "--patients", str(site / "list.txt"))[1]["rows"] == 1
