"""Promise: with secure aggregation a hostile coordinator learns sums in which every site has its share, and no site's own vector."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pneumofed.client.federation.policy import UNRESTRICTED
from pneumofed.client.federation.requests import read_request
from pneumofed.client.federation.site_data import read_site_config
from pneumofed.client.federation.sum_terms import broken_term
from pneumofed.client.secure_aggregation.participant import MaskPlan, Participant, masking
from pneumofed.common.config.choices import CORRECTED
from pneumofed.common.config.experiment import SecureAggregationConfig
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.errors import ConfigError, MessageError, PolicyError, RoundError, SecureSumError
from pneumofed.common.model_bundle.suitability import fit_suitability
from pneumofed.common.secure_aggregation.key_agreement import digest_keys, own_mask, pair_mask, sign_survivors
from pneumofed.common.secure_aggregation.masking import SumVector, join_shares, threshold
from pneumofed.common.secure_aggregation.protocol import Confirmation, Shares, Step, SumSession, unpack_masked, unpack_reply
from pneumofed.common.secure_aggregation.quantization import TrainingSums, UpdateCodec, largest_share
from pneumofed.common.wire.instructions import Instruction, pack_instruction
from pneumofed.common.wire.messages import ModelArrays
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.records import RoundRecord
from tests.secure_parties import MODEL, SHAPE, Parties, random_vector
from tests.tiny import TinyFederation, there, tiny_experiment

FIVE = ["alpha", "beta", "gamma", "delta", "epsilon"]
VICTIM, COLLUDER = "alpha", "epsilon"
FIRST, SECOND = ["alpha", "beta", "epsilon"], ["delta", "epsilon", "gamma"]
"""Two stories about who survived; the colluder is in both."""
TWENTY = [f"site-{number:02d}" for number in range(20)]


def terms(**changes: Any) -> SecureAggregationConfig:
    return SecureAggregationConfig.model_validate({"enabled": True, **changes})


def parties(folder: Path, policy: SitePolicy | None, names: list[str] = FIVE, **changes: Any) -> Parties:
    made = Parties(folder, names, terms(**changes), {name: random_vector(number) for number, name in enumerate(names)})
    if policy is not None:
        made.policy = policy
        made.sites = {name: replace(site, policy=policy) for name, site in made.sites.items()}
    return made


def tell_two_stories(chosen: Parties, victim: str, colluding: list[str], stories: list[tuple[list[str], list[str]]]) -> SumVector:
    """The victim's vector in the clear, by a coordinator with `colluding` on its side; a story is who is told it, and who survived in it.
    The victim does in the first one alone."""
    session, keys, holders = chosen.session, chosen.collector.keys, chosen.collector.holders[victim]
    digest, places = digest_keys(session, list(keys.values())), {name: place for place, name in enumerate(sorted(keys), start=1)}
    seeds, masks = dict[int, bytes](), dict[int, bytes]()
    for name in set(colluding) & set(holders):
        with chosen.sites[name].folder.step(session, "masked") as memory:
            held = memory.held[victim]
        seeds[places[name]], masks[places[name]] = bytes.fromhex(held.seed), bytes.fromhex(held.key)
    for told, survivors in stories:
        signatures = {name: sign_survivors(session, digest, survivors, chosen.node_keys[name]) for name in colluding}
        for name in told:
            reply = chosen.answer(name, chosen.collector._step("confirm", survivors=survivors))
            signatures[name] = unpack_reply(reply, Confirmation).signature
        for name in told:
            with suppress(SecureSumError):  # too few of its neighbours were told the same
                given = unpack_reply(chosen.answer(name, chosen.collector._step("unmask", signatures=signatures)), Shares)
                for shares, secret in ((given.seeds, seeds), (given.keys, masks)):
                    if victim in shares:
                        secret[places[name]] = bytes.fromhex(shares[victim])
    least, vector = threshold(len(holders), chosen.cfg.threshold), SHAPE.zeros()
    vector.add(unpack_masked(chosen.seen[f"mask {victim}"], SHAPE))
    vector.add_mask(own_mask(session, join_shares(seeds, least), victim), subtract=True)
    private = join_shares(masks, least)
    for name in set(holders) - {victim}:
        key, subtracted = pair_mask(session, private, keys[victim], keys[name], MODEL)
        vector.add_mask(key, subtract=not subtracted)
    return vector


def two_stories_among_five(chosen: Parties) -> SumVector:
    chosen.run(until="mask")
    stories = [([name for name in story if name != COLLUDER], story) for story in (FIRST, SECOND)]
    return tell_two_stories(chosen, VICTIM, [COLLUDER], stories)


def test_a_threshold_of_half_would_give_a_vector_away_and_no_site_accepts_it(tmp_path: Path) -> None:
    lax = parties(tmp_path / "lax", None, threshold=0.51)
    np.testing.assert_array_equal(two_stories_among_five(lax).body, lax.vectors[VICTIM].body)  # what the floor is for
    with pytest.raises(PolicyError) as refused:
        two_stories_among_five(parties(tmp_path / "strict", SitePolicy(), threshold=0.51))
    assert refused.value.rule == "min_sum_threshold"


def test_two_stories_at_the_accepted_threshold_give_nothing(tmp_path: Path) -> None:
    with pytest.raises(SecureSumError, match="3 sites, 4 are needed"):
        two_stories_among_five(parties(tmp_path, SitePolicy()))


def two_stories_among_twenty(chosen: Parties) -> tuple[str, SumVector]:
    """By six of twenty, who sit beside their victim in the order of the ring, as in the luckiest of the orders that were tried."""
    chosen.run(until="mask")
    digest = digest_keys(chosen.session, list(chosen.collector.keys.values()))
    ring = sorted(TWENTY, key=lambda name: sha256(digest + name.encode()).digest())
    victim, colluding = ring[0], [ring[place] for place in (-3, -2, -1, 1, 2, 3)]
    first, second = [victim, *ring[4:8]], ring[8:17]
    return victim, tell_two_stories(chosen, victim, colluding, [(first, TWENTY), (second, sorted({*TWENTY} - {victim}))])


def test_few_neighbours_would_give_a_vector_away_to_less_than_a_third_and_no_site_accepts_them(tmp_path: Path) -> None:
    lax = parties(tmp_path / "lax", None, TWENTY, neighbours=12)
    victim, vector = two_stories_among_twenty(lax)
    np.testing.assert_array_equal(vector.body, lax.vectors[victim].body)
    with pytest.raises(PolicyError) as refused:
        two_stories_among_twenty(parties(tmp_path / "strict", SitePolicy(), TWENTY, neighbours=12))
    assert refused.value.rule == "min_neighbours"


def test_two_stories_among_twenty_give_nothing_to_less_than_a_third(tmp_path: Path) -> None:
    with pytest.raises(SecureSumError, match="6 shares of a secret, 14 are needed"):  # those of the colluding
        two_stories_among_twenty(parties(tmp_path, SitePolicy(), TWENTY))


@pytest.mark.parametrize("sites", range(3, 120))
def test_two_sets_that_enough_sites_confirm_share_more_than_a_third_of_them(sites: int) -> None:
    assert 3 * threshold(sites, SitePolicy().min_sum_threshold) > 2 * sites


def test_a_site_that_says_it_adds_metrics_cannot_be_made_to_say_otherwise(tmp_path: Path) -> None:
    chosen = parties(tmp_path, SitePolicy())
    chosen.run(until="advertise")
    steps = chosen.collector.share()
    swapped = [keys.model_copy(update={"metrics": keys.site != "beta"}) for keys in steps["alpha"].keys]
    with pytest.raises(SecureSumError, match="the keys of beta are not those that it signed"):
        chosen.answer("alpha", steps["alpha"].model_copy(update={"keys": swapped}))


@pytest.mark.parametrize(
    ("stage", "change"),
    [("mask", {"senders": FIVE[:4]}), ("confirm", {"survivors": FIVE[:4]})],
)
def test_a_sum_of_fewer_sites_than_the_policy_asks_for_is_not_helped_with(
    tmp_path: Path, stage: str, change: dict[str, list[str]]
) -> None:
    chosen = parties(tmp_path, SitePolicy(min_sites_in_sum=5))
    chosen.run(until="share" if stage == "mask" else "mask")
    step: Step = (chosen.collector.mask() if stage == "mask" else chosen.collector.confirm(1))["alpha"]
    with pytest.raises(PolicyError) as refused:
        chosen.answer("alpha", step.model_copy(update=change))
    assert refused.value.rule == "min_sites_in_sum"


IMAGES = (3000, 300, 250)


def encoded(cfg: SecureAggregationConfig, size: float) -> list[SumVector]:
    """Vectors of a large and two small sites; `size` is the deviation of a parameter's difference."""
    codec = UpdateCodec(cfg, 20_000, 0, 2, len(IMAGES))
    vectors = []
    for number, images in enumerate(IMAGES):
        drawn = (np.random.default_rng(number).standard_normal(20_000) * size).astype(np.float32)
        empty = np.zeros(0, np.float32)
        vectors.append(codec.encode(ModelArrays(drawn, empty), TrainingSums(images, images, 0, 0.0, (images, 0))))
    return vectors


