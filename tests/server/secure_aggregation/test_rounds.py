"""Whole runs with secure aggregation over real client apps: the plain mean, drop-outs at each step, and a tampering coordinator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from pneumofed.client.app import app as client_app
from pneumofed.client.federation.evaluations import read_evaluations
from pneumofed.client.federation.site_data import load_site, read_site_config
from pneumofed.client.secure_aggregation.participant import MaskPlan
from pneumofed.common.audit.log import read_entries
from pneumofed.common.audit.verify import verify_log
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.data.manifest import Manifest, read_manifest, write_manifest
from pneumofed.common.errors import ConfigError, RoundError
from pneumofed.common.model_bundle.pooled_scores import HospitalReference
from pneumofed.common.secure_aggregation.masking import SumVector
from pneumofed.common.secure_aggregation.protocol import Purpose, Stage, Step, read_step
from pneumofed.server.report.report import write_report
from pneumofed.server.runs.checkpoints import read_checkpoint
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.records import RoundRecord
from tests.tiny import TinyFederation, there, tiny_experiment

SECURE = {"enabled": True, "stage_timeout_sec": 5.0}


def experiment(**changes: Any) -> ExperimentConfig:
    return tiny_experiment(**{"rounds": 1, "secure_aggregation": SECURE, **changes})


def federation(tmp_path: Path, sites: int = 4, patients: int = 8) -> TinyFederation:
    made = TinyFederation(tmp_path, sites, patients)
    made.give_identities()
    return made


def history(federation: TinyFederation, name: str) -> list[RoundRecord]:
    return RunFolder(federation.folder / name).read_history()


def parameters(federation: TinyFederation, name: str) -> np.ndarray:
    return read_checkpoint(federation.folder / name / "checkpoints" / "last.pt").arrays.parameters


class Interfering(ClientApp):
    """The real ClientApp behind a coordinator, or a network, that does something to the steps of training's secure sum."""

    def __init__(self, change: Callable[[int, Step, Message], Message | None], purpose: str = "train") -> None:
        super().__init__()
        self.change, self.purpose = change, purpose

    def __call__(self, message: Message, context: Context) -> Message:
        text = message.content.config_records["config"].get("step")
        step = read_step(str(text)) if text else None
        if step is not None and step.purpose == self.purpose:
            changed = self.change(int(context.node_config["partition-id"]), step, message)
            if changed is None:
                return Message(Error(code=3), reply_to=message)
            message = changed
        return client_app(message, context)


def losing(*lost: tuple[int, Stage], purpose: str = "train") -> Interfering:
    """Each of `lost` is gone from that step on."""
    order = ["advertise", "share", "mask", "confirm", "unmask"]
    gone = dict(lost)

    def change(node: int, step: Step, message: Message) -> Message | None:
        return None if node in gone and order.index(step.stage) >= order.index(gone[node]) else message

    return Interfering(change, purpose)


def with_new_step(message: Message, step: Step, **changes: Any) -> Message:
    message.content.config_records["config"]["step"] = step.model_copy(update=changes).model_dump_json()
    return message


@pytest.mark.parametrize("strategy", ["fedavg", "fedbn", "fedadam"])
def test_the_model_is_that_of_the_plain_run_to_the_stated_error(tmp_path: Path, strategy: str) -> None:
    made = federation(tmp_path, sites=3)
    chosen = {"strategy": {"name": strategy}}
    made.run("secret", experiment(**chosen))
    made.run("plain", experiment(secure_aggregation={}, **chosen))
    line, plain = history(made, "secret")[0], history(made, "plain")[0]
    bound = there(there(line.secure_sum).error_bound) + 1e-7  # of float32 besides
    if strategy != "fedadam":  # whose first step has the size of its rate wherever the mean is not far from zero
        assert np.abs(parameters(made, "secret") - parameters(made, "plain")).max() <= bound
    assert there(line.secure_sum).images == sum(there(there(site.train).num_examples) for site in plain.sites.values())
    assert there(line.secure_sum).clipped == 0
    assert there(line.validation).n == there(plain.validation).n
    assert there(line.validation).auroc == pytest.approx(there(plain.validation).auroc, abs=0.02)


