"""The protocol step by step: sums, drop-outs, a tampering coordinator, and what its whole view says of one site."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from pneumofed.client.secure_aggregation.memory import MemoryFolder
from pneumofed.common.config.experiment import SecureAggregationConfig
from pneumofed.common.errors import SecureSumError
from pneumofed.common.secure_aggregation.key_agreement import KeyPair, own_mask, pair_mask, sign_keys
from pneumofed.common.secure_aggregation.masking import SumVector
from pneumofed.common.secure_aggregation.protocol import Step, SumSession, unpack_masked
from tests.common.secure_aggregation.randomness import correlated, looks_random, same_distribution
from tests.secure_parties import MODEL, SHAPE, Parties, body_bytes, plain_sum, random_vector

FIVE = ["alpha", "beta", "gamma", "delta", "epsilon"]


def parties(folder: Path, names: list[str] = FIVE, **changes: object) -> Parties:
    cfg = SecureAggregationConfig.model_validate({"enabled": True, **changes})
    return Parties(folder, names, cfg, {name: random_vector(seed) for seed, name in enumerate(names)})


def assert_sum(total: SumVector | None, chosen: Parties, names: list[str]) -> None:
    assert total is not None
    wanted = plain_sum([chosen.vectors[name] for name in names])
    np.testing.assert_array_equal(total.body, wanted.body)
    np.testing.assert_array_equal(total.tail, wanted.tail)


@pytest.mark.parametrize(
    ("lost", "summed"),
    [
        ({}, FIVE),
        ({"beta": "advertise"}, ["alpha", "gamma", "delta", "epsilon"]),
        ({"beta": "share"}, ["alpha", "gamma", "delta", "epsilon"]),
        ({"beta": "mask"}, ["alpha", "gamma", "delta", "epsilon"]),
        ({"beta": "confirm"}, FIVE),
        ({"beta": "unmask"}, FIVE),
    ],
)
def test_the_sum_is_exact_whoever_drops_out_where(tmp_path: Path, lost: Mapping[str, str], summed: list[str]) -> None:
    chosen = parties(tmp_path)
    assert_sum(chosen.run(lost=lost), chosen, summed)
    assert chosen.collector.summed == sorted(summed)


def test_drop_outs_at_several_steps_add_up(tmp_path: Path) -> None:
    names = [f"site-{number}" for number in range(9)]  # seven must stay
    chosen = parties(tmp_path, names)
    total = chosen.run(lost={"site-2": "mask", "site-5": "unmask"})
    assert_sum(total, chosen, [name for name in names if name != "site-2"])
    with pytest.raises(SecureSumError, match="6 of 9 sites"):
        parties(tmp_path / "more", names).run(lost={"site-2": "mask", "site-4": "confirm", "site-5": "unmask"})


def test_with_neighbours_instead_of_all_pairs_the_sum_is_the_same(tmp_path: Path) -> None:
    names = [f"site-{number:02d}" for number in range(20)]
    chosen = parties(tmp_path, names, neighbours=8)
    total = chosen.run(lost={"site-07": "mask", "site-13": "confirm"})
    assert all(len(parcels.parcels) == 8 for parcels in chosen.collector.parcels.values())
    assert_sum(total, chosen, [name for name in names if name != "site-07"])


def test_a_late_site_alone_with_its_neighbours_gone_is_refused_by_itself(tmp_path: Path) -> None:
    chosen = parties(tmp_path)
    chosen.run(until="share")
    step = chosen.collector.mask()["alpha"]
    few = {name: step.parcels[name] for name in ("beta", "gamma")}
    with pytest.raises(SecureSumError, match="3 sites, 4 are needed"):
        chosen.sites["alpha"].begin_masking(
            step.model_copy(update={"senders": ["alpha", "beta", "gamma"], "parcels": few}), MODEL
        )
    assert not (tmp_path / "alpha" / "secure_sum" / "session.json").exists()  # it has left the sum
    with pytest.raises(SecureSumError, match="takes no part"):
        chosen.sites["alpha"].begin_masking(step, MODEL)


def test_leaving_one_sum_leaves_another_that_was_begun_since(tmp_path: Path) -> None:
    chosen = parties(tmp_path)
    chosen.run(until="advertise")
    session = tmp_path / "alpha" / "secure_sum" / "session.json"
    chosen.sites["alpha"].folder.leave(SumSession.begin("run", 1, "train", "settings"))
    assert session.exists()
    chosen.sites["alpha"].folder.leave(chosen.session)
    assert not session.exists()


def last_steps(chosen: Parties) -> tuple[Step, Step]:
    """The steps `confirm` and `unmask` of alpha, where all others confirmed all five."""
    chosen.run(until="mask")
    steps = chosen.collector.confirm(1)
    chosen.ask({name: steps[name] for name in FIVE[1:]}, chosen.collector.take_confirmation)
    signatures = {**chosen.collector.signatures, "alpha": "00" * 64}
    return steps["alpha"], Step.model_validate({**steps["alpha"].model_dump(), "stage": "unmask", "signatures": signatures})


def test_both_kinds_of_share_of_one_site_are_never_given(tmp_path: Path) -> None:
    chosen = parties(tmp_path)
    confirm, unmask = last_steps(chosen)
    alpha = chosen.sites["alpha"]
    alpha.confirm(confirm)
    with pytest.raises(SecureSumError, match="asked for twice"):
        alpha.confirm(confirm.model_copy(update={"survivors": FIVE[:4]}))
    shares = alpha.unmask(unmask)
    assert (sorted(shares.seeds), shares.keys) == (sorted(FIVE), {})
    with pytest.raises(SecureSumError, match="it is over"):
        alpha.unmask(unmask)


def test_shares_are_given_for_the_confirmed_set_alone(tmp_path: Path) -> None:
    """The others confirmed five survivors; alpha was told four, so that it would open the fifth's masks."""
    chosen = parties(tmp_path)
    confirm, unmask = last_steps(chosen)
    alpha = chosen.sites["alpha"]
    alpha.confirm(confirm.model_copy(update={"survivors": FIVE[:4]}))
    with pytest.raises(SecureSumError, match="0 sites, 4 are needed"):
        alpha.unmask(unmask)


