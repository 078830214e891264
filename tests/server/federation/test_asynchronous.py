"""Asynchronous rounds are FedBuff, repeat, resume, and wait for nobody in particular."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from pneumofed.client.app import app as client_app
from pneumofed.client.federation.held_model import restore_model
from pneumofed.client.federation.site_data import find_site_config, read_site_config
from pneumofed.client.privacy.ledger import open_ledger
from pneumofed.common.audit.log import read_entries
from pneumofed.common.config.choices import StrategyName
from pneumofed.common.errors import ConfigError, RoundError
from pneumofed.common.wire.instructions import unpack_instruction
from pneumofed.common.wire.messages import ModelArrays, Presence, pack_update, unpack_update
from pneumofed.server.federation.asynchronous import BufferedRounds, VirtualClock, rebase, staleness_weight
from pneumofed.server.federation.messaging import Messenger
from pneumofed.server.federation.replies import UpdateChecks
from pneumofed.server.runs.events import EVENTS_FILE, Activity, Kind, describe_event, read_activity
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.status import waiting_for
from tests.server.federation.test_messaging import NEVER, SlowGrid
from tests.server.federation.test_run import Killed, MeddlingApp, assert_same, history, weights, with_arrays
from tests.server.federation.updates import LAYOUT, as_reply, full_update, small_update, take_identity, zeros
from tests.tiny import TinyFederation, draw_manifest, tiny_experiment

SLOW = {"site-3": 2.5}


class Trained(NamedTuple):
    """One training: what it began from, what came of it, and the images."""

    base: ModelArrays
    result: ModelArrays
    images: int


class Recording(ClientApp):
    """The real ClientApp; keeps each training by site and round, and ends the run at the `deadly`-th of them."""

    def __init__(self, deadly: int = 0) -> None:
        super().__init__()
        self.trained: dict[tuple[str, int], Trained] = {}
        self.deadly = deadly

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type != "train":
            return client_app(message, context)
        if self.deadly == len(self.trained) + 1:
            raise Killed
        site = find_site_config(context.node_config, context.run_config)
        asked = restore_model(site, unpack_instruction(message.content))
        reply = client_app(message, context)
        update = unpack_update(reply.content, asked.weights, "float32")
        self.trained[site.name, asked.round] = Trained(asked.weights, update.arrays, update.num_examples)
        return reply


def fedbuff(trained: Mapping[tuple[str, int], Trained], slow: Mapping[str, float], buffer: int, rounds: int) -> np.ndarray:
    """Algorithm 1 of Nguyen et al. 2022 in float64, weighted by images, its sites as slow as `slow` says; the weights at the end."""
    sites = sorted({site for site, _ in trained})
    current = trained[sites[0], 1].base.parameters.astype(np.float64)
    ends = {site: (slow.get(site, 1.0), 0) for site in sites}
    for version in range(rounds):
        total, images, waiting = np.zeros_like(current), 0, []
        for _ in range(buffer):
            site = min(ends, key=lambda name: (ends[name][0], name))
            now, begun = ends.pop(site)
            one = trained[site, begun + 1]
            difference = one.result.parameters.astype(np.float64) - one.base.parameters
            total += one.images * difference / np.sqrt(1 + version - begun)
            images += one.images
            waiting.append(site)
        current = current + total / images
        ends |= {site: (now + slow.get(site, 1.0), version + 1) for site in waiting}
    return current


def test_the_weights_are_those_of_fedbuff(tmp_path: Path) -> None:
    federation, app = TinyFederation(tmp_path, sites=3), Recording()
    federation.add_site(3, draw_manifest(tmp_path / "larger", 14, seed=3))
    experiment = tiny_experiment(rounds=5, strategy={"buffer": 2}, training={"schedule": "constant", "warmup_fraction": 0.0})
    federation.run("run", experiment, grid=federation.grid(app), slow=SLOW)
    np.testing.assert_allclose(weights(federation, "run").parameters, fedbuff(app.trained, SLOW, 2, 5), rtol=1e-5, atol=1e-6)
    found = history(federation, "run")
    assert [len(line.staleness) for line in found] == [2] * 5
    assert max(line.staleness.get("site-3", 0) for line in found) > 1
    assert all(line.trained == list(line.staleness) for line in found)


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_a_buffer_of_all_sites_is_a_synchronous_round_bit_for_bit(tmp_path: Path, strategy: StrategyName) -> None:
    federation = TinyFederation(tmp_path)
    federation.run("rounds", tiny_experiment(strategy={"name": strategy}))
    federation.run("buffer", tiny_experiment(strategy={"name": strategy, "buffer": 3}), slow={"site-1": 7.0})
    assert_same(weights(federation, "rounds"), weights(federation, "buffer"))
    measured = [[line.measured for line in history(federation, name)] for name in ("rounds", "buffer")]
    assert measured[0] == measured[1]


def test_time_goes_by_the_virtual_clock_in_synchronous_rounds_too(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path, sites=2)
    federation.run("rounds", tiny_experiment(), slow={"site-1": 10.0})
    federation.run("buffer", tiny_experiment(rounds=3, strategy={"buffer": 1}), slow={"site-1": 10.0})
    federation.run("real", tiny_experiment(rounds=1, strategy={"buffer": 2}))
    times = {name: [line.simulated_time for line in history(federation, name)] for name in ("rounds", "buffer", "real")}
    assert times == {"rounds": [10.0, 20.0], "buffer": [1.0, 2.0, 3.0], "real": [None]}


def test_a_killed_run_goes_on_from_the_last_applied_buffer(tmp_path: Path) -> None:
    """Wherever in the round it was killed: what was in the buffer is made again."""
    experiment, federation = (
        tiny_experiment(rounds=4, strategy={"buffer": 2, "name": "fedavgm"}),
        TinyFederation(tmp_path, sites=4),
    )
    for name, deadly in (("early", 5), ("late", 6)):
        with pytest.raises(Killed):
            federation.run(name, experiment, grid=federation.grid(Recording(deadly)), slow=SLOW)
        assert RunFolder(tmp_path / name).read_summary().status == "stopped"
        before = history(federation, name)
        assert [line.round for line in before] == [1, 2]
        app = Recording()
        assert federation.run(name, experiment, grid=federation.grid(app), slow=SLOW, resume=True).status == "succeeded"
        found = history(federation, name)
        assert [line.round for line in found] == [1, 2, 3, 4] and found[:2] == before
        assert set(found[2].staleness.values()) == {0} and found[2].simulated_time == (before[1].simulated_time or 0) + 1
        assert min(number for _, number in app.trained) == 3
    assert_same(weights(federation, "early"), weights(federation, "late"))


def test_each_training_is_spent_once_and_no_site_spends_more_than_was_planned(tmp_path: Path) -> None:
    private = {"mechanism": "dp_sgd", "noise_multiplier": 1.0, "expected_batch_size": 6}
    changes: dict[str, Any] = {"model": {"norm": "group"}, "loss": {"logit_adjustment": False}, "privacy": private}
    experiment, federation = tiny_experiment(rounds=3, strategy={"buffer": 2}, **changes), TinyFederation(tmp_path)
    app = Recording(6)
    with pytest.raises(Killed):
        federation.run("run", experiment, grid=federation.grid(app), slow={"site-2": 2.5})
    again = Recording()
    federation.run("run", experiment, grid=federation.grid(again), slow={"site-2": 2.5}, resume=True)
    for number in range(3):
        site, ledger = f"site-{number}", open_ledger(read_site_config(federation.sites / f"{number}.yaml"))
        begun = [*app.trained, *again.trained]
        spent = sorted(found.entry.round for lineage in ledger.lineages() for found in lineage.entries)
        assert spent == sorted(round_number for name, round_number in begun if name == site)
        rounds = [round_number for name, round_number in app.trained if name == site]
        assert len(rounds) == len(set(rounds)) <= experiment.rounds


def test_a_hostile_site_does_not_hold_the_buffer_up_and_has_no_effect(tmp_path: Path) -> None:
    """It is left out of each round, and the others fill the buffer by themselves."""
    federation, experiment = TinyFederation(tmp_path, sites=4), tiny_experiment(strategy={"buffer": 3})
    app = MeddlingApp(1, lambda reply: with_arrays(reply, lambda values: values * 1000))
    federation.run("run", experiment, grid=federation.grid(app), slow={})
    for line in history(federation, "run"):
        assert set(line.staleness) == {"site-0", "site-2", "site-3"} and set(line.left_out) == {"site-1"}
    (federation.sites / "1.yaml").unlink()
    federation.run("without", experiment, slow={})
    assert_same(weights(federation, "run"), weights(federation, "without"))


def test_a_site_whose_policy_refuses_is_named_and_a_buffer_that_nobody_is_left_to_fill_is_applied(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path, sites=3)
    policy = tmp_path / "policy.yaml"
    laxest = {"min_patients": 1, "min_validation_patients": 1, "min_validation_share": 0.01, "max_validation_share": 0.9}
    policy.write_text(yaml.safe_dump({**laxest, "max_rounds_per_day": 1}))
    file = federation.sites / "1.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "policy": str(policy)}))
    audit = tmp_path / "audit.jsonl"
    federation.run("run", tiny_experiment(rounds=3, strategy={"buffer": 3}), slow={}, audit_log=audit)
    found = history(federation, "run")
    assert set(found[0].staleness) == {"site-0", "site-1", "site-2"}
    for line in found[1:]:
        assert set(line.staleness) == {"site-0", "site-2"} and "max_rounds_per_day" in line.failures["site-1"]
    lines = [entry for entry in read_entries(audit) if "participants" in entry.facts]
    assert [entry.facts["participants"] for entry in lines] == [sorted(line.staleness) for line in found]
    assert [entry.facts["staleness"] for entry in lines] == [dict(line.staleness) for line in found]


def test_fewer_updates_than_min_sites_fail_the_run_and_say_who_and_why(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path)
    app = MeddlingApp(1, lambda reply: with_arrays(reply, lambda values: values * np.float32(np.nan)))
    experiment = tiny_experiment(strategy={"min_sites": 3, "buffer": 3})
    with pytest.raises(RoundError, match=r"2 good updates, 3 are needed.*site-1.*not finite"):
        federation.run("run", experiment, grid=federation.grid(app), slow={})


class Forgetful(ClientApp):
    """The real ClientApp at sites that lose the model they keep between evaluation and training."""

    def __init__(self, sites: Path) -> None:
        super().__init__()
        self.sites, self.refused = sites, 0

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            for path in self.sites.glob("site-*/held-model-*"):
                path.unlink()
        reply = client_app(message, context)
        self.refused += reply.has_error()
        return reply


def test_a_site_that_lost_the_model_gets_it_whole(tmp_path: Path) -> None:
    federation, experiment = TinyFederation(tmp_path), tiny_experiment(rounds=3, strategy={"buffer": 2})
    app = Forgetful(federation.sites)
    federation.run("lost", experiment, grid=federation.grid(app), slow={})
    federation.run("kept", experiment, slow={})
    assert app.refused > 0
    assert_same(weights(federation, "lost"), weights(federation, "kept"))


def test_what_waits_for_whom_can_be_read_while_it_runs(tmp_path: Path) -> None:
    federation = TinyFederation(tmp_path, sites=3)
    with pytest.raises(Killed):
        federation.run(
            "run",
            tiny_experiment(rounds=4, strategy={"buffer": 2}),
            grid=federation.grid(Recording(5)),
            slow={"site-2": 2.5},
        )
    events = read_activity(tmp_path / "run" / EVENTS_FILE)
    assert waiting_for(events) == (3, ["site-0", "site-1", "site-2"])
    begun = [event for event in events if event["kind"] == Kind.ROUND_STARTED]
    assert [event["at_work"] for event in begun] == [[], ["site-2"], ["site-2"]] and "deadline_sec" not in begun[0]
    stale = {"kind": Kind.ANSWERED, "round": 3, "site": "north", "task": "train", "staleness": 2}
    assert describe_event(stale) == "north answered for training, from the weights of 2 rounds before"


class AnsweringGrid(SlowGrid):
    """Each node answers with an update of its own."""

    def reply(self, message: Message) -> Message:
        return Message(pack_update(full_update(f"site-{message.metadata.dst_node_id}")), reply_to=message)


def silent_round(tmp_path: Path, delays: Mapping[int, float], buffer: int) -> tuple[BufferedRounds, UpdateChecks, dict[str, Any]]:
    """A round with one site for each of `delays`, in seconds; a message is given up after 0.3 s."""
    take_identity()
    cfg = tiny_experiment(strategy={"buffer": buffer, "round_timeout_sec": 0.1}).strategy
    messenger = Messenger(AnsweringGrid(delays), Activity(tmp_path / EVENTS_FILE))
    buffered = BufferedRounds(messenger, cfg)
    sites = {f"site-{node}": Presence(f"site-{node}", LAYOUT.digest, {"train": 10}) for node in delays}
    checks = UpdateChecks(zeros(), LAYOUT, sites, cfg)
    messages = {f"site-{node}": Message(as_reply(full_update("x")).content, node, "train") for node in delays}
    return buffered, checks, buffered.fill(1, messages, zeros(), checks)


def test_a_silent_site_is_not_waited_for_and_is_no_failure_yet(tmp_path: Path) -> None:
    buffered, checks, failures = silent_round(tmp_path, {0: 0.0, 1: 0.0, 2: NEVER}, buffer=2)
    assert set(checks.updates) == {"site-0", "site-1"} and not failures
    assert buffered.messenger.busy == {"site-2"} and buffered.free == ["site-0", "site-1"]
    buffered.release()
    assert not buffered.messenger.busy


def test_a_site_that_stays_silent_is_given_up_and_the_buffer_applied_without_it(tmp_path: Path) -> None:
    started = time.monotonic()
    buffered, checks, failures = silent_round(tmp_path, {0: 0.0, 1: 0.0, 2: NEVER, 3: -1.0}, buffer=4)
    assert time.monotonic() - started >= 0.3
    assert set(checks.updates) == {"site-0", "site-1"}
    assert {site: failure.error for site, failure in failures.items()} == {"site-2": "Timeout", "site-3": "Unreachable"}
    assert not buffered.working and buffered.free == buffered.taking_part == ["site-0", "site-1", "site-2", "site-3"]


def test_a_stale_update_is_scaled_and_its_statistics_stay_measurements() -> None:
    base, current = (ModelArrays(np.full(2, value, np.float32), np.array([value], np.float32)) for value in (1.0, 5.0))
    update = small_update("north", [3.0, 1.0], statistics=[0.5])
    assert rebase(update, base, current, 0) is update
    moved = rebase(update, base, current, 3).arrays
    assert moved.parameters.tolist() == [6.0, 5.0] and moved.statistics.tolist() == [2.75]
    slower = rebase(update, base, current, 3, 0.5).arrays
    assert slower.parameters.tolist() == [5.5, 5.0] and slower.statistics.tolist() == [2.75]
    assert rebase(update, base, current, 3, fixed_statistics=True).arrays.statistics.tolist() == [5.0]
    assert [staleness_weight(rounds) for rounds in (0, 3, 8)] == pytest.approx([1.0, 0.5, 1 / 3])


def test_a_stale_update_is_brought_to_a_rate_that_has_fallen_and_is_not_called_too_long(tmp_path: Path) -> None:
    """A site begins in round 1, and is done in round 3, at a twentieth of the rate; its update is 14 times as long as the others'."""
    buffered, checks, _ = silent_round(tmp_path, {0: 0.0, 1: 0.0, 2: NEVER}, buffer=2)
    buffered.rate = [0.0, 1.0, 1.0, 0.05].__getitem__
    ((identifier, late),) = buffered.working.items()
    reply = Message(pack_update(full_update("site-2", scale=0.14)), reply_to=late.message)
    reply.metadata.__dict__["_reply_to_message_id"] = identifier
    buffered._take(reply, 3, checks)
    assert checks.lengths["site-2"] < checks.lengths["site-0"] and not checks.close()[1]
    fresh, staleness = buffered.as_if_fresh({"site-2": checks.updates["site-2"]}, late.base, 3, fixed_statistics=False)
    expected = 0.05 / np.sqrt(3) * checks.updates["site-2"].arrays.parameters
    np.testing.assert_allclose(fresh["site-2"].arrays.parameters, expected, rtol=1e-5)
    assert staleness == {"site-2": 2}