def test_the_moving_average_is_judged_by_secure_sums_too(tmp_path: Path) -> None:
    made = federation(tmp_path, sites=3)
    chosen = {"rounds": 2, "strategy": {"ema_decay": 0.5}}
    made.run("secret", experiment(**chosen))
    made.run("plain", experiment(secure_aggregation={}, **chosen))
    lines, plain = history(made, "secret"), history(made, "plain")
    assert [line.failures for line in lines] == [{}, {}]
    assert [there(line.validation).n for line in lines] == [there(line.validation).n for line in plain]
    assert there(lines[-1].validation).auroc == pytest.approx(there(plain[-1].validation).auroc, abs=0.02)


def test_a_round_without_validation_sums_the_updates_and_nothing_else(tmp_path: Path) -> None:
    made = federation(tmp_path, sites=3)
    seldom = {"every_rounds": 9, "validate_every_rounds": 2}
    made.run("always", experiment(rounds=3, evaluation={"every_rounds": 9}))
    made.run("seldom", experiment(rounds=3, evaluation=seldom))
    lines, always = history(made, "seldom"), history(made, "always")
    assert [line.secure_validation is not None for line in lines] == [False, True, True]
    assert all(line.secure_sum is not None for line in lines)
    assert [line.validation for line in lines[1:]] == [line.validation for line in always[1:]]
    assert lines[0].bytes.up == always[0].bytes.up and lines[0].validation is None


TOGETHER = {"with_training": True, "every_rounds": 2}


def counting(asked: list[tuple[str, str]]) -> Callable[[int, Step, Message], Message]:
    def count(node: int, step: Step, message: Message) -> Message:
        if node == 0:
            asked.append((step.purpose, step.stage))
        return message

    return count


def test_one_sum_of_a_round_holds_the_updates_and_what_the_sites_say_of_the_model_before(tmp_path: Path) -> None:
    made, asked = federation(tmp_path, sites=3), list[tuple[str, str]]()
    made.run("apart", experiment(rounds=4, evaluation={"every_rounds": 2}))
    grid = made.grid(Interfering(counting(asked), "evaluate"))
    made.run("together", experiment(rounds=4, evaluation=TOGETHER), grid=grid)
    apart, together = history(made, "apart"), history(made, "together")
    assert [(line.validation, line.threshold, line.test) for line in apart] == [
        (line.validation, line.threshold, line.test) for line in together
    ]
    assert all(there(line.secure_validation).summed == ("site-0", "site-1", "site-2") for line in together)
    assert len(asked) == 5  # of the last model only
    np.testing.assert_array_equal(parameters(made, "apart"), parameters(made, "together"))
    line = together[0].to_json()["sites"]
    assert line == {f"site-{number}": {"train": {"summed": True}} for number in range(3)}


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param({"withhold": ["validation_statistics"]}, id="withheld"),
        pytest.param({"min_validation_patients": 50}, id="few", marks=pytest.mark.slow),
        pytest.param({"max_evaluations_per_data": 0}, id="spent", marks=pytest.mark.slow),
    ],
)
def test_where_one_site_may_not_judge_no_vector_holds_statistics_and_the_others_are_asked_by_themselves(
    tmp_path: Path, policy: dict[str, Any]
) -> None:
    made, asked = federation(tmp_path), list[tuple[str, str]]()
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump({"min_patients": 1, "min_validation_patients": 1, **policy}))
    site = made.sites / "3.yaml"
    site.write_text(yaml.safe_dump({**yaml.safe_load(site.read_text()), "policy": str(tmp_path / "policy.yaml")}))
    changes = {"rounds": 2, "training": {"validation_fraction": 0.25}}
    made.run("apart", experiment(**changes))
    grid = made.grid(Interfering(counting(asked), "evaluate"))
    made.run("together", experiment(**changes, evaluation={"with_training": True}), grid=grid)
    apart, together = history(made, "apart"), history(made, "together")
    for before, after in zip(apart, together, strict=True):
        assert before.validation == after.validation and there(after.validation).n
        assert there(after.secure_sum).summed == ("site-0", "site-1", "site-2", "site-3")
        assert there(after.secure_validation).summed == ("site-0", "site-1", "site-2")
    assert len(asked) == 10
    np.testing.assert_array_equal(parameters(made, "apart"), parameters(made, "together"))


def test_a_site_that_drops_out_under_its_masks_takes_nothing_of_the_others_statistics_along(tmp_path: Path) -> None:
    made = federation(tmp_path)
    made.run("run", experiment(rounds=2, evaluation={"with_training": True}), grid=made.grid(_Dropping(3, 2)))
    first, second = history(made, "run")
    assert there(first.secure_validation).summed == there(second.secure_sum).summed == ("site-0", "site-1", "site-2")
    sizes = [there(history(made, "run")[at].validation).n for at in (0, 1)]
    assert 0 < there(sizes[0]) < there(sizes[1])  # the last model is judged by all


