"""A survey at the coordinator and its page: what sites hide is hidden here, what they lack is not zero, the formulas are the papers'."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import yaml

from pneumofed.common.audit.log import read_entries
from pneumofed.common.config.parties import CoordinatorConfig, SurveyField
from pneumofed.common.data.manifest import Manifest, read_manifest, write_manifest
from pneumofed.common.errors import ConfigError, MessageError, RoundError
from pneumofed.common.evaluation.comparison import NonInferiority, judge_areas
from pneumofed.common.evaluation.paired import paired_areas
from pneumofed.common.wire.messages import SURVEY, Presence, pack_presence
from pneumofed.common.wire.survey import ANSWER, SurveyAnswer, pack_survey, unpack_survey
from pneumofed.server.federation.survey import SurveyResult, read_survey, run_survey, write_survey
from pneumofed.server.report.survey import (
    PowerAssumptions,
    analyse_survey,
    area_error,
    noninferiority_patients,
    noninferiority_power,
    write_survey_page,
)
from tests.client.federation.test_policy import give_policy
from tests.common.evaluation.draws import of_scores
from tests.tiny import TinyFederation, draw_manifest, tiny_experiment

ASKED: list[SurveyField] = ["label", "sex", "age", "images"]


def survey(federation: TinyFederation, **strategy: Any) -> SurveyResult:
    settings = CoordinatorConfig(
        run_dir=str(federation.folder / "survey"), survey=ASKED, audit_log=str(federation.folder / "audit")
    )
    return run_survey(federation.grid(), tiny_experiment(strategy=strategy), settings)


def page_of(federation: TinyFederation) -> str:
    return write_survey_page(federation.folder / "survey").read_text()


def give_sexes(federation: TinyFederation, number: int) -> None:
    """37 women and 3 men."""
    path = federation.sites / f"site-{number}" / "manifest.csv"
    records = read_manifest(path).records
    people = list(dict.fromkeys(one.patient for one in records))
    write_manifest(Manifest(tuple(replace(one, sex="M" if people.index(one.patient) < 3 else "F") for one in records)), path)


@pytest.fixture
def federation(tmp_path: Path) -> TinyFederation:
    """Site 0 tells everything and has three men, site 1 tells labels only, site 2 nothing."""
    found = TinyFederation(tmp_path, sites=3, patients=40)
    for number in range(3):
        give_sexes(found, number)
    give_policy(found, 0, survey=ASKED)
    give_policy(found, 1)
    give_policy(found, 2, survey=[])
    return found


def test_each_site_tells_what_its_policy_allows_and_the_rest_say_why_not(federation: TinyFederation) -> None:
    result = survey(federation)
    assert {site: set(answer.withheld) for site, answer in result.answers.items()} == {
        "site-0": set(),
        "site-1": {"sex", "age", "images"},
    }
    assert result.absent == {"site-2": "PolicyError: the site's policy refuses this (survey)"}
    assert result.answers["site-0"].missing == ("age",)
    assert read_survey(federation.folder / "survey") == result
    (line,) = read_entries(federation.folder / "audit")
    assert (line.event, set(line.facts["heads"])) == ("survey", {"site-0", "site-1"})


def test_what_a_policy_hides_is_hidden_on_the_page_and_what_is_missing_is_no_zero(federation: TinyFederation) -> None:
    survey(federation)
    page = page_of(federation)
    sexes = page.partition('aria-label="sex"')[2].partition("</table>")[0]
    site_0, site_1 = sexes.split('<th scope="row">')[1:]
    assert ">40" in site_0
    assert "M" not in re.findall(r'class="n">([^<]+)</th>', sexes)  # three men are no column
    assert re.findall(r"<td[^>]*>([^<]*)", site_1) == ["not told"]
    assert "not recorded" in page.partition("age group")[2]
    assert "site-2: PolicyError" in page
    text = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    cells = [int(number.replace(",", "")) for number in re.findall(r'<td class="n" style[^>]*>([\d,]+)', text)]
    assert cells
    assert all(number % 10 == 0 and number >= 10 for number in cells)
    assert "patient-" not in page + (federation.folder / "survey" / "survey.json").read_text()


def test_a_survey_that_nobody_answers_says_why_and_has_a_page(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path, sites=1, patients=40)
    give_policy(federation, 0, survey=[])
    with pytest.raises(
        RoundError, match=r"no site told anything\. site-0: PolicyError: the site's policy refuses this \(survey\)"
    ):
        survey(federation)
    assert "0 hospitals answered" in page_of(federation)


def test_secure_aggregation_and_no_question_are_refused_in_a_sentence(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path, sites=1)
    settings = CoordinatorConfig(run_dir=str(tmp_path / "survey"), survey=["label"])
    hidden = tiny_experiment(secure_aggregation={"enabled": True})
    with pytest.raises(ConfigError, match="a survey shows each site's own counts, which secure_aggregation hides"):
        run_survey(federation.grid(), hidden, settings)
    volumes = tiny_experiment(model={"name": "resnet18_slices"}, image={"slices": 8})
    with pytest.raises(ConfigError, match=r"a survey of CT volumes .* has no view; ask for label, sex, .*hounsfield"):
        run_survey(federation.grid(), volumes, settings.model_copy(update={"survey": ["label", "view"]}))
    with pytest.raises(ConfigError, match=r"a survey of radiographs .* has no slices"):
        run_survey(federation.grid(), tiny_experiment(), settings.model_copy(update={"survey": ["slices"]}))
    with pytest.raises(ConfigError, match="a survey asks for one field at least"):
        run_survey(federation.grid(), tiny_experiment(), settings.model_copy(update={"survey": []}))
    with pytest.raises(ConfigError, match="holds no survey"):
        write_survey_page(tmp_path)
    (tmp_path / "survey.json").write_text("{}")
    with pytest.raises(ConfigError, match="is damaged"):
        write_survey_page(tmp_path)


def test_the_page_of_own_classes_has_each_of_them_and_speaks_of_findings(tmp_path: Path) -> None:
    federation, own = TinyFederation(tmp_path, sites=0), ["normal", "pneumonia", "tuberculosis"]
    for number in range(2):
        federation.add_site(number, draw_manifest(tmp_path / f"images-{number}", 60, seed=number, labels=tuple(own)))
    settings = CoordinatorConfig(run_dir=str(federation.folder / "survey"), survey=["label"])
    result = run_survey(federation.grid(), tiny_experiment(task=own), settings)
    assert result.classes == tuple(own) and read_survey(federation.folder / "survey") == result
    assert {site: answer.tables["label"] for site, answer in result.answers.items()} == {
        f"site-{number}": dict.fromkeys(own, 20) for number in range(2)
    }
    found = analyse_survey(result, PowerAssumptions())
    assert (found["with_pneumonia"], found["without"]) == (80, 40)
    page = page_of(federation)
    assert "tuberculosis" in page and "class of the planned run" in page and "With a finding" in page
    with pytest.raises(MessageError, match="counted by other classes"):
        unpack_survey(pack_survey("site-0", result.answers["site-0"]), ["label"])


def test_two_nodes_of_one_name_are_one_site(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path, sites=2, patients=40)
    other = federation.sites / "1.yaml"
    other.write_text(yaml.safe_dump({**yaml.safe_load(other.read_text()), "name": "site-0"}))
    result = survey(federation)
    assert list(result.answers) == ["site-0"]
    assert list(result.absent.values()) == ["another node already answers as site-0"]


@pytest.mark.parametrize(
    "text",
    [
        '{"patients": 60, "tables": {"label": {"normal": 7}}}',
        '{"patients": 60, "tables": {"label": {"normal": 0}}}',
        '{"patients": 61, "tables": {"label": {"normal": 60}}}',
        '{"patients": 60, "tables": {"label": {"DOE^JANE": 60}}}',
        '{"patients": 60, "tables": {"name": {"normal": 60}}}',
        '{"patients": 60, "tables": {"label": {}}}',
        '{"patients": 60, "tables": {"label": {"normal": 60}}, "missing": ["label"]}',
        '{"patients": 60, "tables": {"label": {"normal": 60}}, "missing": ["sex"]}',
        '{"patients": 60, "tables": {"label": {"normal": 9999999999999990}}}',
        "[]",
        "no json",
    ],
)
def test_an_answer_of_another_form_is_left_out(text: str) -> None:
    content = pack_survey("north", SurveyAnswer(patients=60, tables={"label": {"normal": 60}}))
    assert unpack_survey(content, ["label"])[0].site == "north"
    content.config_records[SURVEY][ANSWER] = text
    with pytest.raises(MessageError, match="survey: expected"):
        unpack_survey(content, ["label"])


def test_a_site_that_knows_no_surveys_is_told_apart() -> None:
    with pytest.raises(MessageError, match="answered without a survey"):
        unpack_survey(pack_presence(Presence("north", "")), ["label"])


# --- distances and power ------------------------------------------------------------------------------------------------------------


def result_of(**tables: dict[SurveyField, dict[str, int]]) -> SurveyResult:
    asked: tuple[SurveyField, ...] = ("label", "age", "grey_level")
    answers = {}
    for site, told in tables.items():
        left = tuple(field for field in asked if field not in told)
        answers[site] = SurveyAnswer(patients=sum(told["label"].values()), tables=told, missing=left)
    return SurveyResult(name="study", asked=asked, validation_fraction=0.2, written="today", answers=answers)


def test_the_site_that_differs_is_named_and_one_that_states_less_is_not() -> None:
    grey = {"96-127": 500, "128-159": 500}
    found = analyse_survey(
        result_of(
            north={"label": {"normal": 500, "pneumonia": 500}, "grey_level": grey, "age": {"child": 990, "not stated": 10}},
            south={"label": {"normal": 500, "bacterial": 250, "viral": 250}, "grey_level": grey},
            east={"label": {"normal": 500, "pneumonia": 500}, "grey_level": {"96-127": 100, "192-223": 900}},
        ),
        PowerAssumptions(),
    )
    assert {field: [site for site, one in sites.items() if one["differs"]] for field, sites in found["distances"].items()} == {
        "label": [],
        "grey_level": ["east"],
    }
    assert found["label_skew_bits"] == pytest.approx(0.0, abs=1e-12)
    assert (found["with_pneumonia"], found["without"]) == (1500, 1500)


def test_few_patients_differ_by_chance_and_are_not_named() -> None:
    rng = np.random.default_rng(0)
    flagged = 0
    for _ in range(200):
        counts = [rng.multinomial(n, [0.5, 0.5]) // 10 * 10 for n in (60, 60)]
        sites: dict[str, dict[SurveyField, dict[str, int]]] = {
            f"s{i}": {"label": {"normal": int(a), "pneumonia": int(b)}} for i, (a, b) in enumerate(counts) if min(a, b)
        }
        if len(sites) == 2:
            flagged += any(
                one["differs"] for one in analyse_survey(result_of(**sites), PowerAssumptions())["distances"]["label"].values()
            )
    assert flagged <= 6


def test_the_standard_error_is_the_papers() -> None:
    """Hanley and McNeil 1982, the example of their table II: 51 abnormal and 58 normal images, area 0.893, standard error 0.032."""
    assert area_error(0.893, 51, 58) == pytest.approx(0.032, abs=0.001)
    assert np.isnan(area_error(0.9, 0, 58))


def test_the_needed_patients_have_the_power_and_one_in_a_hundred_fewer_have_not() -> None:
    assumed = PowerAssumptions(auroc=0.85, margin=0.03, power=0.9)
    needed = noninferiority_patients(assumed, 300, 100)
    assert needed is not None
    sick, well = needed
    assert sick / well == pytest.approx(3.0, rel=0.01)
    assert noninferiority_power(assumed, sick, well) >= 0.9 > noninferiority_power(assumed, 0.99 * sick, 0.99 * well)
    assert noninferiority_patients(assumed, 300, 0) is None


@pytest.mark.parametrize(("auroc", "margin", "correlation", "shared"), [(0.9, 0.05, 0.0, 0.0), (0.95, 0.03, 0.5, 0.6)])
def test_power_is_how_often_the_release_gate_passes_an_equal_model(
    auroc: float, margin: float, correlation: float, shared: float
) -> None:
    """Normal scores with so much in common that the AUROCs correlate as assumed; up to the form of the variance."""
    assumed, rng = PowerAssumptions(auroc=auroc, margin=margin, correlation=correlation), np.random.default_rng(1)
    needed = noninferiority_patients(assumed, 100, 60)
    assert needed is not None
    labels = np.repeat([1, 0], needed)
    apart, passed = np.sqrt(2.0) * NormalDist().inv_cdf(auroc), 0
    for _ in range(300):
        common = rng.normal(size=len(labels))
        drawn = np.sqrt(shared) * common + np.sqrt(1.0 - shared) * rng.normal(size=(2, len(labels))) + apart * labels
        old, new = (of_scores((1.0 / (1.0 + np.exp(-one))).tolist(), labels.tolist()) for one in drawn)
        passed += judge_areas(paired_areas(old, new), needed, margin, assumed.alpha).verdict is NonInferiority.NOT_WORSE
    assert passed / 300 == pytest.approx(0.8, abs=0.08)


def test_of_a_handful_no_model_passes() -> None:
    assert noninferiority_power(PowerAssumptions(), 3, 3) < 0.05


def test_a_class_of_few_is_not_none(tmp_path: Path) -> None:
    write_survey(tmp_path, result_of(north={"label": {"normal": 500}}, south={"label": {"normal": 400, "pneumonia": 300}}))
    page = write_survey_page(tmp_path).read_text()
    row = page.partition('id="power"')[2].partition('<th scope="row">north</th>')[2].partition("</tr>")[0]
    assert re.findall(r'<td class="n">([^<]+)</td>', row) == ["few", "100", "–", "–"]
    assert json.loads((tmp_path / "analysis.json").read_text())["power"]["north"]["sick"] is None
