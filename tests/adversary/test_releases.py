"""Promise: a model goes out only if it is good enough and nowhere worse than the last one. Attack: a poor first model, another bundle to
compare with, `--first` again, losses that add up, and a chain of releases that is removed or put back."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest import mock

import pytest
from typer.testing import CliRunner, Result

from pneumofed.cli.main import app
from pneumofed.common.audit.log import AuditLog
from pneumofed.common.errors import ReleaseError
from pneumofed.common.evaluation.comparison import Areas, Margins, ModelComparison, Rates
from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.release import ReleaseRecord
from pneumofed.common.wire.keys import write_node_key
from pneumofed.server.release.chain import (
    ReleaseChain,
    append_release,
    check_against_audit,
    continue_from,
    read_chain,
)
from pneumofed.server.release.gate import Evidence, Floor, ReleasePolicy, decide_release, first_release
from pneumofed.server.release.release import Sets
from tests.model_bundles import signing_key
from tests.server.release.models import NOW, comparison, network, seal_network

MARGINS = Margins(auroc=0.02, point=0.05), Margins(auroc=0.02, point=0.05)
TRUSTED = [signing_key().public_key()]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    folder = tmp_path_factory.mktemp("models")
    return [seal_network(folder / f"model-{number}", network(number)) for number in range(4)]


def judged(auroc: float, sensitivity: int, specificity: int, each: int = 2000, loss: float = 0.0) -> ModelComparison:
    """A model of this AUROC and these hits of `each` images, compared with one that was better by `loss` in AUROC."""
    hits = [Rates(images=each, patients=each, old=n, new=n, gained=0, lost=0, variance=0.0) for n in (sensitivity, specificity)]
    areas = Areas(old=auroc + loss, new=auroc, var_old=1e-5, var_new=1e-5, covariance=9.99e-6)
    return ModelComparison(auroc=areas, sensitivity=hits[0], specificity=hits[1])


POOR = judged(0.71, 1700, 660)


def test_a_first_model_below_the_floor_is_not_released(models: list[Bundle]) -> None:
    record = first_release(models[0], {"test": POOR}, MARGINS, NOW)
    assert not record.released
    assert [reason.split(";")[1] for reason in record.reasons] == [" the floor is 0.8", " the floor is 0.6"]
    assert first_release(models[0], {"test": POOR}, MARGINS, NOW, Floor(auroc=0.65, specificity=0.3)).released


def test_the_floor_is_of_the_interval_and_not_of_the_estimate(models: list[Bundle]) -> None:
    lucky = judged(1.0, 5, 5, each=5)
    assert not first_release(models[0], {"test": lucky}, MARGINS, NOW).released


def test_later_models_must_reach_the_floor_too(models: list[Bundle]) -> None:
    record = decide_release((models[0], models[1]), Evidence({"test": POOR, "external": POOR}, {}), MARGINS)
    assert not record.released and all("the floor is" in reason for reason in record.reasons)


def test_no_comparison_is_no_pass(models: list[Bundle]) -> None:
    assert not first_release(models[0], {}, MARGINS, NOW).released
    record = decide_release((models[0], models[1]), Evidence({}, {}, sets_needed=()), MARGINS)
    assert not record.released and "nothing was compared" in record.reasons[0]


def steps(models: list[Bundle], losses: list[float], chain: ReleaseChain) -> tuple[list[bool], ReleaseChain]:
    """Whether each of the releases that lose so much AUROC goes out."""
    found, auroc = [], 0.95
    for number, loss in enumerate(losses):
        new = judged(auroc - loss, 1900, 1900, loss=loss)
        pair = models[number % 2], models[(number + 1) % 2]
        record = decide_release(pair, Evidence({"test": new, "external": new}, {}), MARGINS, losses=chain.losses())
        found.append(record.released)
        if record.released:
            chain, auroc = chain.extended(record), auroc - loss
    return found, chain


def test_small_losses_do_not_add_up(models: list[Bundle]) -> None:
    found, chain = steps(models, [0.008] * 6, ReleaseChain())
    assert found == [True, True, False, False, False, False]
    assert chain.losses()["held-out set", "test", "auroc"] == pytest.approx(0.016)


def test_a_better_model_pays_back_but_does_not_save_up(models: list[Bundle]) -> None:
    assert steps(models, [0.008, 0.008, -0.02, 0.008, 0.008, 0.008], ReleaseChain())[0] == [True] * 5 + [False]


def test_a_total_of_the_policy_counts(models: list[Bundle]) -> None:
    new, policy = judged(0.94, 1900, 1900, loss=0.01), ReleasePolicy(total=Margins(auroc=0.005))
    record = decide_release((models[0], models[1]), Evidence({"test": new, "external": new}, {}), MARGINS, policy=policy)
    assert len(record.reasons) == 2 and "below the best release, 0.005 is allowed" in record.reasons[0]


def released(models: list[Bundle], new: int, old: int) -> ReleaseRecord:
    good = {"test": comparison(seed=1), "external": comparison(seed=2)}
    return decide_release((models[old], models[new]), Evidence(good, {}), MARGINS, lambda: NOW)


def test_only_the_model_that_was_released_last_is_compared_with(models: list[Bundle]) -> None:
    chain = ReleaseChain().extended(first_release(models[0], {"test": comparison()}, MARGINS, NOW))
    chain = chain.extended(released(models, 1, 0))
    assert continue_from(chain, models[1], models[1].folder, TRUSTED) == chain
    with pytest.raises(ReleaseError, match="is not the model that was released last, which is model-1"):
        continue_from(chain, models[0], models[0].folder, TRUSTED)
    with pytest.raises(ReleaseError, match="nothing shows that"):
        continue_from(ReleaseChain(), models[3], models[3].folder, TRUSTED)


def test_a_chain_that_was_changed_cut_or_put_back_is_noticed(models: list[Bundle], tmp_path: Path) -> None:
    file, audit = tmp_path / "state" / "releases.json", AuditLog(tmp_path / "audit.jsonl")
    first, second = first_release(models[0], {"test": comparison()}, MARGINS, NOW), released(models, 1, 0)
    append_release(file, ReleaseChain(), first, signing_key())
    audit.record("release", decision="released", new=first.new.digest)
    shutil.copy(file, tmp_path / "older.json")
    chain = read_chain(file, TRUSTED)
    append_release(file, chain, second, signing_key())
    audit.record("release", decision="released", new=second.new.digest)
    with pytest.raises(ReleaseError, match="released meanwhile"):
        append_release(file, chain, second, signing_key())
    check_against_audit(read_chain(file, TRUSTED), audit.path)
    for former in (read_chain(tmp_path / "older.json", TRUSTED), ReleaseChain()):
        with pytest.raises(ReleaseError, match="not in the chain of releases"):
            check_against_audit(former, audit.path)
    file.write_text(file.read_text().replace("model-0", "model-x"))
    with pytest.raises(ReleaseError, match="changed after it was signed"):
        read_chain(file, TRUSTED)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    write_node_key(tmp_path / "keys", "release")
    return tmp_path / "keys" / "node"


def release(bundle: Bundle, key: Path, *options: str, told: ModelComparison | None = None) -> Result:
    """Runs the command; the sets' comparisons are `told`."""
    sets = {"test": told or comparison(), "external": told or comparison()}
    with (
        mock.patch("pneumofed.server.release.release.compare_on_sets", lambda *_: sets),
        mock.patch("pneumofed.cli.release._sets", lambda *_: Sets({}, Path("cache"))),
        mock.patch("pneumofed.common.model_bundle.bundle.load_bundle", lambda path, _: by_folder[Path(path)]),
    ):
        return CliRunner().invoke(app, ["release", str(bundle.folder), "--key", str(key), *options])