class _Dropping(ClientApp):
    """One node is gone when its vector of a round is asked for."""

    def __init__(self, node: int, round_number: int) -> None:
        super().__init__()
        self.node, self.round = node, round_number

    def __call__(self, message: Message, context: Context) -> Message:
        here = context.node_config["partition-id"] == self.node
        if here and message.metadata.message_type == "train" and message.content.config_records["config"]["round"] == self.round:
            return Message(Error(code=3), reply_to=message)
        return client_app(message, context)


def test_what_a_site_says_that_it_adds_is_signed(tmp_path: Path) -> None:
    """Else a coordinator could have one site add its statistics to a sum in which no other has any."""
    made = federation(tmp_path)

    def turn(node: int, step: Step, message: Message) -> Message:
        if step.stage != "share":
            return message
        return with_new_step(message, step, keys=[keys.model_copy(update={"judges": True}) for keys in step.keys])

    with pytest.raises(RoundError, match="breaks the protocol"):
        made.run("run", experiment(), grid=made.grid(Interfering(turn)))


def with_policies(made: TinyFederation) -> dict[int, Path]:
    """Gives each site a policy that lets all leave, and returns where it lies."""
    files = {int(path.stem): path.with_suffix(".policy") for path in made.sites.glob("*.yaml")}
    for number, file in files.items():
        site = made.sites / f"{number}.yaml"
        site.write_text(yaml.safe_dump({**yaml.safe_load(site.read_text()), "policy": str(file)}))
        file.write_text(yaml.safe_dump({"min_patients": 1, "min_validation_patients": 1}))
    return files


@pytest.mark.parametrize(
    ("purpose", "rule", "value"),
    [
        ("evaluate", "min_validation_patients", 50),
        pytest.param("evaluate", "max_evaluations_per_data", 0, marks=pytest.mark.slow),
        ("evaluate", "quiet_hours", ["00:00-12:00", "12:00-00:00"]),
        pytest.param("score", "min_validation_patients", 50, marks=pytest.mark.slow),
        ("score", "max_evaluations_per_data", 3),  # scores count as three answers, and the round's as one
    ],
)
def test_sites_that_may_not_judge_say_so_before_they_count_among_those_who_must_stay(
    tmp_path: Path, purpose: Purpose, rule: str, value: object
) -> None:
    """Of six sites five must stay, so that two that refuse later would leave the other four's answers counted for nothing."""
    made, steps = federation(tmp_path, sites=6, patients=12), list[tuple[int, Stage]]()
    files, reference = with_policies(made), purpose == "score"

    def tighten(node: int, step: Step, message: Message) -> Message:
        if step.stage == "advertise" and node >= 4:
            files[node].write_text(yaml.safe_dump({"min_patients": 1, "min_validation_patients": 1, rule: value}))
        steps.append((node, step.stage))
        return message

    cfg = experiment(evaluation={"hospital_reference": reference})
    made.run("run", cfg, grid=made.grid(Interfering(tighten, purpose)))
    assert [stage for node, stage in steps if node >= 4] == ["advertise", "advertise"]
    kept, line = RunFolder(tmp_path / "run").read_hospital_reference(), history(made, "run")[0]
    if reference:
        assert list(there(kept).sites) == ["4 hospitals together"] and not line.failures
    else:
        assert there(line.secure_validation).summed == tuple(f"site-{number}" for number in range(4))
        assert there(line.validation).n and set(line.failures) == {"site-4", "site-5"}
        assert all(rule in sentence for sentence in line.failures.values())
    answers = [[version.answers for version in read_evaluations(made.sites / f"site-{number}").versions] for number in range(6)]
    assert answers == 4 * [[4 if reference else 1]] + 2 * [[1] if reference else []]


def test_a_site_without_validation_patients_takes_no_part_in_a_sum_of_statistics(tmp_path: Path) -> None:
    made = federation(tmp_path, sites=4)
    path = made.sites / "site-3" / "manifest.csv"
    learning = set(load_site(read_site_config(made.sites / "3.yaml"), experiment()).train.patients)
    write_manifest(Manifest(tuple(record for record in read_manifest(path).records if record.patient in learning)), path)
    made.run("run", experiment())
    line = history(made, "run")[0]
    assert there(line.secure_sum).summed == ("site-0", "site-1", "site-2", "site-3")
    told = there(line.secure_validation)
    assert told.summed == ("site-0", "site-1", "site-2") and told.dropped == {"site-3": "advertise"}


