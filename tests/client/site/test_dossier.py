"""The dossier of a run: every fact of the log is in it, what the log lacks is said as unknown, and nothing of a patient or a key is."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from typer.testing import CliRunner

from pneumofed.cli.main import app
from pneumofed.client.app import app as client_app
from pneumofed.client.privacy.ledger import open_ledger
from pneumofed.client.privacy.ledger_report import accounts
from pneumofed.client.site.dossier import build_dossier
from pneumofed.client.site.dossier_page import problems_of, render_dossier, what_left, withheld_kinds
from pneumofed.client.site.folder import SiteFolder
from pneumofed.common.audit.log import AuditLog, read_entries
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.data.manifest import ImageRecord, Manifest, read_manifest, write_manifest
from pneumofed.common.errors import BundleError, ConfigError
from pneumofed.common.model_bundle.bundle import load_bundle
from pneumofed.common.model_bundle.manifest import CARD, CardFacts, Provenance
from pneumofed.common.model_bundle.sealing import seal_bundle
from pneumofed.common.models.build import build_model
from pneumofed.common.wire.instructions import Instruction, pack_instruction
from pneumofed.common.wire.keys import NodeKey, format_public_key
from pneumofed.common.wire.messages import SITE_CONFIG_KEY, ModelArrays
from pneumofed.common.wire.parameter_layout import ArraysLayout
from pneumofed.server.export.card import write_card
from tests.client.complete_site import make_site
from tests.former.opened import unpack
from tests.model_bundles import make_bundle, signing_key
from tests.tiny import there, tiny_experiment

CANARY, CANARY_FILE = "DOE^JANE-7734", "ZQX8KJ-19510317"
OPEN, PRIVATE, REFUSED, OTHER = "0" * 15 + "a", "0" * 15 + "b", "0" * 15 + "c", "1" * 16
GROUP: dict[str, Any] = {"model": {"norm": "group"}, "loss": {"logit_adjustment": False}}
DP: dict[str, Any] = {"mechanism": "dp_sgd", "noise_multiplier": 3.0, "expected_batch_size": 4096, "unit": "patient"}
POLICY: dict[str, Any] = {
    "min_patients": 2,
    "min_patients_private": 2,
    "min_validation_patients": 1,
    "withhold": ["data_report"],
    "strategies": ["fedavg"],
}
CLAIM = re.compile(
    r"\b(anonym\w*|complian\w*|safe|safely|safety|unsafe|no risk|low risk|risk-free|harmless|lawful (?!basis)\w*|guarantee\w*|"
    r"fully|secure(?! (?:aggregation|sums?))|de-identified|certified)\b",
    re.IGNORECASE,
)
"""Words of a verdict that no software can give; `secure aggregation` and `secure sum` are names of a protocol."""


def ask(folder: SiteFolder, kind: str, experiment: ExperimentConfig, run: str, number: int) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    model = build_model(experiment.model, experiment.task, seed=3)
    asked = Instruction(experiment, run, number, ModelArrays(*ArraysLayout.of(model).flatten(model)), audit_head="d" * 64)
    context = Context(1, 5, {SITE_CONFIG_KEY: str(folder.site_file)}, RecordDict(), {})
    return client_app(Message(pack_instruction(asked), dst_node_id=5, message_type=kind), context)


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site with canaries for names, which answered a run of two rounds once, a private run wholly, and refused a third."""
    folder = make_site(tmp_path_factory.mktemp("sites") / "north", patients=20)
    folder.policy_file.write_text(yaml.safe_dump(POLICY))
    (folder.data / CANARY_FILE).mkdir()
    records = []
    for record in read_manifest(folder.manifest).records:
        path = folder.data / CANARY_FILE / f"{CANARY_FILE}-{record.path.name}"
        shutil.move(record.path, path)
        records.append(ImageRecord(path, f"{CANARY}-{record.patient}", record.label))
    write_manifest(Manifest(tuple(records)), folder.manifest)
    plain, private = tiny_experiment(name="open-study"), tiny_experiment(name="private-study", rounds=1, **GROUP, privacy=DP)
    for kind, number in (("query", 0), ("train", 1), ("evaluate", 1)):
        assert not ask(folder, kind, plain, OPEN, number).has_error()
    assert not ask(folder, "train", private, PRIVATE, 1).has_error()
    assert ask(folder, "query", tiny_experiment(strategy={"name": "fedprox"}), REFUSED, 0).has_error()
    return folder.path