by_folder: dict[Path, Bundle] = {}


def test_first_works_once(models: list[Bundle], keys: Path) -> None:
    by_folder.update({model.folder: model for model in models})
    assert release(models[0], keys, "--first", told=POOR).exit_code == 4
    assert release(models[0], keys, "--first").exit_code == 0
    again = release(models[1], keys, "--first")
    assert again.exit_code != 0 and "--first works once" in str(again.exception or again.output)
    assert release(models[1], keys, "--against", str(models[0].folder)).exit_code == 0
    assert release(models[1], keys, "--against", str(models[0].folder)).exit_code == 0, "a command cut short is given again"
    assert len(read_chain(keys.parent / "releases.json", None).links) == 2
    stale = release(models[2], keys, "--against", str(models[0].folder))
    assert stale.exit_code != 0 and "released last, which is model-1" in str(stale.exception or stale.output)


def test_a_margin_wider_than_the_coordinators_policy_is_refused(models: list[Bundle], keys: Path, tmp_path: Path) -> None:
    (tmp_path / "release.yaml").write_text("margins: {auroc: 0.01}\nfloor: {auroc: 0.9}\n")
    found = release(models[0], keys, "--first", "--margin", "0.3", "--policy", str(tmp_path / "release.yaml"))
    assert found.exit_code != 0 and "wider than release.yaml allows" in str(found.exception or found.output)
