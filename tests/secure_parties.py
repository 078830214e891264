"""Sites and a coordinator of a secure sum without network, model or data, and everything that the coordinator sees."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import RecordDict

from pneumofed.client.federation.policy import UNRESTRICTED
from pneumofed.client.secure_aggregation.memory import Identity, MemoryFolder
from pneumofed.client.secure_aggregation.participant import Participant
from pneumofed.common.config.experiment import SecureAggregationConfig
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.secure_aggregation.key_agreement import KeyDirectory, issue_roster, read_roster
from pneumofed.common.secure_aggregation.masking import SumShape, SumVector
from pneumofed.common.secure_aggregation.protocol import Step, SumSession, pack_masked, pack_reply
from pneumofed.common.wire.keys import format_public_key
from pneumofed.common.wire.messages import Presence
from pneumofed.server.secure_aggregation.collector import Collector

SHAPE = SumShape(4096, 8, 32)
MODEL = "hash of the weights"


@dataclass
class Parties:
    """`names` with node keys and a signed roster, in one session. `vectors` are what the sites sum."""

    folder: Path
    names: list[str]
    cfg: SecureAggregationConfig = field(default_factory=lambda: SecureAggregationConfig(enabled=True))
    vectors: Mapping[str, SumVector] = field(default_factory=dict)
    session: SumSession = field(default_factory=lambda: SumSession.begin("run", 1, "train", "settings"))
    shape: SumShape = SHAPE
    models: dict[str, str] = field(default_factory=dict)
    """Hash of the weights that a site was given, where they are others."""
    policy: SitePolicy = UNRESTRICTED

    def __post_init__(self) -> None:
        self.authority = ec.generate_private_key(ec.SECP384R1())
        self.node_keys = {name: ec.generate_private_key(ec.SECP384R1()) for name in self.names}
        self.sites = {name: self.site(name, self.session) for name in self.names}
        self.seen: dict[str, RecordDict] = {}
        self.collector = self.new_collector(self.session)

    def roster(self, serial: int = 1) -> KeyDirectory:
        keys = {name: format_public_key(key.public_key(), name) for name, key in self.node_keys.items()}
        return read_roster(issue_roster("test", keys, serial, self.authority), self.authority.public_key())

    def new_collector(self, session: SumSession) -> Collector:
        return Collector(session, self.cfg, self.roster(), lambda *_: self.shape, MODEL)

    def site(self, name: str, session: SumSession) -> Participant:
        identity = Identity(name, self.node_keys[name], self.authority.public_key())
        return Participant(identity, MemoryFolder(str(self.folder / name)), self.cfg, session, self.policy)

    def answer(self, name: str, step: Step) -> RecordDict:
        """The site's reply, through JSON as on the wire."""
        step, site, presence = Step.model_validate_json(step.model_dump_json()), self.sites[name], Presence(name, "")
        if step.stage == "mask":
            plan, own = site.begin_masking(step, self.models.get(name, MODEL)), self.vectors.get(name, self.shape.zeros())
            vector = SumVector(own.body.copy(), own.tail.copy())
            plan.hide(vector)
            return pack_masked(presence, vector)
        return pack_reply(presence, getattr(site, step.stage)(step))

    def ask(self, steps: Mapping[str, Step], take: Callable[[str, RecordDict], None], lost: Collection[str] = ()) -> None:
        for name, step in steps.items():
            if name not in lost:
                content = self.answer(name, step)
                self.seen[f"{step.stage} {name}"] = content
                take(name, content)

    def run(self, until: str = "unmask", lost: Mapping[str, str] | None = None) -> SumVector | None:
        """Plays the protocol to the end of the step `until`; `lost` maps sites to the first step that they do not answer."""
        collector, order = self.collector, ["advertise", "share", "mask", "confirm", "unmask"]
        moves: list[tuple[Callable[[], Mapping[str, Step]], Any]] = [
            (lambda: collector.advertise(self.names), collector.take_keys),
            (collector.share, collector.take_parcels),
            (collector.mask, collector.take_vector),
            (lambda: collector.confirm(1), collector.take_confirmation),
            (collector.unmask, collector.take_shares),
        ]
        for number, (steps, take) in enumerate(moves[: order.index(until) + 1]):
            gone = {name for name, stage in (lost or {}).items() if order.index(stage) <= number}
            self.ask(steps(), take, gone)
        return collector.finish() if until == "unmask" else None


def random_vector(seed: int, largest: int = 1000) -> SumVector:
    generator, empty = np.random.default_rng(seed), SHAPE.zeros()
    return SumVector(*(generator.integers(0, largest, len(part)).astype(part.dtype) for part in (empty.body, empty.tail)))


def plain_sum(vectors: Collection[SumVector]) -> SumVector:
    total = SHAPE.zeros()
    for vector in vectors:
        total.add(vector)
    return total


def body_bytes(content: RecordDict) -> bytes:
    return content.array_records["masked"]["body"].numpy().tobytes()
