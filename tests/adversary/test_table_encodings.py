"""Promise: one patient has one pseudonym, and a table is read rightly or refused by its row. Attack: tables as spreadsheets write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pneumofed.common.data.dataset import check_causes
from pneumofed.common.data.manifest import ImageRecord, Manifest, read_manifest
from pneumofed.common.data.sources.dicom import read_labels
from pneumofed.common.data.sources.table import read_csv
from pneumofed.common.errors import DataError, EmptySiteError, SkipReason
from pneumofed.common.imaging.dicom_header import Pseudonyms
from tests.client.site_folder import make_site, manifest_of, run_data
from tests.common.data.conftest import write_image

CHINESE = "path,patient,label\n1.png,张伟,正常\n2.png,王芳,肺炎\n"
GERMAN = "path,patient,label,note\n1.png,Müller,normal,größer\n2.png,Jäger,pneumonia,\n"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [(text, encoding) for text in (CHINESE, GERMAN) for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be")]
    + [(CHINESE, "gbk"), (CHINESE, "gb18030"), (GERMAN, "cp1252"), (GERMAN, "latin-1"), (GERMAN, "cp1250")],
)
def test_a_patient_has_one_pseudonym_whatever_the_encoding(tmp_path: Path, text: str, encoding: str) -> None:
    (tmp_path / "t.csv").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    manifest, _ = read_csv(tmp_path / "t.csv", label_map={"正常": "normal", "肺炎": "pneumonia"})
    assert manifest.patients == tuple(line.split(",")[1] for line in text.splitlines()[1:])
    assert manifest.labels == ("normal", "pneumonia")


@pytest.mark.parametrize(
    ("patient", "encoding"),
    [
        ("김철수", "euc-kr"),
        ("山田たろう", "euc-jp"),
        ("山田", "cp932"),
        ("Иванов", "cp1251"),
        ("王小明", "big5"),
        ("Łukasz", "cp1250"),
    ],
)
def test_what_is_not_certain_is_refused_by_its_row(tmp_path: Path, patient: str, encoding: str) -> None:
    (tmp_path / "t.csv").write_bytes(f"path,patient,label\n1.png,7,normal\n2.png,{patient},normal\n".encode(encoding))
    with pytest.raises(DataError, match=r"row 3.*CSV UTF-8"):
        read_csv(tmp_path / "t.csv")
    with pytest.raises(DataError, match="row 3"):
        read_manifest(tmp_path / "t.csv")


@pytest.mark.parametrize("given", [" 42 ", "42\u00a0", "\ufeff42", "４２", "42\u200b", "\t42"])
def test_blanks_and_full_width_digits_make_no_second_patient(given: str) -> None:
    pseudonyms = Pseudonyms(b"k" * 32)
    assert pseudonyms.patient(given) == pseudonyms.patient("42")


def test_two_spellings_of_one_letter_make_no_second_patient() -> None:
    assert Pseudonyms(b"k" * 32).patient("Zoe\u0308") == Pseudonyms(b"k" * 32).patient("Zoë")


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\npath;patient;label\na/1.png;7;normal\n",
        '"sep=\t"\npath\tpatient\tlabel\na/1.png\t7\tnormal\n',
        "path;patient;label\na/1.png;7;normal;;\n",
        'path, patient, label\n"a/1.png", "7", "normal"\n',
        " path ,patient,label\n a/1.png ,7,normal,\n",
        "path,patient,label\na\\1.png,7,normal\n",
        "path,patient,label\n ,,\na/1.png,7,normal\n",
    ],
)
def test_what_spreadsheets_add_costs_no_table_and_no_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "a").mkdir()
    write_image(tmp_path / "a" / "1.png", 1)
    (tmp_path / "t.csv").write_text(text)
    manifest, _ = read_csv(tmp_path / "t.csv")
    assert [(record.path, record.patient, record.label) for record in manifest.records][-1] == (
        tmp_path / "a/1.png",
        "7",
        "normal",
    )
    assert manifest.records[-1].path.is_file()


def test_a_label_table_is_read_by_the_same_rule(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_bytes("sep=;\nfilename;label\ngrün\\1.dcm;normal\n".encode("cp1252"))
    assert read_labels(tmp_path / "l.csv")["file"] == {"grün/1.dcm": "normal"}


def test_rows_that_disagree_are_set_aside_and_counted(tmp_path: Path) -> None:
    site, files = make_site(tmp_path / "site"), [write_image(tmp_path / f"{n}.png", n) for n in range(4)]
    rows = ["0,p,normal", "0,p,viral", "1,p,normal", "1,q,normal", "2,p,normal", "2,p,normal", "3,q,viral"]
    text = "".join(f"{files[int(row[0])]}{row[1:]}\n" for row in rows)
    (tmp_path / "t.csv").write_text("path,patient,label\n" + text)
    told = run_data(site, "add", "table", str(tmp_path / "t.csv"))[1]
    assert told["skipped"] == {SkipReason.CONTRADICTED.value: 4}
    assert (told["found"], told["used"], told["total"], told["patients"]) == (7, 3, 2, 2)
    assert manifest_of(site).labels == ("normal", "viral")


def test_a_task_of_causes_without_causes_is_refused() -> None:
    unknown = Manifest(tuple(ImageRecord(Path(str(n)), str(n), label) for n, label in enumerate(["normal", "pneumonia"])))
    with pytest.raises(EmptySiteError, match="needs the cause of a pneumonia, 'bacterial' or 'viral'"):
        check_causes(unknown, "three_class")
    check_causes(unknown, "binary")
    check_causes(Manifest((*unknown.records, ImageRecord(Path("3"), "3", "viral"))), "three_class")