def test_a_virtual_round_ends_with_its_slowest_site() -> None:
    clock = VirtualClock({"b": 4.0}, now=2.0)
    clock.wait_for([])
    assert clock.now == 2.0
    clock.wait_for(["a", "b"])
    assert clock.now == 6.0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"secure_aggregation": {"enabled": True}}, "mask their updates of one round for each other"),
        ({"central_privacy": {"enabled": True}, "model": {"norm": "group"}}, "number of sites that a round asked"),
        ({"strategy": {"enough_sites": 2}}, "leave one of the two out"),
        ({"strategy": {"fraction_train": 0.5}}, "draws the sites of a round"),
        ({"strategy": {"min_sites": 3}}, "3 good updates a round: take a larger buffer"),
        ({"strategy": {"name": "krum", "malicious_sites": 1}}, "5 good updates a round"),
        *(
            ({"strategy": {"name": name}, "training": {"optimizer": "sgd"}}, "steps from the same weights")
            for name in ("fedexp", "fednova", "scaffold", "feddyn")
        ),
    ],
)
def test_what_needs_synchronous_rounds_is_refused_with_the_reason(changes: dict[str, Any], told: str) -> None:
    changes = {**changes, "strategy": {"buffer": 2, **changes.get("strategy", {})}}
    with pytest.raises(ConfigError, match=rf"strategy\.buffer is 2 but .*{told}"):
        tiny_experiment(**changes)