def places_of_the_largest(vectors: list[SumVector]) -> float:
    """In how many places, as a share, the sum is the largest site's word."""
    total = vectors[0].body + vectors[1].body + vectors[2].body
    return float((total == vectors[0].body).mean())


def test_a_clip_norm_that_rounds_the_small_sites_away_is_not_accepted() -> None:
    for rule in (broken_term(SitePolicy(), terms(clip_norm=1e5)), broken_term(SitePolicy(), terms(clip_norm=1e5), 3)):
        assert rule is not None and rule[0] == "max_sum_step"
    with pytest.raises(SecureSumError, match="rounding leaves"):
        encoded(terms(clip_norm=1e5, max_examples=65536), 3e-5)
    accepted = terms(clip_norm=3e4)
    assert broken_term(SitePolicy(), accepted, 3) is None
    with pytest.raises(SecureSumError, match="rounding leaves"):  # what the ceiling lets through is judged on the update itself
        encoded(accepted, 1e-5)
    assert places_of_the_largest(encoded(accepted, 1e-4)) < 0.3
    assert places_of_the_largest(encoded(terms(), 1e-4)) < 0.01


@pytest.mark.parametrize("most", [1, 100, 2048, 2**20])
def test_the_largest_site_is_at_most_half_of_the_mean_whatever_max_examples_is(most: int) -> None:
    cfg = terms(max_examples=most)
    codec = UpdateCodec(cfg, 1, 0, 2, 3)
    weights = [codec.weight(images) for images in IMAGES]
    assert max(weights) <= sum(weights) / 2
    rule = broken_term(SitePolicy(), terms(max_examples=most, largest_weight=0.9))
    assert rule is not None and rule[0] == "max_weight_in_sum"