@pytest.mark.parametrize("survivors", [FIVE[:3], FIVE[1:], [*FIVE, "stranger"], [*FIVE, "alpha"]])
def test_a_set_that_is_too_small_or_foreign_is_not_confirmed(tmp_path: Path, survivors: list[str]) -> None:
    chosen = parties(tmp_path)
    confirm, _ = last_steps(chosen)
    with pytest.raises(SecureSumError):
        chosen.sites["alpha"].confirm(confirm.model_copy(update={"survivors": survivors}))


@pytest.mark.parametrize("stage", ["share", "mask", "confirm"])
def test_no_step_is_done_twice(tmp_path: Path, stage: str) -> None:
    """Two vectors under the same masks would give away their difference."""
    chosen = parties(tmp_path)
    collector = chosen.collector
    chosen.run(until={"share": "advertise", "mask": "share", "confirm": "mask"}[stage])
    step = {"share": collector.share, "mask": collector.mask, "confirm": lambda: collector.confirm(1)}[stage]()["alpha"]
    chosen.answer("alpha", step)
    with pytest.raises(SecureSumError, match="asked for twice or too soon"):
        chosen.answer("alpha", step)


def test_a_sum_is_not_begun_twice(tmp_path: Path) -> None:
    chosen = parties(tmp_path)
    steps = chosen.collector.advertise(FIVE)
    chosen.answer("alpha", steps["alpha"])
    with pytest.raises(SecureSumError, match="begun before"):
        chosen.answer("alpha", steps["alpha"])


