"""What a secure sum of ResNet18's 11.2 million parameters costs beside a plain round: bytes, and seconds of one CPU core.

    python -m benchmarks.secure_aggregation --sites 3 10 30

Site after site in this process, so that one vector at a time is in memory; training is a vector of random numbers. All keys, signatures,
shares, parcels and masks are those of a real round. Times are of the CPU, without network: five exchanges take the place of one, each of
which costs the transport's own delay (see `benchmarks.tls_round`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import RecordDict

from pneumofed.common.config.experiment import SecureAggregationConfig, StrategyConfig
from pneumofed.common.secure_aggregation.masking import ALL_PAIRS_UP_TO, SumVector
from pneumofed.common.secure_aggregation.protocol import REPLY_RECORD, Step, pack_masked
from pneumofed.common.secure_aggregation.quantization import TrainingSums, UpdateCodec
from pneumofed.common.wire.messages import ModelArrays, Presence, Update, content_bytes
from pneumofed.server.federation.strategies import aggregate, build_strategy
from pneumofed.server.runs.folder import describe_environment
from tests.secure_parties import MODEL, Parties
from tests.server.federation.updates import take_identity

PARAMETERS, STATISTICS, CLASSES = 11_171_266, 9_600, 2
"""Of ResNet18 with one input channel and two classes."""
IMAGES = 500


@dataclass
class Meter:
    """CPU seconds by what was done, and bytes by way."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds[what] += time.process_time() - started


def random_update(seed: int) -> ModelArrays:
    generator = np.random.default_rng(seed)
    parameters = generator.standard_normal(PARAMETERS, dtype=np.float32) * np.float32(1e-3)
    return ModelArrays(parameters, generator.standard_normal(STATISTICS, dtype=np.float32))


def plain_round(sites: int) -> Meter:
    """The strategy's arithmetic over one and the same update under `sites` names."""
    meter, strategy = Meter(), build_strategy(StrategyConfig())
    update = Update.of(Presence("site", ""), random_update(0), IMAGES, {})
    with meter.measure("coordinator"):
        aggregate(strategy, 1, [update] * sites)
    meter.bytes["up"] = meter.bytes["down"] = sites * update.nbytes
    return meter


@dataclass
class SecureRound:
    """One secure round of `sites`, of which one drops out before its vector where `drop` says so."""

    folder: Path
    sites: int
    neighbours: int | None = None
    drop: bool = False
    meter: Meter = field(default_factory=Meter)

    def run(self) -> Meter:
        names = [f"site-{number:03d}" for number in range(self.sites)]
        cfg = SecureAggregationConfig(enabled=True, neighbours=self.neighbours)
        self.codec = UpdateCodec(cfg, PARAMETERS, STATISTICS, CLASSES, self.sites)
        self.parties = Parties(self.folder, names, cfg, shape=self.codec.shape)
        collector = self.parties.collector
        self.model_bytes = 4 * (PARAMETERS + STATISTICS)
        self._stage(lambda: collector.advertise(names), collector.take_keys)
        self._stage(collector.share, collector.take_parcels)
        self._stage(collector.mask, collector.take_vector)
        self._stage(lambda: collector.confirm(1), collector.take_confirmation)
        self._stage(collector.unmask, collector.take_shares)
        with self.meter.measure("coordinator"):
            mean = self.codec.decode(collector.finish())
        assert mean.sums.images == IMAGES * len(collector.summed)
        return self.meter

    def _stage(self, steps: Callable[[], Mapping[str, Step]], take: Callable[[str, RecordDict], None]) -> None:
        with self.meter.measure("coordinator"):
            asked = steps()
        for number, (name, step) in enumerate(asked.items()):
            self.meter.bytes["down"] += len(step.model_dump_json()) + (self.model_bytes if step.stage == "mask" else 0)
            if self.drop and number == 0 and step.stage == "mask":
                continue
            content = self._answer(name, step, number)
            self.meter.bytes["up"] += content_bytes(content)
            if REPLY_RECORD in content.config_records:
                self.meter.bytes["up"] += len(str(content.config_records[REPLY_RECORD]["reply"]))
            with self.meter.measure("coordinator"):
                take(name, content)

    def _answer(self, name: str, step: Step, seed: int) -> RecordDict:
        if step.stage != "mask":
            with self.meter.measure(step.stage):
                return self.parties.answer(name, step)
        update = random_update(seed)
        with self.meter.measure("mask"):
            plan = self.parties.sites[name].begin_masking(step, MODEL)
            counts = TrainingSums(IMAGES, IMAGES, IMAGES, 1.0, (IMAGES, 0))
            vector = self.codec.encode(update, counts)
        with self.meter.measure("masks alone"):
            plan.hide(vector)
        return pack_masked(Presence(name, ""), vector)


def mask_seconds(repeats: int = 5) -> float:
    """CPU seconds of one mask over the whole vector: the least of some."""
    vector: SumVector = UpdateCodec(SecureAggregationConfig(), PARAMETERS, STATISTICS, CLASSES, 10).shape.zeros()
    times = []
    for number in range(repeats):
        started = time.process_time()
        vector.add_mask(bytes([number]) * 32)
        times.append(time.process_time() - started)
    return min(times)


def describe(sites: int, what: str, meter: Meter) -> dict[str, Any]:
    """One row: per site where it is a site's, in all where it is the coordinator's."""
    own = {key: value for key, value in meter.seconds.items() if key != "coordinator"}
    return {
        "sites": sites,
        "round": what,
        "site_sec": round(sum(own.values()) / sites, 3),
        "of_it_masks_sec": round(own.get("masks alone", 0.0) / sites, 3),
        "coordinator_sec": round(meter.seconds["coordinator"], 3),
        "up_mb_a_site": round(meter.bytes["up"] / sites / 1e6, 3),
        "down_mb_a_site": round(meter.bytes["down"] / sites / 1e6, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 10, 30])
    options = parser.parse_args()
    take_identity()
    print(json.dumps({"environment": describe_environment(), "one_mask_sec": round(mask_seconds(), 4)}, indent=1))
    for sites in options.sites:
        print(json.dumps(describe(sites, "plain", plain_round(sites))))
        kinds: list[tuple[str, dict[str, Any]]] = [("secure", {})]
        if sites > 3:  # of three all must stay
            kinds.append(("secure, one drops out", {"drop": True}))
        if sites > ALL_PAIRS_UP_TO:
            kinds.append(("secure, all pairs", {"neighbours": sites + sites % 2}))
        for what, settings in kinds:
            with tempfile.TemporaryDirectory() as name:
                print(json.dumps(describe(sites, what, SecureRound(Path(name), sites, **settings).run())), flush=True)


if __name__ == "__main__":
    main()