def test_equal_weights_are_too_much_where_the_policy_asks_for_more_sites() -> None:
    assert largest_share(terms(largest_weight=0.1), 5) == pytest.approx(1 / 4)
    rule = broken_term(SitePolicy(max_weight_in_sum=0.1), terms(largest_weight=0.1), 5)
    assert rule is not None and rule[0] == "max_weight_in_sum"


def test_few_neighbours_are_refused_and_small_sums_need_all() -> None:
    rule = broken_term(SitePolicy(), terms(neighbours=4), 60)
    assert rule is not None and rule[0] == "min_neighbours"
    assert broken_term(SitePolicy(), terms(clip_norm=10.0), 60) is None
    assert broken_term(SitePolicy(min_neighbours=40), terms(), 5) is None


def federation(folder: Path, sites: int, policies: dict[int, dict[str, Any]]) -> TinyFederation:
    made = TinyFederation(folder, sites=sites)
    made.give_identities()
    for number, policy in policies.items():
        site, file = made.sites / f"{number}.yaml", made.sites / f"site-{number}" / "policy.yaml"
        file.write_text(yaml.safe_dump({"min_patients": 2, **policy}))
        site.write_text(f"{site.read_text()}policy: {file}\n")
    return made


def round_of(made: TinyFederation, name: str) -> RoundRecord:
    (only,) = RunFolder(made.folder / name).read_history()
    return only


def experiment(**changes: Any) -> Any:
    secure = {"enabled": True, "stage_timeout_sec": 5.0, **changes}
    return tiny_experiment(rounds=1, secure_aggregation=secure)


@pytest.mark.parametrize(("sites", "judged"), [(4, None), (5, ("site-2", "site-3", "site-4"))])
def test_sites_that_withhold_are_not_counted_as_if_they_had_added_something(
    tmp_path: Path, sites: int, judged: tuple[str, ...] | None
) -> None:
    quiet = {"withhold": ["validation_statistics", "training_metrics"]}
    made = federation(tmp_path, sites, {0: quiet, 1: quiet})
    made.run("run", experiment())
    record = round_of(made, "run")
    assert there(record.secure_sum).summed == tuple(f"site-{number}" for number in range(sites))
    assert there(record.secure_sum).train_loss is None  # else it were the loss of the others
    assert (record.secure_validation.summed if record.secure_validation else None) == judged


