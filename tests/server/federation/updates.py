"""Updates and replies for the tests of the server."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from pneumofed.common.config.experiment import ModelConfig
from pneumofed.common.models.build import build_model
from pneumofed.common.wire.messages import ModelArrays, Presence, Update, pack_update
from pneumofed.common.wire.parameter_layout import ArraysLayout

LAYOUT = ArraysLayout.of(build_model(ModelConfig(name="small_cnn"), "binary", seed=0))


def take_identity() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def zeros() -> ModelArrays:
    return ModelArrays(np.zeros(LAYOUT.parameter_count, np.float32), np.zeros(LAYOUT.statistic_count, np.float32))


def small_update(site: str, values: Sequence[float], statistics: Sequence[float] = (1.0,), num_examples: int = 10) -> Update:
    arrays = ModelArrays(np.array(values, dtype=np.float32), np.array(statistics, dtype=np.float32))
    return Update.of(Presence(site, "layout", {"train": num_examples}), arrays, num_examples, {})


def full_update(site: str, scale: float = 0.01, num_examples: int = 10) -> Update:
    """An update of the tiny network: `scale` times standard normal numbers, variances one."""
    generator = np.random.default_rng(sum(map(ord, site)))
    parameters = (scale * generator.standard_normal(LAYOUT.parameter_count)).astype(np.float32)
    statistics = np.ones(LAYOUT.statistic_count, np.float32)
    return Update.of(
        Presence(site, LAYOUT.digest, {"train": num_examples}), ModelArrays(parameters, statistics), num_examples, {}
    )


def as_reply(update: Update) -> Message:
    take_identity()
    request = Message(RecordDict(), dst_node_id=1, message_type="train")
    return Message(pack_update(update), reply_to=request)
