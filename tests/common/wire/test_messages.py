"""The wire: what is packed comes out again, and what does not follow the agreement is refused."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message import array
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import PULL_BACKOFF_CAP, PULL_MAX_TRIES_PER_OBJECT
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.task_identity import TaskIdentity

from pneumofed.common.config.experiment import ExperimentConfig, StrategyConfig, TrainingConfig
from pneumofed.common.errors import ImageError, MessageError, SkipReason
from pneumofed.common.wire.fields import array_values, pack_values
from pneumofed.common.wire.instructions import (
    Instruction,
    pack_instruction,
    unpack_instruction,
    with_average,
    with_held,
    with_step,
)
from pneumofed.common.wire.messages import (
    LONGEST_WAIT_FOR_A_PART_SEC,
    ModelArrays,
    Presence,
    Update,
    build_failure,
    pack_arrays,
    pack_presence,
    pack_update,
    read_failure,
    tune_parts,
    unpack_presence,
    unpack_update,
)
from pneumofed.server.operations.gateway import BODY_LIMITS

ARRAYS = ModelArrays(np.arange(5, dtype=np.float32), np.ones(2, dtype=np.float32))
PRESENCE = Presence("site-1", "abc", {"train": 12})


@pytest.fixture(autouse=True)
def _identity() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def test_an_instruction_comes_out_as_it_went_in() -> None:
    given = Instruction(ExperimentConfig(rounds=3), "00000000000000a7", 2, ARRAYS)
    came = unpack_instruction(pack_instruction(given))
    assert (came.experiment, came.run, came.round) == (given.experiment, "00000000000000a7", 2)
    assert came.arrays is not None
    np.testing.assert_array_equal(came.arrays.parameters, ARRAYS.parameters)


@pytest.mark.parametrize(
    "values",
    [
        ARRAYS.parameters,
        np.zeros(0, np.float32),
        np.arange(6, dtype=np.int8),
        np.arange(12, dtype=np.uint64).reshape(3, 4),
        np.arange(12, dtype=np.float16).reshape(3, 4).T,
        np.arange(9, dtype=np.float64)[::2],
        np.ones((), np.float32),
    ],
)
def test_values_are_packed_as_flower_packs_them(values: np.ndarray) -> None:
    ours, flowers = pack_values(values), Array(np.ascontiguousarray(values) if values.ndim else values)
    assert (ours.dtype, ours.shape, ours.stype, ours.data) == (flowers.dtype, flowers.shape, flowers.stype, flowers.data)
    np.testing.assert_array_equal(array_values(ours, "values"), values)


def test_a_server_variate_and_the_counted_round_come_out_as_they_went_in() -> None:
    given = Instruction(ExperimentConfig(rounds=3), "00000000000000a7", 2, ARRAYS, counted=1, variate=np.full(5, 0.5, np.float32))
    came = unpack_instruction(pack_instruction(given))
    assert came.counted == 1
    np.testing.assert_array_equal(came.variate, given.variate)
    plain = unpack_instruction(pack_instruction(Instruction(ExperimentConfig(), "00000000000000a7", 2, ARRAYS)))
    assert (plain.counted, plain.variate) == (0, None)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"features": 1}', 3])
def test_suitability_tests_that_are_none_are_refused(text: Any) -> None:
    asks = ExperimentConfig.model_validate({"evaluation": {"hospital_reference": True}})
    content = pack_instruction(Instruction(asks, "00000000000000a7", 2, ARRAYS))
    content["config"] = ConfigRecord({**content.config_records["config"], "suitability": text})
    with pytest.raises(MessageError, match="suitability"):
        unpack_instruction(content)


@pytest.mark.parametrize("values", [np.full(5, np.nan, np.float32), np.zeros(5), np.zeros((5, 1), np.float32)])
def test_a_server_variate_that_is_no_finite_vector_is_refused(values: np.ndarray) -> None:
    content = pack_instruction(Instruction(ExperimentConfig(), "00000000000000a7", 2, ARRAYS, variate=values))
    with pytest.raises(MessageError, match="server-variate: expected finite float32"):
        unpack_instruction(content)


@pytest.mark.parametrize("counted", [2, 3, -1, "1"])
def test_a_counted_round_that_is_not_before_this_one_is_refused(counted: Any) -> None:
    content = pack_instruction(Instruction(ExperimentConfig(), "00000000000000a7", 2, ARRAYS))
    content["config"] = ConfigRecord({**content.config_records["config"], "counted": counted})
    with pytest.raises(MessageError, match="round"):
        unpack_instruction(content)


def test_a_reference_stands_for_the_weights_and_is_refused_beside_them() -> None:
    whole = Message(
        pack_instruction(Instruction(ExperimentConfig(), "00000000000000a7", 2, ARRAYS)), dst_node_id=7, message_type="train"
    )
    referring = with_held(whole, "ab" * 32)
    came = unpack_instruction(referring.content)
    assert (came.held, came.arrays) == ("ab" * 32, None)
    assert unpack_instruction(whole.content).held is None
    whole.content["config"] = referring.content.config_records["config"]
    with pytest.raises(MessageError, match="weights or held-model, got both"):
        unpack_instruction(whole.content)


def test_a_rounds_weights_stand_for_their_average_where_an_average_is_asked_for() -> None:
    averaged = ExperimentConfig(strategy=StrategyConfig(ema_decay=0.5))
    for experiment, config, sentence in (
        (averaged, {}, None),
        (averaged, {"average": 7}, "two hashes"),
        (averaged, {"held-model": "ab" * 32}, "weights or held-model"),
        (ExperimentConfig(), {}, "strategy.ema_decay"),
    ):
        whole = Message(
            pack_instruction(Instruction(experiment, "00000000000000a7", 2, ARRAYS)), dst_node_id=7, message_type="evaluate"
        )
        content = with_average(whole, pack_arrays(ARRAYS), "ab" * 32, "cd" * 32).content
        content["config"] = ConfigRecord({**content.config_records["config"], **config})
        if sentence is None:
            assert unpack_instruction(content).averaged == ("ab" * 32, "cd" * 32)
        else:
            with pytest.raises(MessageError, match=sentence):
                unpack_instruction(content)


PLATEAU = ExperimentConfig(rounds=9, training=TrainingConfig(schedule="plateau"))


def test_the_factor_on_the_rate_travels_where_there_is_one_and_through_the_steps_of_a_secure_sum() -> None:
    for factor in (1.0, 0.25):
        content = pack_instruction(Instruction(PLATEAU, "00000000000000a7", 2, ARRAYS, rate_factor=factor))
        assert ("rate-factor" in content.config_records["config"]) == (factor != 1.0)
        assert unpack_instruction(content).rate_factor == factor
        message = Message(content, dst_node_id=7, message_type="train")
        assert unpack_instruction(with_step(message, "{}").content).rate_factor == factor


@pytest.mark.parametrize("wrong", [0.0, -0.5, 1.5, float("nan"), float("inf"), 1, True, "0.5", [0.5]])
def test_a_factor_that_does_not_lower_the_rate_is_refused(wrong: Any) -> None:
    content = pack_instruction(Instruction(PLATEAU, "00000000000000a7", 2))
    content["config"] = ConfigRecord({**content.config_records["config"], "rate-factor": wrong})
    with pytest.raises(MessageError, match="rate factor"):
        unpack_instruction(content)


def test_a_factor_is_refused_under_a_schedule_that_has_none() -> None:
    with pytest.raises(MessageError, match="expected none under the schedule one_cycle"):
        unpack_instruction(pack_instruction(Instruction(ExperimentConfig(), "00000000000000a7", 2, rate_factor=0.5)))


def test_an_update_comes_out_as_it_went_in() -> None:
    came = unpack_update(pack_update(Update.of(PRESENCE, ARRAYS, 12, {"train_loss": 0.5})), ARRAYS)
    assert (came.presence, came.num_examples, came.metrics) == (PRESENCE, 12, {"train_loss": 0.5})
    np.testing.assert_array_equal(came.arrays.statistics, ARRAYS.statistics)


def test_presence_comes_out_as_it_went_in() -> None:
    assert unpack_presence(pack_presence(PRESENCE)) == PRESENCE


@pytest.mark.parametrize(
    "arrays",
    [
        {"parameters": np.ones(3, np.float32)},
        {"parameters": np.ones(3, np.float64), "statistics": np.ones(1, np.float32)},
        {"parameters": np.ones((3, 1), np.float32), "statistics": np.ones(1, np.float32)},
        {"parameters": np.ones(3, np.float32), "statistics": np.ones(1, np.float32), "more": np.ones(1, np.float32)},
    ],
)
def test_arrays_of_another_name_type_or_shape_are_refused(arrays: dict[str, np.ndarray]) -> None:
    content = pack_update(Update.of(PRESENCE, ARRAYS, 12, {}))
    content["arrays"] = ArrayRecord({name: Array(values) for name, values in arrays.items()})
    with pytest.raises(MessageError):
        unpack_update(content, ARRAYS)


@pytest.mark.parametrize("record", ["arrays", "metrics", "site"])
def test_a_missing_record_is_refused(record: str) -> None:
    content = pack_update(Update.of(PRESENCE, ARRAYS, 12, {}))
    del content[record]
    with pytest.raises(MessageError):
        unpack_update(content, ARRAYS)


def test_a_count_that_is_no_count_is_refused() -> None:
    content = pack_update(Update.of(PRESENCE, ARRAYS, 12, {}))
    for wrong in (-1, 1.5):
        content["metrics"] = MetricRecord({"num-examples": wrong})
        with pytest.raises(MessageError):
            unpack_update(content, ARRAYS)


def test_another_protocol_is_told_to_both_sides() -> None:
    content = pack_instruction(Instruction(ExperimentConfig(), "00000000000000a7", 1))
    content["config"] = ConfigRecord({**content.config_records["config"], "protocol": 99})
    with pytest.raises(MessageError, match="99"):
        unpack_instruction(content)


def test_a_failure_tells_the_class_and_a_fixed_sentence_and_nothing_of_the_text() -> None:
    request = Message(RecordDict(), dst_node_id=7, message_type="train")
    for error in (ImageError(SkipReason.CORRUPT, "/data/DOE^JANE/1.dcm"), OSError("/data/DOE^JANE"), RuntimeError("DOE^JANE")):
        reply = build_failure(error, "site-1", request)
        assert "DOE" not in json.dumps(reply.error.reason)
        failure = read_failure(reply)
        assert (failure.site, failure.error) == ("site-1", type(error).__name__)
        assert failure.sentence


def test_a_large_message_travels_in_few_parts_that_the_gateway_lets_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 5 << 20)  # put back afterwards, as what follows
    for function in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        monkeypatch.setattr(function, "__kwdefaults__", dict(function.__kwdefaults__ or {}))
    weights = np.arange(11_180_000, dtype=np.float32)  # as many as ResNet18's
    assert len(Array(weights).slice_array()) == 9
    tune_parts()
    sent = Array(weights)
    parts = [part.deflate() for _, part in sent.slice_array()]
    assert len(parts) == 3
    request = PushObjectRequest(node=Node(node_id=2**63), run_id=2**63, object_id="f" * 64, session_id="f" * 64)
    for request.object_content in parts:
        assert len(request.SerializeToString()) < int(BODY_LIMITS["large"].removesuffix("m")) << 20
    assert sent.numpy().tobytes() == weights.tobytes()


def test_a_part_that_is_on_its_way_is_asked_for_soon_and_for_as_long_as_flower_would(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        monkeypatch.setattr(function, "__kwdefaults__", dict(function.__kwdefaults__ or {}))
    tries: list[str] = []

    def pull(identifier: str) -> bytes:
        tries.append(identifier)
        if len(tries) < 4:
            raise inflatable_utils.ObjectUnavailableError(identifier)
        return b"part"

    tune_parts()
    started = time.monotonic()
    assert inflatable_utils.pull_objects(["a"], pull) == {"a": b"part"}
    assert time.monotonic() - started < 1.0  # Flower's own pauses are 1, 2 and 4 s
    patience = inflatable_utils.pull_and_inflate_object_from_tree.__kwdefaults__ or {}
    assert patience["backoff_cap"] * patience["max_tries_per_object"] == LONGEST_WAIT_FOR_A_PART_SEC
    assert LONGEST_WAIT_FOR_A_PART_SEC == PULL_BACKOFF_CAP * PULL_MAX_TRIES_PER_OBJECT
    tune_parts(0.2, 1.0)
    patience = inflatable_utils.pull_objects.__kwdefaults__ or {}
    assert (patience["initial_backoff"], patience["backoff_cap"], patience["max_tries_per_object"]) == (0.2, 1.0, 5000)