def test_a_hidden_number_of_images_is_not_found_by_bisection(tmp_path: Path) -> None:
    made = federation(tmp_path, 3, {})
    for most in (1, 4, 8):
        made.run(f"most-{most}", experiment(max_examples=most))
        record = round_of(made, f"most-{most}")
        assert not record.failures and there(record.secure_sum).summed == ("site-0", "site-1", "site-2")


def test_terms_that_a_policy_refuses_are_answered_by_nobody(tmp_path: Path) -> None:
    made = federation(tmp_path, 3, {0: {}, 1: {}, 2: {}})
    with pytest.raises(RoundError, match="min_sum_threshold"):
        made.run("run", experiment(threshold=0.51))


HARMLESS = {
    "audit_head": "a site writes it into its log, and into nothing that leaves",
    "held": "stands for `arrays`, which the site hashes as it has them",
    "averaged": "says how the site makes `arrays`, which it hashes as it has them",
    "latest": "never travels, and nothing is computed from it",
    "counted": "is read by strategies with a correction, which secure_aggregation refuses",
    "variate": "is read by strategies with a correction, which secure_aggregation refuses",
}
"""Fields of an instruction that may differ between the sites of a sum, and why that tells nothing."""
ARRAYS = ModelArrays(np.zeros(5, np.float32), np.zeros(2, np.float32))
SUMMED = {
    "rounds": 8,
    "secure_aggregation": {"enabled": True},
    "training": {"schedule": "plateau"},
    "evaluation": {"hospital_reference": True},
}


def mask_step(identifier: str) -> str:
    return Step.model_validate({"stage": "mask", "purpose": "train", "identifier": identifier}).model_dump_json()


def asked_for(**changes: Any) -> Instruction:
    return replace(Instruction(tiny_experiment(**SUMMED), 16 * "0", 2, ARRAYS, step=mask_step(32 * "0")), **changes)


def changed_instructions() -> dict[str, Instruction]:
    """For each field an instruction that differs from `asked_for()` in it alone."""
    images, features = np.random.default_rng(0).random((8, 32, 32), np.float32), np.ones((8, 4), np.float32)
    changes = {
        "experiment": tiny_experiment(**SUMMED, seed=7),
        "run": 16 * "1",
        "round": 3,
        "arrays": ModelArrays(np.ones(5, np.float32), ARRAYS.statistics),
        "step": mask_step(32 * "1"),
        "rate_factor": 1e-4,
        "suitability": fit_suitability(images, features, np.zeros((8, 1), np.float32)),
        "first": ARRAYS,
        "other": ARRAYS,
        "survey": ("age",),
        "clinical": True,
    }
    return {name: asked_for(**{name: value}) for name, value in changes.items()}


def test_what_a_vector_depends_on_is_in_its_masks_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one site is asked differently from the others, in any field, gives no sum with theirs."""
    made = TinyFederation(tmp_path, sites=1)
    made.give_identities()
    site, bound = read_site_config(made.sites / "0.yaml"), list[tuple[SumSession, str]]()

    def note(self: Participant, step: Step, subject: str) -> MaskPlan:
        bound.append((self.session, subject))
        return MaskPlan(3, ())

    monkeypatch.setattr(Participant, "begin_masking", note)

    def ask(instruction: Instruction) -> None:
        instruction, _ = read_request(pack_instruction(instruction), "train", site)
        with masking(instruction, site, UNRESTRICTED, "train"):
            pass

    ask(asked_for())
    ask(asked_for())
    assert bound[0] == bound[1]
    changed = changed_instructions()
    refused = {"first", "other", "survey", "clinical"}
    assert {*changed, *HARMLESS} == {field.name for field in fields(Instruction)}
    for name, instruction in changed.items():
        if name in refused:
            with pytest.raises(MessageError):
                ask(instruction)
        else:
            ask(instruction)
    assert len(set(bound)) == 1 + len(set(changed) - refused)


@pytest.mark.parametrize("strategy", CORRECTED)
def test_no_strategy_with_a_correction_is_summed_under_masks(strategy: str) -> None:
    with pytest.raises(ConfigError, match="looks at single updates"):
        tiny_experiment(secure_aggregation={"enabled": True}, strategy={"name": strategy}, training={"optimizer": "sgd"})
