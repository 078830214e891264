"""The report: one valid, self-contained page in any state of a run, which says no more than the run shows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import pytest

from pneumofed.common.config.choices import ModelName, StrategyName, VolumeModelName
from pneumofed.server.report.report import write_report
from pneumofed.server.report.wording import MODEL_NAMES, STRATEGY_NAMES
from tests.server.report.report_runs import THRESHOLD, RunMaker

VOID = {"meta", "img", "br", "link", "input"}
REASON = "round 1: 0 good updates, 1 are needed (strategy.min_sites). "
SITES = "north: MemoryError: the site ran out of memory; a smaller batch size may help; node 17: Timeout: no reply"


class Page(HTMLParser):
    """A parsed report: text outside code, loads, problems of nesting, pictures without words, tables without headers."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.problems: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.badge = self.text = ""
        self.feed(html)
        self.close()
        self.problems += [f"<{tag}> is never closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.loads += [values[name] for name in ("src", "srcset", "data", "poster") if name in values]
        self.ids += [values["id"]] if "id" in values else []
        if tag in {"link", "script", "iframe", "object", "base"}:
            self.problems.append(f"<{tag}>")
        if tag == "a":
            self.links.append(values["href"])
        if tag == "img" and not values.get("alt"):
            self.problems.append("picture without words")
        if tag == "th" and values.get("scope") not in {"col", "row"}:
            self.problems.append("table header without scope")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes another element")
        self.text += " " if tag == "li" else ""

    def handle_data(self, data: str) -> None:
        if not {"style", "pre"} & set(self.open):
            self.text += data
        if self.open[-1:] == ["span"]:
            self.badge += data


def read(path: Path) -> Page:
    """The parsed report of the run in `path`, with runs of white space made one."""
    page = Page(write_report(path).read_text(encoding="utf-8"))
    page.text = re.sub(r"\s+", " ", page.text)
    return page


def check(page: Page) -> None:
    """What holds for the report of every run."""
    assert page.problems == []
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert not re.search(r"\b(nan|None|null|inf|Undefined)\b", page.text)
    assert "medical device" in page.text


@pytest.mark.parametrize(("name", "said"), [("efficientnet_lite0", "An EfficientNet-Lite0"), ("resnet18", "A ResNet-18")])
def test_the_summary_says_what_was_trained_and_that_each_set_was_dealt_to_its_own_hospitals(
    tmp_path: Path, name: str, said: str
) -> None:
    page = read(RunMaker(tmp_path, model={"name": name}).rounds(2).end("succeeded", ["test"]).simulated().path)
    assert f"{said} was trained with FedAvg" in page.text
    assert "The images of each set were dealt to its hospitals, each with" in page.text


def test_every_network_and_strategy_has_words() -> None:
    assert set(MODEL_NAMES) == {*get_args(ModelName), *get_args(VolumeModelName)}
    assert set(STRATEGY_NAMES) == set(get_args(StrategyName))


@pytest.mark.parametrize("ema_decay", [0.0, 0.7])
def test_a_model_that_is_a_moving_average_is_called_one(tmp_path: Path, ema_decay: float) -> None:
    page = read(RunMaker(tmp_path, strategy={"ema_decay": ema_decay}).rounds(1).path)
    check(page)
    assert ("moving average of its weights over the rounds." in page.text) == (ema_decay > 0)


def begun(path: Path, **values: Any) -> RunMaker:
    return RunMaker(path, **values)


def failed_at_once(path: Path) -> RunMaker:
    return RunMaker(path).end("failed", error=REASON + SITES).simulated()


def stopped(path: Path) -> RunMaker:
    return RunMaker(path).rounds(2).end("stopped", error="stopped by the user; --resume goes on after the last completed round")


def killed(path: Path) -> RunMaker:
    return RunMaker(path).rounds(1, sets=["test"])


def without_central_sets(path: Path) -> RunMaker:
    run = RunMaker(path).rounds(1, sets=[])
    return run.end("succeeded", threshold=THRESHOLD, classes=["normal", "pneumonia"], sites={}, data={})


def without_any_metric(path: Path) -> RunMaker:
    """One image class everywhere: every metric of it is null."""
    validation = {"n": 3, "n_positive": 0, "tn": 3, "fp": 0, "fn": 0, "tp": 0, "auroc": None, "log_loss": None}
    site = {"train": {"num_examples": 5, "train_loss": None}, "validation": validation}
    run = RunMaker(path).rounds(1, sets=[], validation=validation, test=validation, sites={"north": site})
    metrics = {
        name: {"value": None, "low": None, "high": None, "resamples": 0} for name in ("auroc", "sensitivity", "specificity")
    }
    return run.end("succeeded", test=metrics, threshold={**THRESHOLD, "reason_of_fallback": "validation has no pneumonia"})


STATES = {
    "begun": begun,
    "failed at once": failed_at_once,
    "stopped": stopped,
    "killed": killed,
    "no central sets": without_central_sets,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished simulation with both sets and baselines."""
    path = tmp_path_factory.mktemp("finished")
    RunMaker(path).rounds(2).end("succeeded", ("test", "external")).simulated().add_baselines()
    return path


@pytest.fixture(scope="module")
def page(finished: Path) -> Page:
    return read(finished)


@pytest.mark.parametrize("state", STATES)
def test_every_state_gives_a_valid_page_that_loads_nothing(state: str, tmp_path: Path) -> None:
    STATES[state](tmp_path)
    check(read(tmp_path))


@pytest.mark.usefixtures("drawn")
def test_a_finished_run_gives_a_valid_page_that_loads_nothing(finished: Path) -> None:
    page = read(finished)
    check(page)
    assert min(len(load) for load in page.loads) > 10_000, "pictures with something on them"
    assert page.badge == "Succeeded"


def test_undefined_metrics_are_told_as_such(tmp_path: Path) -> None:
    without_any_metric(tmp_path)
    page = read(tmp_path)
    check(page)
    assert "the AUROC is undefined" in page.text
    assert "could not be chosen as asked, since validation has no pneumonia" in page.text


def test_an_empty_folder_is_told_as_a_run_without_an_end(tmp_path: Path) -> None:
    page = read(tmp_path)
    check(page)
    assert page.badge == "Not finished, before the end of the first round"


def test_each_result_stands_with_its_interval_and_its_set(page: Page, finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    for name in ("test", "external"):
        found = summary[name]["auroc"]
        interval = f"{found['value']:.3f} (95% CI {found['low']:.3f}–{found['high']:.3f})"
        images = summary["data"][name]["used"]
        assert re.search(
            rf"on the {name} set \({images} images of \d+ patients\) the AUROC is {re.escape(interval)}", page.text, re.I
        )


def test_the_data_are_counted_of_the_hospitals_together_and_of_each_set(page: Page) -> None:
    data = page.text[page.text.index("The data") :]
    names = re.findall(r"(?i)hospitals together(?: set)?|test set|external set", data)
    assert [name.lower() for name in names[:3]] == ["hospitals together", "test set", "external set"]


def test_a_failed_run_names_round_sites_and_what_to_do(tmp_path: Path) -> None:
    failed_at_once(tmp_path)
    page = read(tmp_path)
    assert page.badge == "Failed, in round 1"
    assert "north: MemoryError: the site ran out of memory; a smaller batch size may help node 17: Timeout: no reply" in page.text
    assert "site.log" in page.text
    assert "no round was completed" in page.text


def test_baselines_that_fail_do_not_hide_the_results_of_the_federation(tmp_path: Path) -> None:
    RunMaker(tmp_path, task="three_class").rounds(1, sets=["external"]).end("failed", ["external"], error="no disk space")
    page = read(tmp_path)
    check(page)
    assert all(text in page.text for text in ("Each class of the external set against the rest", "No test set was judged"))
    assert "Over normal, bacterial and viral, the mean AUROC of each against the rest in the external set is" in page.text
    assert page.badge == "Failed, after the last round"
    assert "Metrics with 95% CI of 1,000 bootstrap resamples" in page.text


def test_names_and_reasons_from_sites_are_escaped(tmp_path: Path) -> None:
    name, reason = '<script src="http://x">$a_$&', "</td><b onload='x'>"
    run = RunMaker(tmp_path, [name]).rounds(1, sets=[], failures={name: reason}, absent={name: reason})
    run.end("stopped", sites={name: {"used": 3, "classes": {"<i>$": 3}, "train": reason}}, error=f"{name}: {reason}")
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<b onload" not in html
    assert "&lt;script src=&#34;http://x&#34;&gt;$a_$&amp;" in html
    check(Page(html))


def test_a_site_may_tell_nonsense_about_its_data(tmp_path: Path) -> None:
    nonsense: Mapping[str, Any] = {"north": {"used": "many", "classes": {"normal": [1]}, "skipped": 7}, "south": ["x"]}
    RunMaker(tmp_path).rounds(1, sets=[]).end("succeeded", sites=nonsense)
    check(read(tmp_path))


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = RunMaker(tmp_path).rounds(1, sets=["test"]).end("succeeded", ["test"])
    run.folder.predictions("test").write_text("image,patient\n")
    (tmp_path / "config.yaml").write_text("rounds: [1")
    (tmp_path / "environment.json").write_text("{")
    page = read(tmp_path)
    check(page)
    assert all(name in page.text for name in ("test.csv", "config.yaml cannot be read", "Sensitivity, test set"))


def test_drawn_images_are_told_first(tmp_path: Path) -> None:
    RunMaker(tmp_path).end("succeeded", phantom=True)
    assert read(tmp_path).text.index("These are drawn images") < 250


def test_a_hundred_hospitals_fit(tmp_path: Path) -> None:
    RunMaker(tmp_path, [f"site-{k:03d}" for k in range(100)]).rounds(1).end("stopped").simulated()
    page = read(tmp_path)
    check(page)
    assert all(text in page.text for text in ("All 100 hospitals", "site-099", "Over 100 hospitals"))


def test_the_pictures_lie_beside_the_report_as_png(page: Page, finished: Path) -> None:
    files = sorted((finished / "figures").glob("*.png"))
    assert {"roc", "reliability", "confusion_external", "baselines_test", "curves"} <= {path.stem for path in files}
    assert len(files) == len(page.loads)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


def test_a_report_written_again_changes_in_its_date_alone(tmp_path: Path) -> None:
    killed(tmp_path)
    before, after = (write_report(tmp_path).read_text(encoding="utf-8") for _ in range(2))
    dates = re.compile(r"\d\d \w+ \d{4}, \d\d:\d\d UTC")
    assert dates.sub("", before) == dates.sub("", after)


@pytest.mark.parametrize(
    ("policy", "high", "said"), [("sensitivity", 0.60, True), ("sensitivity", 0.95, False), ("youden", 0.60, False)]
)
def test_a_threshold_that_clearly_misses_its_target_on_a_set_is_said_with_the_way_out(
    tmp_path: Path, policy: str, high: float, said: bool
) -> None:
    """The target is 0.9. A rule without a target misses none, and chance is not told as a fact."""
    maker = RunMaker(tmp_path).rounds(2).end("succeeded", ["test", "external"], threshold={**THRESHOLD, "policy": policy})
    summary = maker.folder.read_summary()
    raised = {"value": 0.95, "low": 0.9, "high": 0.99, "resamples": 60}
    test = {**summary.results["test"], "sensitivity": raised}
    external = {**summary.results["external"], "sensitivity": {**raised, "value": 0.5, "low": 0.4, "high": high}}
    maker.folder.write_summary(summary.updated(test=test, external=external))
    sentence = "It was chosen for a sensitivity of 0.90, which is clearly not reached in the external set:"
    assert (sentence in read(tmp_path).text) is said


def test_sets_of_other_hospitals_are_told_from_those_of_the_hospitals_own_patients(tmp_path: Path) -> None:
    maker = RunMaker(tmp_path).rounds(2).end("succeeded", ["test", "external"])
    summary = maker.folder.read_summary()
    results, counts = summary.results["test"], summary.data["test"]
    held = {
        "held_out": {"adults": results, "elsewhere": results},
        "data": {**summary.data, "adults": counts, "elsewhere": counts},
    }
    maker.folder.write_summary(summary.updated(**held))
    settings = {
        "run_dir": ".",
        "test_manifest": "t",
        "external_manifest": "x",
        "held_out": {"adults": "a", "elsewhere": "e"},
        "reference_sets": ["test", "adults"],
    }
    (tmp_path / "coordinator.yaml").write_text(json.dumps(settings))
    text = read(tmp_path).text
    assert "Of another origin than the training images: the external set and the elsewhere set." in text
    assert "GoodrepliesValidationTestExternalAdultsElsewhereThreshold" in text.replace(" ", "")
    assert (
        "The share of pneumonia is 91% of 132 in the external set, 62% of 160 in the elsewhere set, 62% of 160 in the test set:"
        in text
    )


def test_where_only_the_hospitals_own_patients_were_judged_it_is_said(tmp_path: Path) -> None:
    maker = RunMaker(tmp_path).rounds(2, ["test"]).end("succeeded", ["test"])
    text = read(maker.path).text
    assert "No set that is known to be of other hospitals was judged" in text
    assert "GoodrepliesValidationTestThreshold" in text.replace(" ", ""), "a column for each judged set and no other"


def test_coordinator_settings_that_cannot_be_read_leave_a_report(tmp_path: Path) -> None:
    RunMaker(tmp_path).rounds(2).end("succeeded", ["test"])
    (tmp_path / "coordinator.yaml").write_text("run_dir: [")
    check(read(tmp_path))