@pytest.fixture
def site(lived: Path, tmp_path: Path) -> SiteFolder:
    """A copy of that site."""
    return SiteFolder.open(shutil.copytree(lived, tmp_path / "north"))


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coordinator and a site as an earlier version left them."""
    return unpack(tmp_path_factory.mktemp("before"), "federation")


def page_of(folder: SiteFolder, run: str) -> str:
    return render_dossier(build_dossier(folder, run))


def words_of(page: str) -> str:
    """The page as people read it, on one line."""
    text = re.sub(r"<style>.*?</style>", " ", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", text)).split())


def dossier(folder: SiteFolder, *arguments: str | Path, code: int = 0) -> str:
    """What the command printed; it fails on another exit code."""
    result = CliRunner().invoke(app, ["site", "dossier", *map(str, arguments), "-C", str(folder.path)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def break_line(folder: SiteFolder, number: int) -> None:
    lines = folder.audit.path.read_bytes().splitlines(keepends=True)
    lines[number - 1] = lines[number - 1].replace(b'"round":', b'"round":7', 1)
    folder.audit.path.write_bytes(b"".join(lines))


# --- what left, refused, spent --------------------------------------------------------------------------------------------------


def test_every_answer_of_the_log_is_on_the_page_with_its_numbers_and_hashes(site: SiteFolder) -> None:
    page, text = page_of(site, OPEN), words_of(page_of(site, OPEN))
    answers = [entry for entry in read_entries(site.audit.path) if entry.event == "answer" and entry.facts["run"] == OPEN]
    assert len(answers) == 3
    for entry in answers:
        for value in (entry.hash, entry.facts["sent"], entry.facts["data"], *entry.facts["arrays"], *entry.facts["metrics"]):
            assert value in page
        assert f"{entry.facts['bytes']:,}" in text
        assert f"{entry.time[:10]} {entry.time[11:19]} UTC" in text
    assert f"verified: {len(read_entries(site.audit.path))} lines" in text
    assert there(site.audit.head()) in page


def test_what_left_is_summed_by_kind_under_its_rules(site: SiteFolder) -> None:
    found = build_dossier(site, "open-study")
    rows = {row.title.partition(",")[0]: row for row in what_left(found)}
    training, evaluation = found.sent[1], found.sent[2]
    assert list(rows) == ["Model updates", "Numbers of images", "Metrics of training", "Statistics of validation patients"]
    assert (rows["Model updates"].messages, rows["Model updates"].bytes) == (1, training.bytes)
    assert rows["Model updates"].rules["strategies"] == ["fedavg"]
    assert (rows["Numbers of images"].messages, rows["Numbers of images"].unknown) == (3, 0)
    assert f"train: {there(training.report)['train']}" in rows["Numbers of images"].detail
    assert f"train_loss {there(training.values)['train_loss']:.4g}" in rows["Metrics of training"].detail
    assert rows["Statistics of validation patients"].detail == f"of {there(evaluation.values)['num-examples']:g} images"
    assert withheld_kinds(found) == {"data_report": 3}
    assert found.policy.same == 3


def test_a_policy_that_was_edited_since_is_said(site: SiteFolder) -> None:
    site.policy_file.write_text(yaml.safe_dump({**POLICY, "min_patients": 3}))
    found = build_dossier(site, OPEN)
    assert (found.policy.same, found.policy.other, found.policy.unknown) == (0, 3, 0)
    assert "3 left under another one" in words_of(render_dossier(found))
    site.policy_file.write_text("min_patience: 3\n")
    assert "The policy cannot be read now" in words_of(page_of(site, OPEN))


def test_two_runs_of_one_study_are_told_apart_by_their_tokens(site: SiteFolder) -> None:
    AuditLog(site.audit.path, "north").record("request", run=OTHER, round=0, work="query", study="open-study")
    with pytest.raises(ConfigError, match=f"2 runs are called 'open-study' here; .*{OPEN} .open-study, .*{OTHER} .open-study, "):
        build_dossier(site, "open-study")
    assert (build_dossier(site, OTHER[:3]).run, build_dossier(site, OPEN).study) == (OTHER, "open-study")


def test_a_run_is_unfinished_until_every_planned_round_was_answered(site: SiteFolder) -> None:
    text = words_of(page_of(site, OPEN))
    assert "This run is unfinished, as far as this site knows: 1 of 2 planned rounds were trained here." in text
    assert build_dossier(site, PRIVATE).state == "every planned round answered"
    assert "unfinished" not in words_of(page_of(site, PRIVATE))


def test_a_refused_run_says_by_which_rule_and_that_nothing_left(site: SiteFolder) -> None:
    found = build_dossier(site, REFUSED)
    text = words_of(render_dossier(found))
    assert (found.state, found.sent, found.unanswered) == ("refused", (), 0)
    assert "nothing left this hospital but the name of the rule by which it refused" in text
    assert "strategies ways of averaging that a run may use" in text
    assert "the run uses fedprox; allowed are fedavg line" in text
    assert [read_entries(site.audit.path)[line - 1].event for line in found.refusals[0].lines] == ["refusal"]


def test_epsilon_and_delta_are_the_ledgers(site: SiteFolder) -> None:
    site.policy_file.write_text(yaml.safe_dump({**POLICY, "max_epsilon": 50.0}))
    (account,) = accounts(open_ledger(site.config).lineages(), site.policy)
    found, text = build_dossier(site, PRIVATE), words_of(page_of(site, PRIVATE))
    (ours,) = found.budget.accounts
    assert (ours.epsilon, ours.delta, ours.remaining) == (account.epsilon, account.delta, 50.0 - account.epsilon)
    assert ours.of_run == account.runs[0].epsilon
    assert f"{account.epsilon:.3g} {50.0 - account.epsilon:.3g} of 50 {account.delta:.3g}" in text
    assert [(one["round"], one["noise_multiplier"]) for one in found.budget.entries] == [(1, 3.0)]
    assert "1 training round" in text


def test_a_run_without_privacy_says_that_no_epsilon_describes_it(site: SiteFolder) -> None:
    text = words_of(page_of(site, OPEN))
    assert "The ledger has no entry of this run, whose 1 round was trained here without differential privacy." in text
    assert "none describes it" in text


def test_secure_sums_and_requests_without_an_end_are_listed(site: SiteFolder) -> None:
    log, asked = AuditLog(site.audit.path, "north"), {"run": OTHER, "round": 1}
    for stage in ("advertise", "share", "mask"):
        body = ["body", "tail"] if stage == "mask" else []
        step = {**asked, "work": "train" if stage == "mask" else "query", "secure_sum": f"train {stage}"}
        log.record("request", **step, study="masked", terms={"rounds": 1, "secure_aggregation": True, "mechanism": "none"})
        log.record("answer", **step, bytes=96 * len(body), arrays=body, metrics=[], values={}, report={}, sent="5" * 64)
    log.record("request", **asked, work="evaluate")
    log.record("failure", **asked, work="query", error="EmptySiteError")
    log.record("malformed", error="MessageError")
    found = build_dossier(site, "masked")
    rows = {row.title: (row.messages, row.bytes) for row in what_left(found)}
    assert rows["Vectors under masks (secure aggregation)"] == (1, 192)
    assert rows["Public keys, sealed shares and signatures of secure sums"] == (2, None)
    assert not any(title.startswith("Model updates") for title in rows)
    text = words_of(render_dossier(found))
    assert "EmptySiteError" in text and "1 message in the whole log could not be read at all" in text


def test_tables_of_a_survey_are_listed_by_their_fields(site: SiteFolder) -> None:
    log, asked = AuditLog(site.audit.path, "north"), {"run": OTHER, "round": 0, "work": "query"}
    log.record("request", **asked)
    log.record("answer", **asked, tables=["label", "sex"], bytes=0, arrays=[], metrics=[], values={}, report={}, sent="5" * 64)
    (row,) = [row for row in what_left(build_dossier(site, OTHER)) if row.title == "Tables of a survey"]
    assert (row.messages, row.detail) == (1, "by label, sex") and "survey" in row.rules


# --- records that are damaged, missing or old ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 4])
def test_a_damaged_log_is_said_first_and_what_is_sound_stands_below(site: SiteFolder, number: int) -> None:
    hashes = [entry.hash for entry in read_entries(site.audit.path) if entry.event == "answer" and entry.facts["run"] == OPEN]
    broken = read_entries(site.audit.path)[number - 1].hash
    break_line(site, number)
    page = page_of(site, OPEN)
    text = words_of(page)
    assert text.index(f"Line {number} of work/audit.jsonl breaks the chain") < text.index("At a glance")
    assert f"1 of its {len(read_entries(site.audit.path)) + 1} lines cannot be read as they were written" in text
    assert [hash_ in page for hash_ in hashes] == [hash_ != broken for hash_ in hashes]
    assert "verified" not in text.partition("At a glance")[2].partition("Step 1")[0]
    assert "is damaged at line" in dossier(site, OPEN, code=1)


def test_a_line_that_cannot_be_read_is_not_taken_for_nothing(site: SiteFolder) -> None:
    break_line(site, 4)  # the answer of the only training round
    text = words_of(page_of(site, OPEN))
    assert "answers that left, at least 2" in text and "bytes of arrays that left, at least 0" in text
    assert not re.search("nothing spent|nothing was trained|nothing left this hospital", text)
    break_line(site, 8)  # of the private run
    assert "No line that can be read is an answer to this run. What left this hospital is unknown." in words_of(
        page_of(site, PRIVATE)
    )


def test_without_its_log_a_run_is_known_by_the_ledger_only(site: SiteFolder) -> None:
    site.audit.path.unlink()
    text = words_of(page_of(site, "private-study"))
    assert text.index("The audit log is missing.") < text.index("At a glance")
    with pytest.raises(
        ConfigError, match=rf"the runs that this site knows are: {PRIVATE} \(private-study, in the ledger only\)$"
    ):
        build_dossier(site, OPEN)


def test_a_closed_ledger_is_said_first_and_no_epsilon_stands_below(site: SiteFolder) -> None:
    (site.work / "ledger.sqlite").unlink()
    found = build_dossier(site, PRIVATE)
    text = words_of(render_dossier(found))
    assert text.index("The privacy ledger cannot be relied on.") < text.index("At a glance")
    assert found.budget.state == "closed"
    assert "Unknown: the ledger cannot be used" in text
    assert re.search(r"epsilon of this run by itself unknown the ledger is closed", text)
    assert str(site.path) not in render_dossier(found)


def test_what_an_earlier_version_did_not_log_is_unknown(before: Path) -> None:
    folder = SiteFolder.open(before / "north")
    found = build_dossier(folder, "private")
    text = words_of(render_dossier(found))
    assert (found.state, found.terms, found.policy.unknown, found.rounds_trained) == ("unknown", None, 5, (1, 2))
    assert "It is not known whether this run is finished" in text
    assert "What network and which protection the run asked for is unknown" in text
    assert "5 answers do not say what was withheld" in text
    assert {row.title: row.unknown for row in what_left(found)}["Report on the data"] == 5
    assert text.count("hash of the content: not logged") == 5
    assert build_dossier(folder, "2eae9d").state == "refused"


def test_an_unknown_run_is_answered_with_those_that_there_are(site: SiteFolder) -> None:
    with pytest.raises(ConfigError) as caught:
        build_dossier(site, "pneumonia-9")
    for token, study in ((OPEN, "open-study"), (PRIVATE, "private-study"), (REFUSED, "pneumonia")):
        assert f"{token} ({study}, " in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="3 runs are called '0000' here"):
        build_dossier(site, "0000")
    with pytest.raises(ConfigError, match=f"^no run is named; the runs that this site knows are: {OPEN} "):
        dossier(site)
    assert not (site.work / "dossier").exists()
    site.audit.path.unlink()
    assert build_dossier(site, "").run == PRIVATE  # the only one that is known by the ledger
    (site.work / "ledger.sqlite").unlink()
    with pytest.raises(ConfigError, match=r"the runs that this site knows are: none yet$"):
        build_dossier(site, OPEN)


# --- what must not be on it ---------------------------------------------------------------------------------------------------------


def every_page(site: SiteFolder, before: Path) -> list[str]:
    """Pages of all kinds of runs and records."""
    former = SiteFolder.open(before / "north")
    pages = [page_of(site, run) for run in (OPEN, PRIVATE, REFUSED)] + [
        page_of(former, run) for run in ("private", "2553", "2eae")
    ]
    break_line(site, 3)
    (site.work / "ledger.sqlite").unlink()
    site.policy_file.unlink()
    return [*pages, page_of(site, OPEN)]


def test_no_page_claims_what_no_software_can_know(site: SiteFolder, before: Path) -> None:
    for page in every_page(site, before):
        assert CLAIM.findall(words_of(page)) == []
    assert CLAIM.findall("The model is anonymous, GDPR-compliant and safe.") == ["anonymous", "compliant", "safe"]


def test_nothing_of_a_patient_no_key_and_no_path_is_on_it(site: SiteFolder, before: Path) -> None:
    log = AuditLog(site.audit.path, "north")
    log.record("refusal", run=OPEN, round=1, work="train", rule="policy", detail=f"/data/{CANARY}/1.dcm cannot be read")
    secrets = [path for path in site.path.rglob("*") if path.suffix == ".key" or path.name == "node"]
    assert secrets
    printed = dossier(site, OPEN, "--json")
    for text in [*every_page(site, before), printed]:
        assert CANARY not in unescape(text) and CANARY_FILE not in text and "JANE" not in text
        assert str(site.path) not in text and "/data/" not in text
        assert "PRIVATE KEY" not in text
        for path in secrets:
            content = path.read_bytes()
            assert content.hex() not in text and content.decode("latin-1").strip() not in text
    assert "not shown, since it may name a file" in printed


def test_the_page_needs_no_other_file_no_script_and_is_made_for_a4(site: SiteFolder) -> None:
    page = page_of(site, OPEN)
    assert not re.search(r"<script|<link|<img|<iframe|javascript:|url\(|@import|https?://|\son\w+=", page)
    assert "size: A4" in page and "@media print" in page


def test_text_of_others_is_shown_as_text_and_names_no_file(site: SiteFolder) -> None:
    hostile = "<script>alert(1)</script>\x1b[2J../../x"
    AuditLog(site.audit.path, "north").record("refusal", work="query", run=hostile, rule="<b>approved_apps", app="4" * 64)
    name = [entry.facts["run"] for entry in read_entries(site.audit.path)][-1]
    assert name == hostile
    shown = dossier(site, "(not shown")
    assert (site.work / "dossier").is_dir() and len(list((site.work / "dossier").iterdir())) == 1
    page = next((site.work / "dossier").iterdir()).read_text()
    assert "<script" not in page and "<b>approved" not in page and "\x1b" not in page
    assert shown.startswith("dossier: ")


def test_every_key_of_the_policy_is_on_the_page_with_what_it_says(site: SiteFolder) -> None:
    table = page_of(site, OPEN).partition('id="annex-b"')[2].partition("</section>")[0]
    rows = dict(re.findall(r"<code>(\w+)</code></th><td>[^<]*</td><td class=\"long\">([^<]*)</td>", table))
    assert set(rows) == set(SitePolicy.model_fields)
    assert all(rows.values())


def test_the_page_asks_what_only_people_can_answer(site: SiteFolder) -> None:
    page = page_of(site, OPEN)
    headings = re.findall(r"<h2[^>]*>([^<]+)", page)
    steps = [heading for heading in headings if heading.startswith("Step")]
    assert [heading.partition(":")[0] for heading in steps] == [f"Step {number}" for number in range(1, 8)]
    assert page.count('class="blank"') >= 12 and page.count('<td class="fill"></td>') >= 60
    assert "Lawful basis" in page and "DPO advice provided" in page


# --- what is handed over ------------------------------------------------------------------------------------------------------------


def release(folder: Path, run: str | None) -> Path:
    """A signed bundle of the model of `run`, with the card that the exporter writes."""
    made = load_bundle(make_bundle(folder), None).manifest
    digest = "e" * 64
    origin = Provenance(pneumofed="1", run=run, round=2, checkpoint=digest, config=digest) if run else None
    card = CardFacts(sites=3, training_images=64, training_patients=64, phantom=True, provenance=origin)
    manifest = made.model_copy(update={"card": card, "files": {}})
    (folder / CARD).write_text(write_card(manifest))
    seal_bundle(folder, manifest, signing_key())
    return folder


def test_the_card_of_the_released_model_says_what_it_is_for(site: SiteFolder, tmp_path: Path) -> None:
    key = tmp_path / "node.pub"
    key.write_bytes(format_public_key(signing_key().public_key(), "coordinator"))
    dossier(site, OPEN, "--bundle", release(tmp_path / "bundle", OPEN), "--trusted", key)
    page = (site.work / "dossier" / f"{OPEN}.html").read_text()
    text = words_of(page)
    assert "It is a result of research and no medical device." in text
    assert "It is not to be used on lateral views" in text
    assert "3 hospitals" in text and "one of the keys that were given as trusted" in text
    assert load_bundle(tmp_path / "bundle", None).digest in page
    assert str(tmp_path) not in page.replace(str(site.path), "")
    assert CLAIM.findall(text) == []


def test_a_model_of_another_run_or_signer_is_refused_and_an_unnamed_one_is_said(site: SiteFolder, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger.pub"
    stranger.write_bytes(NodeKey.generate("stranger").public)
    with pytest.raises(ConfigError, match=f"the model of run {OTHER}, and the dossier is about run {OPEN}"):
        dossier(site, OPEN, "--bundle", release(tmp_path / "other", OTHER))
    with pytest.raises(BundleError):
        dossier(site, OPEN, "--bundle", release(tmp_path / "ours", OPEN), "--trusted", stranger)
    assert not (site.work / "dossier").exists()
    dossier(site, OPEN, "--bundle", release(tmp_path / "unnamed", None))
    text = words_of((site.work / "dossier" / f"{OPEN}.html").read_text())
    assert "The bundle does not say which run it is from." in text
    assert "no trusted key was given" in text


def test_without_a_model_or_attacks_it_says_so_and_how_to_get_them(site: SiteFolder) -> None:
    text = words_of(page_of(site, OPEN))
    assert "No model was handed over with this dossier" in text and "pneumofed export RUN" in text
    assert "No result of an attack was handed over with this dossier." in text and "pneumofed privacy attack --config" in text
    assert "Which other hospitals took part is not known here" in text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": 3}', "no json"])
def test_what_is_no_result_of_the_attack_bench_is_refused(site: SiteFolder, tmp_path: Path, content: str) -> None:
    (tmp_path / "attack.json").write_text(content)
    with pytest.raises(ConfigError, match="is no result of the attack bench"):
        dossier(site, OPEN, "--attack", tmp_path)


def test_the_coordinators_log_says_who_took_part_and_which_lines_are_gone(before: Path, tmp_path: Path) -> None:
    folder = SiteFolder.open(shutil.copytree(before / "north", tmp_path / "north"))
    log = before / "coordinator" / "state" / "audit.jsonl"
    dossier(folder, "private", "--anchored-by", log)
    text = words_of((folder.work / "dossier" / "81ce5be7aa00f0a7.html").read_text())
    assert "By the coordinator's log: north, south." in text
    assert "ended, by the coordinator's log: succeeded after 2 rounds" in text
    assert "all 4 heads that the coordinator's log knows are in it" in text
    folder.audit.path.write_bytes(b"".join(folder.audit.path.read_bytes().splitlines(keepends=True)[:16]))
    assert "knows 1 states of the audit log that are no longer in it" in dossier(folder, "private", "--anchored-by", log, code=1)
    text = words_of((folder.work / "dossier" / "81ce5be7aa00f0a7.html").read_text())
    assert text.index("Lines of this site's audit log are missing or were written anew.") < text.index("At a glance")
    with pytest.raises(ConfigError, match="is not the audit log of a coordinator"):
        dossier(folder, "private", "--anchored-by", folder.audit.path)


# --- the command --------------------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_private_file_and_json_has_the_same_facts(site: SiteFolder) -> None:
    values = json.loads(dossier(site, "open-study", "--json"))
    path = site.work / "dossier" / f"{OPEN}.html"
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    page = path.read_text()
    assert values["study"] == "open-study" and values["state"] == "unfinished" and values["problems"] == []
    for one in values["sent"]:
        assert all(one[key] in page for key in ("hash", "sent", "data"))
    assert [row["title"] for row in values["left"]] == [row.title for row in what_left(build_dossier(site, OPEN))]
    assert values["log"]["head"] in page and values["handed"] == {"model": None, "attacks": None, "coordinator": None}


def test_writing_it_changes_no_record(site: SiteFolder) -> None:
    kept = {path: path.read_bytes() for path in (site.audit.path, site.policy_file, site.work / "ledger.mark")}
    dossier(site, PRIVATE)
    assert {path: path.read_bytes() for path in kept} == kept
    assert problems_of(build_dossier(site, PRIVATE)) == []