def test_scores_in_the_suitability_tests_come_as_one_sum_of_all_patients(tmp_path: Path) -> None:
    made = federation(tmp_path, sites=3)
    chosen = {"evaluation": {"hospital_reference": True}}
    made.run("secret", experiment(**chosen))
    made.run("plain", experiment(secure_aggregation={}, **chosen))
    kept, plain = (there(RunFolder(tmp_path / name).read_hospital_reference()) for name in ("secret", "plain"))
    assert list(kept.sites) == ["3 hospitals together"]
    assert kept.patients() == {"3 hospitals together": sum(plain.patients().values())}
    assert there(kept.pooled()).limits.shape == (3,)


def test_a_resumed_run_keeps_its_sum_of_scores_and_asks_for_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of four sites and of three of them would tell what the fourth counted."""
    made, asked = federation(tmp_path, sites=4), []
    folder, write = RunFolder(tmp_path / "run"), RunFolder.write_hospital_reference

    def write_and_die(self: RunFolder, reference: HospitalReference) -> None:
        write(self, reference)
        raise KeyboardInterrupt

    def count(node: int, step: Step, message: Message) -> Message:
        asked.append(node)
        return message

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(RunFolder, "write_hospital_reference", write_and_die)
        made.run("run", experiment(evaluation={"hospital_reference": True}))
    first = there(folder.read_hospital_reference())
    made.run("run", experiment(evaluation={"hospital_reference": True}), resume=True, grid=made.grid(Interfering(count, "score")))
    assert folder.has_succeeded and not asked and there(folder.read_hospital_reference()).sites == first.sites


def test_sites_that_are_asked_for_other_numbers_have_no_sum_in_common(tmp_path: Path) -> None:
    """One is asked for its statistics in a sum of scores, whose vector is shorter or longer: what is behind its end would be of fewer."""
    made = federation(tmp_path, sites=3)

    def ask_for_statistics(node: int, step: Step, message: Message) -> Message:
        if node == 0 and step.stage == "mask":
            del message.content.config_records["config"]["suitability"]
        return message

    folder = RunFolder(tmp_path / "run")
    made.run("run", experiment(evaluation={"hospital_reference": True}), grid=made.grid(Interfering(ask_for_statistics, "score")))
    assert folder.has_succeeded and folder.read_hospital_reference() is None


def test_the_coordinators_files_hold_no_number_of_a_single_site(tmp_path: Path) -> None:
    made = federation(tmp_path, sites=3)
    made.run("run", experiment())
    line = history(made, "run")[0]
    assert line.to_json()["sites"] == {f"site-{number}": {"train": {"summed": True}} for number in range(3)}
    assert RunFolder(tmp_path / "run").read_summary().to_json()["sites"] == {f"site-{number}": {} for number in range(3)}


def test_private_rounds_are_summed_and_what_the_noise_does_not_cover_stays_at_the_sites(tmp_path: Path) -> None:
    made = federation(tmp_path, sites=3)
    privacy = {"mechanism": "dp_sgd", "noise_multiplier": 1.0, "delta": 1e-3, "expected_batch_size": 4}
    made.run("run", experiment(model={"norm": "group"}, loss={"logit_adjustment": False}, privacy=privacy))
    told = there(history(made, "run")[0].secure_sum)
    assert told.summed == tuple(f"site-{number}" for number in range(3))
    assert {"train_loss", "train_accuracy"}.isdisjoint(told.to_json())
    for number in range(3):
        assert (made.sites / f"site-{number}" / "ledger.sqlite").exists()


def test_no_secret_stays_at_a_site_after_the_round(tmp_path: Path) -> None:
    made = federation(tmp_path, sites=3)
    made.run("run", experiment())
    for number in range(3):
        left = {path.name for path in (made.sites / f"site-{number}" / "secure_sum").iterdir()}
        assert left == {"used", "serial", "lock", ".used.sum", ".serial.sum"}


@pytest.mark.parametrize("work", ["train", "evaluate"])
def test_a_site_that_fails_under_its_masks_keeps_nothing_of_the_others_secrets(
    tmp_path: Path, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where training fails, or the policy lets no answer of those few patients leave."""
    begun, hide = list[MaskPlan](), MaskPlan.hide

    def fail_the_first(self: MaskPlan, vector: SumVector) -> None:
        begun.append(self)
        if len(begun) == (1 if work == "train" else 5):
            raise OSError("the disk is full")
        hide(self, vector)

    monkeypatch.setattr(MaskPlan, "hide", fail_the_first)
    made = federation(tmp_path)
    made.run("run", experiment())
    line = history(made, "run")[0]
    told = there(line.secure_sum if work == "train" else line.secure_validation)
    assert list(told.dropped.values()) == ["mask"]
    assert [path.parent for path in made.sites.glob("*/secure_sum/session.json")] == []