def test_keys_that_the_coordinator_made_itself_are_noticed(tmp_path: Path) -> None:
    chosen = parties(tmp_path)
    chosen.run(until="advertise")
    pair, step = KeyPair.generate(), chosen.collector.share()["alpha"]
    forged = sign_keys(chosen.session, "beta", pair.public, pair.public[::-1], chosen.node_keys["gamma"])
    keys = [forged if signed.site == "beta" else signed for signed in step.keys]
    with pytest.raises(SecureSumError, match="keys of beta are not those that it signed"):
        chosen.sites["alpha"].share(step.model_copy(update={"keys": keys}))


def test_keys_of_an_earlier_sum_are_noticed(tmp_path: Path) -> None:
    chosen = parties(tmp_path)
    chosen.run(until="advertise")
    step = chosen.collector.share()["alpha"]
    earlier = replace(chosen.session, round=0)
    old = sign_keys(earlier, "beta", KeyPair.generate().public, KeyPair.generate().public, chosen.node_keys["beta"])
    keys = [old if signed.site == "beta" else signed for signed in step.keys]
    with pytest.raises(SecureSumError, match="keys of beta"):
        chosen.sites["alpha"].share(step.model_copy(update={"keys": keys}))


def test_settings_that_change_between_two_steps_are_refused(tmp_path: Path) -> None:
    """A lower threshold in the last step, say."""
    chosen = parties(tmp_path)
    confirm, unmask = last_steps(chosen)
    chosen.sites["alpha"].confirm(confirm)
    with pytest.raises(SecureSumError, match="no part in this secure sum"):
        chosen.site("alpha", replace(chosen.session, settings="others")).unmask(unmask)


def test_sites_that_were_given_different_weights_have_no_sum(tmp_path: Path) -> None:
    chosen = parties(tmp_path)
    chosen.vectors, chosen.models = {name: SHAPE.zeros() for name in FIVE}, {"alpha": "other weights"}
    total = chosen.run()
    assert total is not None and looks_random(total.body.tobytes())


def test_parcels_that_were_changed_or_exchanged_are_noticed(tmp_path: Path) -> None:
    chosen = parties(tmp_path)
    chosen.run(until="share")
    step = chosen.collector.mask()["alpha"]
    exchanged = {**step.parcels, "beta": step.parcels["gamma"], "gamma": step.parcels["beta"]}
    with pytest.raises(SecureSumError, match="changed on the way"):
        chosen.sites["alpha"].begin_masking(step.model_copy(update={"parcels": exchanged}), MODEL)


def test_an_older_roster_is_refused(tmp_path: Path) -> None:
    chosen = parties(tmp_path)
    step = chosen.collector.advertise(FIVE)["alpha"]
    chosen.sites["alpha"].advertise(step.model_copy(update={"roster": chosen.roster(serial=3).text}))
    again = chosen.site("alpha", SumSession.begin("run", 2, "train", "settings"))
    with pytest.raises(SecureSumError, match="serial 2, but 3 was seen"):
        again.advertise(step.model_copy(update={"roster": chosen.roster(serial=2).text}))


def test_a_wrong_share_is_noticed_and_not_summed(tmp_path: Path) -> None:
    chosen = parties(tmp_path)
    chosen.run(until="confirm")
    chosen.ask(chosen.collector.unmask(), chosen.collector.take_shares)
    shares = chosen.collector.shares["alpha"]
    chosen.collector.shares["alpha"] = shares.model_copy(update={"seeds": {**shares.seeds, "beta": "00" * 33}})
    with pytest.raises(SecureSumError, match="beta's seed"):
        chosen.collector.finish()


def test_secrets_are_readable_by_the_owner_alone_and_gone_when_not_needed(tmp_path: Path) -> None:
    chosen = parties(tmp_path)
    chosen.run(until="mask")
    path = MemoryFolder(str(tmp_path / "alpha")).path / "session.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    kept = json.loads(path.read_text())
    assert (kept["channel"], kept["mask"], kept["seed"]) == (None, None, None)


