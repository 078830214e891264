"""Which view of which part an image is: by codes, orientation, and the ways people spell it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.sr._cid_dict import cid_concepts
from pydicom.sr._snomed_dict import mapping
from pydicom.sr.codedict import codes

from pneumofed.common.imaging.dicom_header import read_header
from pneumofed.common.imaging.dicom_views import REGION_CODES, VIEW_CODES, read_body_part, read_view
from pneumofed.common.imaging.images import read_image
from pneumofed.common.imaging.patient_groups import (
    OTHER_PARTS,
    PART_TERMS,
    classify_view,
    is_frontal,
    is_other_part,
    is_view_term,
)
from tests.dicom_factory import draw_radiograph, make_dataset, write_dicom

SPELLINGS = {
    "frontal": ("PA", "AP", "AP_HORIZONTAL", "Frontal", "PORTABLE AP", "AP SUPINE", "pa/ap", "antero-posterior", "AP LORDOTIC"),
    "lateral": (
        *(
            "L",
            "LL",
            "RL",
            "LAT",
            "LATERAL",
            "R LAT",
            "LT LAT",
            "XTABLE LATERAL",
            "LLAT",
            "LAT_L",
            "RLAT",
            "LAT R",
            "LATERAL LEFT",
        ),
        *(
            "X-TABLE",
            "XTABLE",
            "CROSS TABLE",
            "RT LATERAL",
            "LEFT LATERAL",
            "lat.",
            "LAT PA",
            "LATL",
            "ML",
            "L LATERAL",
            "LAT ERECT",
        ),
    ),
    "oblique": ("OBLIQUE", "OBL", "LAO", "RAO", "LPO", "RPO", "LLO", "RLO", "AP OBLIQUE", "OBLIQUE_R"),
    "decubitus": ("LLD", "RLD", "DECUB", "LT LAT DECUBITUS", "AP DECUB", "LATERAL DECUBITUS"),
    "other": ("SWIMMERS", "AXIAL", "CC"),
    "unknown": ("", "ERECT", "SUPINE", "CHEST", "R", "FOO"),
}


@pytest.mark.parametrize(("kind", "word"), [(kind, word) for kind, words in SPELLINGS.items() for word in words])
def test_spellings_of_a_view_are_understood(kind: str, word: str) -> None:
    assert classify_view(word) == kind
    assert is_frontal(word) == (kind in ("frontal", "unknown"))


def item(value: str, scheme: str) -> Dataset:
    dataset = Dataset()
    dataset.CodeValue, dataset.CodingSchemeDesignator, dataset.CodeMeaning = value, scheme, "Zwingli"
    return dataset


@pytest.mark.parametrize(("cid", "ours"), [(4010, VIEW_CODES), (4009, REGION_CODES)])
def test_codes_are_those_of_the_context_groups(cid: int, ours: tuple[Any, ...]) -> None:
    group = [getattr(getattr(codes, f"cid{cid}"), name) for names in cid_concepts[cid].values() for name in names]
    standard = {concept.value: concept.meaning.lower() for concept in group}
    out_of_use = {"51185008", "39607008", "113345001", "12921003"}
    for code in ours:
        assert code.snomed in standard or code.snomed in out_of_use, code
        assert not code.legacy or mapping["SRT"].get(code.legacy) == code.snomed or code.legacy == "R-10214", code
        assert standard.get(code.snomed, code.meaning.lower()) == code.meaning.lower(), code


@pytest.mark.parametrize(
    ("tags", "kind", "source"),
    [
        ({}, "unknown", ""),
        ({"ViewPosition": "PA"}, "frontal", "ViewPosition"),
        ({"ViewCodeSequence": [item("399033003", "SCT")]}, "frontal", "ViewCodeSequence"),
        ({"ViewCodeSequence": [item("R-10202", "SRT")]}, "frontal", "ViewCodeSequence"),
        ({"ViewCodeSequence": [item("R-102CD", "SNM3")]}, "lateral", "ViewCodeSequence"),
        ({"ViewCodeSequence": [item("399173006", "SCT")], "ViewPosition": "PA"}, "lateral", "ViewCodeSequence"),
        ({"ViewCodeSequence": [item("399173006", "99ACME")]}, "unknown", ""),
        ({"PatientOrientation": ["A", "F"]}, "lateral", "PatientOrientation"),
        ({"PatientOrientation": ["P", "F"], "ViewPosition": "AP"}, "lateral", "PatientOrientation"),
        ({"PatientOrientation": ["L", "F"]}, "frontal", "PatientOrientation"),
        ({"PatientOrientation": ["LA", "F"]}, "oblique", "PatientOrientation"),
        ({"PatientPosition": "HFDL", "ViewPosition": "AP"}, "decubitus", "PatientPosition"),
        ({"SeriesDescription": "W033 Thorax lateral"}, "lateral", "SeriesDescription"),
        ({"SeriesDescription": "CHEST (PA and LAT)"}, "unknown", ""),
        ({"ProtocolName": "Chest LAT", "ViewPosition": "PA"}, "frontal", "ViewPosition"),
        ({"ImageLaterality": "L", "SeriesDescription": "BILATERAL RIBS"}, "unknown", ""),
    ],
)
def test_a_files_view_comes_from_all_that_it_states(tmp_path: Path, tags: dict[str, Any], kind: str, source: str) -> None:
    view = read_view(make_dataset(draw_radiograph(), **tags))
    assert (view.projection, view.source) == (kind, source)
    assert classify_view(view.word) == kind
    path = write_dicom(tmp_path / "a.dcm", draw_radiograph(), **tags)
    assert classify_view(read_image(path).info.view or "") == classify_view(read_header(path).view) == kind


@pytest.mark.parametrize(
    ("tags", "part"),
    [
        ({"BodyPartExamined": "CHEST"}, "CHEST"),
        ({"BodyPartExamined": "CHEST", "AnatomicRegionSequence": [item("30021000", "SCT")]}, "LEG"),
        ({"AnatomicRegionSequence": [item("T-D3000", "SRT")]}, "CHEST"),
        ({"BodyPartExamined": "LUNGE", "AnatomicRegionSequence": [item("1", "99ACME")]}, "LUNGE"),
    ],
)
def test_the_coded_region_counts_before_the_word(tags: dict[str, Any], part: str) -> None:
    assert read_body_part(make_dataset(draw_radiograph(), **tags)) == part


def test_a_part_of_the_body_is_another_one_only_if_it_is_known() -> None:
    assert is_other_part("LEG")
    assert not is_other_part("CHEST ABDOMEN")
    assert not is_other_part("BRUSTKORB")
    assert all(code.word in PART_TERMS for code in REGION_CODES)
    assert all(is_view_term(code.word) for code in VIEW_CODES)
    assert {code.word for code in REGION_CODES if is_other_part(code.word)} <= OTHER_PARTS


def test_a_name_is_no_view() -> None:
    assert not any(is_view_term(word) for word in ("LI", "MUELLER PA", "LAT ZWINGLI", "", "PA 77341"))
    assert is_view_term("R LAT")