@pytest.mark.parametrize("stage", ["advertise", "share", "mask", "confirm", "unmask"])
def test_a_site_that_drops_out_at_any_step_is_survived(tmp_path: Path, stage: Stage) -> None:
    made = federation(tmp_path)
    made.run("run", experiment(), grid=made.grid(losing((1, stage))))
    told = there(history(made, "run")[0].secure_sum)
    stayed = ["confirm", "unmask"]  # its vector was sent by then
    assert told.dropped == {"site-1": stage}
    assert ("site-1" in told.summed) == (stage in stayed)
    without = federation(tmp_path / "others")
    if stage not in stayed:
        (without.sites / "1.yaml").unlink()
    without.run("run", experiment(secure_aggregation={}))
    bound = there(told.error_bound) + 1e-7
    assert np.abs(parameters(made, "run") - parameters(without, "run")).max() <= bound


@pytest.mark.parametrize("stage", ["advertise", "share", "mask", "confirm", "unmask"])
def test_below_the_threshold_the_round_fails_and_says_so(tmp_path: Path, stage: Stage) -> None:
    made = federation(tmp_path)
    with pytest.raises(RoundError, match=r"3 are needed \(secure_aggregation.threshold\).*site-1 \(" + stage):
        made.run("run", experiment(), grid=made.grid(losing((1, stage), (2, stage))))
    assert history(made, "run") == []


def test_lost_judges_cost_the_validation_and_not_the_round(tmp_path: Path) -> None:
    made = federation(tmp_path, sites=3)
    made.run("run", experiment(), grid=made.grid(losing((1, "mask"), purpose="evaluate")))
    assert "RoundError" in history(made, "run")[0].failures["site-0"]


def test_fewer_than_three_sites_are_no_secure_sum(tmp_path: Path) -> None:
    made = federation(tmp_path, sites=2)
    with pytest.raises(RoundError, match="2 of 2 sites sent keys, 3 are needed"):
        made.run("run", experiment())


def test_without_a_roster_the_run_does_not_start_and_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pneumofed provision"):
        TinyFederation(tmp_path).run("run", experiment())


def test_a_coordinator_that_swaps_a_public_key_is_noticed_by_every_other_site(tmp_path: Path) -> None:
    made = federation(tmp_path)

    def swap(node: int, step: Step, message: Message) -> Message:
        if step.stage != "share" or node == 0:
            return message
        keys = [signed.model_copy(update={"mask": "ab" * 32}) if signed.site == "site-0" else signed for signed in step.keys]
        return with_new_step(message, step, keys=keys)

    with pytest.raises(RoundError, match=r"1 of 4 sites shared.*site-1 \(share\): SecureSumError"):
        made.run("run", experiment(), grid=made.grid(Interfering(swap)))
    assert "the keys of site-0 are not those that it signed" in (made.sites / "site-1" / "site.log").read_text()


def test_a_roster_of_another_authority_is_noticed(tmp_path: Path) -> None:
    made, foreign = federation(tmp_path), federation(tmp_path / "foreign")
    assert foreign.key_roster is not None
    text = foreign.key_roster.read_text()

    def swap(node: int, step: Step, message: Message) -> Message:
        return with_new_step(message, step, roster=text) if step.stage == "advertise" else message

    with pytest.raises(RoundError, match="0 of 4 sites sent keys"):
        made.run("run", experiment(), grid=made.grid(Interfering(swap)))


def test_a_coordinator_that_tells_two_sets_of_survivors_learns_nothing(tmp_path: Path) -> None:
    made = federation(tmp_path, sites=6)  # five must stay

    def lie(node: int, step: Step, message: Message) -> Message:
        if step.stage != "confirm" or node < 3:
            return message
        return with_new_step(message, step, survivors=[site for site in step.survivors if site != "site-0"])

    with pytest.raises(RoundError, match="0 of 6 sites helped to unmask"):
        made.run("run", experiment(), grid=made.grid(Interfering(lie)))


