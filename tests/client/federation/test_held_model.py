"""A model travels once a round: the site keeps what it judged, and trains on from it; what is lost is sent whole."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from pneumofed.client.federation import held_model
from pneumofed.client.federation.held_model import keep_models, restore_model
from pneumofed.common.audit.log import hash_arrays
from pneumofed.common.config.parties import SiteConfig
from pneumofed.common.errors import HeldModelError
from pneumofed.common.files import atomic_write
from pneumofed.common.models.kept_model import moving_average
from pneumofed.common.wire.instructions import Instruction
from pneumofed.common.wire.messages import ModelArrays
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.records import RoundRecord
from tests.tiny import TinyFederation, tiny_experiment

RUN, OTHER_RUN = "ab" * 16, "cd" * 16
AVERAGED = tiny_experiment(strategy={"ema_decay": 0.5})
FIRST = ModelArrays(np.arange(6, dtype=np.float32), np.ones(2, np.float32))
SECOND = ModelArrays(FIRST.parameters + 1, FIRST.statistics)


@pytest.fixture
def site(tmp_path: Path) -> SiteConfig:
    return SiteConfig(name="site-0", manifest="manifest.csv", work_dir=str(tmp_path / "work"))


def referring(held: str | None, run: str = RUN) -> Instruction:
    return Instruction(tiny_experiment(), run, 2, held=held)


def files(site: SiteConfig) -> list[Path]:
    return sorted(Path(site.work_dir).iterdir())


def test_what_is_kept_is_what_comes_back(site: SiteConfig) -> None:
    (held,) = keep_models(site, RUN, 1, FIRST)
    assert held == hash_arrays(FIRST)
    restored = restore_model(site, referring(held)).weights
    assert np.array_equal(restored.parameters, FIRST.parameters) and np.array_equal(restored.statistics, FIRST.statistics)


def test_a_model_without_statistics_is_kept_too(site: SiteConfig) -> None:
    plain = ModelArrays(FIRST.parameters, np.zeros(0, np.float32))
    (held,) = keep_models(site, RUN, 1, plain)
    restored = restore_model(site, referring(held)).weights
    assert np.array_equal(restored.parameters, plain.parameters) and restored.statistics.shape == (0,)


def test_the_last_models_are_kept_and_only_for_their_run(site: SiteConfig) -> None:
    (first,), (second,) = keep_models(site, RUN, 1, FIRST), keep_models(site, RUN, 2, SECOND)
    assert len(files(site)) == 1
    for instruction in (referring(first), referring(second, OTHER_RUN)):
        with pytest.raises(HeldModelError):
            restore_model(site, instruction)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-4],
        lambda content: content[:-1] + b"\x7f",
        lambda _: b"",
        lambda _: b"\x93NUMPY",
        lambda content: content.replace(b"'<f4'", b"'|O' "),  # would be read as addresses
        lambda content: content.replace(b"'<f4'", b"'<f8'"),
        lambda content: content.replace(b"(6,), }" + b" " * 18, b"(4611686018427387904,), }"),
        lambda content: content.replace(b"(6,), } ", b"(-6,), }"),
    ],
)
def test_a_damaged_model_is_refused(site: SiteConfig, damage) -> None:  # type: ignore[no-untyped-def]
    (held,) = keep_models(site, RUN, 1, FIRST)
    (path,) = files(site)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(HeldModelError):
        restore_model(site, referring(held))


def test_on_a_full_disk_nothing_is_kept_and_nothing_is_said(site: SiteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(held_model, "atomic_write", full)
    assert keep_models(site, RUN, 1, FIRST) == [] and files(site) == []
    monkeypatch.setattr(held_model, "atomic_write", atomic_write)
    assert keep_models(site, RUN, 1, FIRST) != []


def averaging(former: str, result: ModelArrays, arrays: ModelArrays = SECOND) -> Instruction:
    return Instruction(AVERAGED, RUN, 2, arrays, averaged=(former, hash_arrays(result)))


def test_a_site_brings_its_average_up_to_date_and_keeps_the_weights_beside_it(site: SiteConfig) -> None:
    (former,) = keep_models(site, RUN, 1, FIRST)
    expected = moving_average(FIRST, SECOND, 0.5)
    restored = restore_model(site, averaging(former, expected))
    assert hash_arrays(restored.weights) == hash_arrays(expected)
    assert restored.latest is SECOND
    average, latest = keep_models(site, RUN, 2, restored.weights, restored.latest)
    assert len(files(site)) == 2
    assert hash_arrays(restore_model(site, referring(latest)).weights) == hash_arrays(SECOND)
    assert average == hash_arrays(expected)


def test_an_average_that_is_not_the_coordinators_is_refused(site: SiteConfig) -> None:
    (former,) = keep_models(site, RUN, 1, FIRST)
    other = ModelArrays(FIRST.parameters[1:], FIRST.statistics)
    for wrong in (
        averaging(former, moving_average(FIRST, SECOND, 0.25)),
        averaging(former, SECOND, other),
        averaging("ef" * 32, moving_average(FIRST, SECOND, 0.5)),
    ):
        with pytest.raises(HeldModelError):
            restore_model(site, wrong)


# --- a run --------------------------------------------------------------------------------------------------------------------------


def history(federation: TinyFederation, name: str) -> list[RoundRecord]:
    return RunFolder(federation.folder / name).read_history()


def test_after_the_first_round_only_the_judged_model_goes_down(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    federation.run("run", tiny_experiment(rounds=3))
    first, *later = [line.bytes.down for line in history(federation, "run")]
    assert later == [first / 2, first / 2]


def test_where_a_moving_average_is_judged_only_the_weights_go_down(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    federation.run("run", tiny_experiment(rounds=4, strategy={"ema_decay": 0.5}))
    first, *later = [line.bytes.down for line in history(federation, "run")]
    assert later == [first / 2] * 3


@pytest.mark.parametrize("strategy", [{}, {"ema_decay": 0.5}])
def test_hospitals_that_share_a_folder_keep_what_the_others_still_need(tmp_path: Path, strategy: dict[str, float]) -> None:
    federation = TinyFederation(tmp_path)
    for path in federation.sites.glob("*.yaml"):
        path.write_text(path.read_text() + f"model_dir: {tmp_path / 'models'}\n")
    federation.run("run", tiny_experiment(rounds=5, strategy=strategy))
    first, *later = [line.bytes.down for line in history(federation, "run")]
    assert later == [first / 2] * 4
    assert {path.name.split("-")[-2] for path in (tmp_path / "models").iterdir()} == {"4", "5"}


@pytest.mark.parametrize("strategy", [{}, {"ema_decay": 0.5}])
@pytest.mark.parametrize("secure", [False, True])
def test_a_site_that_lost_its_model_gets_it_whole_and_the_run_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secure: bool, strategy: dict[str, float]
) -> None:
    federation = TinyFederation(tmp_path)
    experiment = tiny_experiment(rounds=3, strategy=strategy, **({"secure_aggregation": {"enabled": True}} if secure else {}))
    if secure:
        federation.give_identities()
    federation.run("run", experiment)

    grid = federation.grid()
    push = grid.push_messages

    def losing(messages):  # type: ignore[no-untyped-def]
        for path in federation.sites.glob("site-1/held-model-*"):
            path.unlink()
        return push(messages)

    monkeypatch.setattr(grid, "push_messages", losing)
    federation.run("losing", experiment, grid=grid)
    plain, lost = history(federation, "run"), history(federation, "losing")
    assert [line.validation for line in lost] == [line.validation for line in plain]
    assert not any(line.failures for line in lost)
    assert [line.bytes.down for line in lost][1] > [line.bytes.down for line in plain][1]