@pytest.mark.parametrize(
    ("name", "kind"), [("used", "the list of secure sums"), ("serial", "the serial of the newest key roster")]
)
def test_a_site_that_cannot_know_what_was_begun_before_begins_nothing(tmp_path: Path, name: str, kind: str) -> None:
    chosen = parties(tmp_path)
    file = MemoryFolder(str(tmp_path / "alpha")).path / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\xff")
    with pytest.raises(SecureSumError, match=f"{kind}.* is damaged"):
        chosen.sites["alpha"].advertise(chosen.collector.advertise(FIVE)["alpha"])
    assert file.read_bytes() == b"\xff" and not (file.parent / "session.json").exists()


def vector_of(chosen: Parties, name: str) -> SumVector:
    sent = unpack_masked(chosen.seen[f"mask {name}"], SHAPE)
    return SumVector(sent.body.copy(), sent.tail.copy())


def as_words(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def test_in_the_coordinators_whole_view_each_vector_looks_random(tmp_path: Path) -> None:
    """Also once the coordinator took away the own mask, whose seed it learns in the last step."""
    chosen = parties(tmp_path)
    chosen.vectors = {name: SHAPE.zeros() for name in FIVE}
    chosen.run()
    for name in FIVE:
        vector = vector_of(chosen, name)
        assert looks_random(vector.body.tobytes())
        told = {holder: shares.seeds[name] for holder, shares in chosen.collector.shares.items()}
        seed = chosen.collector._join(name, told)
        vector.add_mask(own_mask(chosen.session, seed, name), subtract=True)
        assert looks_random(vector.body.tobytes())


def test_the_vector_of_a_site_that_was_given_up_too_soon_looks_random(tmp_path: Path) -> None:
    """It arrives after the others opened the site's pair masks: its own mask still hides it."""
    chosen = parties(tmp_path)
    chosen.vectors = {name: SHAPE.zeros() for name in FIVE}
    chosen.run(until="share")
    collector, steps = chosen.collector, chosen.collector.mask()
    late = unpack_masked(chosen.answer("beta", steps.pop("beta")), SHAPE)
    chosen.ask(steps, collector.take_vector)
    chosen.ask(collector.confirm(1), collector.take_confirmation)
    chosen.ask(collector.unmask(), collector.take_shares)
    told = {holder: shares.keys.get("beta") for holder, shares in collector.shares.items()}
    private, vector = collector._join("beta", told), SumVector(late.body.copy(), late.tail.copy())
    for name in FIVE:
        if name != "beta":
            key, subtracts = pair_mask(chosen.session, private, collector.keys["beta"], collector.keys[name], MODEL)
            vector.add_mask(key, subtract=not subtracts)
    assert looks_random(vector.body.tobytes())


def test_the_same_update_twice_gives_unrelated_vectors(tmp_path: Path) -> None:
    first, second = parties(tmp_path / "first"), parties(tmp_path / "second")
    for chosen in (first, second):
        chosen.run()
    for name in FIVE:
        one, two = (body_bytes(chosen.seen[f"mask {name}"]) for chosen in (first, second))
        assert not correlated(as_words(one), as_words(two))
        assert same_distribution(one, two)


def test_which_of_two_known_updates_a_site_sent_cannot_be_guessed(tmp_path: Path) -> None:
    """The guess goes to the nearer one, as seen by correlation and by the sign of the first words; right in half of the cases."""
    candidates = [random_vector(50, 2**30), random_vector(51, 2**30)]
    generator, right, trials = np.random.default_rng(0), [0, 0], 40
    for trial in range(trials):
        truth = int(generator.integers(2))
        chosen = parties(tmp_path / str(trial), FIVE[:3], threshold=1.0)
        chosen.vectors = {"alpha": candidates[truth], "beta": random_vector(trial), "gamma": random_vector(trial + 100)}
        chosen.run(until="mask")
        seen = vector_of(chosen, "alpha").body.view(np.int32).astype(float)
        scores = [float(np.corrcoef(seen, candidate.body.astype(float))[0, 1]) for candidate in candidates]
        right[0] += int(np.argmax(scores)) == truth
        right[1] += int(seen[0] > 0) == truth
    for count in right:
        assert binomtest(count, trials).pvalue > 1e-4