@pytest.mark.parametrize("other", [[1], [1, 2, 3]], ids=["one", "all but one"])
def test_sites_that_are_told_another_rate_have_no_sum_with_the_rest(tmp_path: Path, other: list[int]) -> None:
    """A rate of nearly zero for all but one would make the sum that one's update."""
    made = federation(tmp_path)

    def slow(node: int, step: Step, message: Message) -> Message:
        if step.stage == "mask" and node in other:
            message.content.config_records["config"]["rate-factor"] = 1e-4
        return message

    with pytest.raises(RoundError, match="broke the agreement"):
        made.run("run", experiment(rounds=8, training={"schedule": "plateau"}), grid=made.grid(Interfering(slow)))


def test_a_site_that_drops_out_of_a_round_at_a_lower_rate_is_survived(tmp_path: Path) -> None:
    made = federation(tmp_path)
    never_better = {"schedule": "plateau", "plateau": {"patience_rounds": 0, "min_delta": 100.0}, "final_factor": 0.2}
    made.run("run", experiment(rounds=3, training=never_better), grid=made.grid(_Dropping(3, 3)))
    last = history(made, "run")[-1]
    assert there(last.rate_factor) < 1.0 and there(last.secure_sum).summed == ("site-0", "site-1", "site-2")


def test_a_message_in_the_clear_is_refused_in_a_secure_run(tmp_path: Path) -> None:
    made = federation(tmp_path)

    def strip(node: int, step: Step, message: Message) -> Message:
        if step.stage == "mask":
            del message.content.config_records["config"]["step"]
        return message

    with pytest.raises(RoundError, match="0 of 4 sites sent their masked vectors"):
        made.run("run", experiment(), grid=made.grid(Interfering(strip)))


def test_updates_beyond_the_clipping_norm_are_scaled_down_and_counted(tmp_path: Path) -> None:
    made = federation(tmp_path, sites=3)
    before = experiment(secure_aggregation={**SECURE, "clip_norm": 1e-3})
    made.run("run", before)
    assert there(history(made, "run")[0].secure_sum).clipped == 3


def test_a_sites_policy_counts_one_round_and_its_log_tells_each_step(tmp_path: Path) -> None:
    made = federation(tmp_path, sites=3)
    path, work = made.sites / "0.yaml", made.sites / "site-0"
    (work / "policy.yaml").write_text(
        "min_patients: 2\nmin_validation_patients: 1\nmax_rounds_per_day: 1\nrequire_secure_aggregation: true\n"
    )
    path.write_text(f"{path.read_text()}policy: {work / 'policy.yaml'}\n")
    made.run("run", experiment())
    entries = [entry.facts for entry in read_entries(work / "audit.jsonl") if entry.event == "answer"]
    steps = [f"{purpose} {stage}" for purpose in ("train", "evaluate") for stage in get_args(Stage)]
    assert [facts.get("secure_sum") for facts in entries] == [None, *steps]
    assert [facts["arrays"] for facts in entries if facts["arrays"]] == [["body", "tail"]] * 2
    assert verify_log(work / "audit.jsonl").intact
    with pytest.raises(RoundError, match="require_secure_aggregation"):
        made.run("plain", experiment(secure_aggregation={}, strategy={"min_sites": 3}))


def test_a_secure_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    made = federation(tmp_path, sites=3)
    made.run("unbroken", experiment(rounds=2))
    two_lost = losing((1, "mask"), (2, "mask"))
    rounds: list[int] = []

    def from_round_two(node: int, step: Step, message: Message) -> Message | None:
        rounds.append(int(message.content.config_records["config"]["round"]))  # type: ignore[arg-type]
        return two_lost.change(node, step, message) if rounds[-1] == 2 else message

    with pytest.raises(RoundError):
        made.run("broken", experiment(rounds=2), grid=made.grid(Interfering(from_round_two)))
    made.run("broken", experiment(rounds=2), resume=True)
    np.testing.assert_array_equal(parameters(made, "broken"), parameters(made, "unbroken"))


def test_the_report_of_a_secure_run_can_be_written(tmp_path: Path) -> None:
    made = federation(tmp_path, sites=3)
    made.run("run", experiment())
    write_report(tmp_path / "run")
    assert "site-1" in (tmp_path / "run" / "report.html").read_text()
