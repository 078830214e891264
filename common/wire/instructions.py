"""What the coordinator asks of a site: the instruction, packed into a Flower message and unpacked from it.

The records and keys are those of `common.wire.messages`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import get_args

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, ConfigRecordValues, Message, RecordDict

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import SurveyField
from pneumofed.common.config.reader import experiment_from_json
from pneumofed.common.errors import MessageError
from pneumofed.common.model_bundle.suitability import Suitability
from pneumofed.common.wire.fields import (
    MAX_EXPERIMENT_BYTES,
    array_values,
    bounded_text,
    foreign_sentence,
    pack_values,
    rate_factor,
    round_number,
    run_token,
)
from pneumofed.common.wire.messages import (
    ARRAYS,
    AUDIT_HEAD,
    AVERAGE,
    AVERAGED_WITH,
    CLINICAL,
    CONFIG,
    COUNTED,
    FIRST,
    HELD,
    OTHER,
    PROTOCOL,
    RATE_FACTOR,
    STEP,
    SUITABILITY,
    SURVEY,
    VARIATE,
    ModelArrays,
    average_in,
    head_in,
    held_in,
    pack_arrays,
    record_named,
    unpack_arrays,
)


@dataclass(frozen=True)
class Instruction:
    """What the coordinator asks of a site. `arrays` is None at enrolment (the roll call).

    `run` is the run's token: the same after a resume, and no other run's, so that a site can recognise its own state of this run.
    """

    experiment: ExperimentConfig
    run: str
    round: int
    arrays: ModelArrays | None = None
    audit_head: str | None = None
    """Head of the coordinator's audit log, which the site's log keeps."""
    step: str | None = None
    """The step of secure aggregation that is asked for (`common.secure_aggregation.protocol`), as JSON."""
    counted: int = 0
    """The last round before this one in which the site's update was counted; 0 for none. SCAFFOLD and FedDyn say it."""
    variate: np.ndarray | None = None
    """SCAFFOLD's server variate, float32 [P]; None is zero."""
    rate_factor: float = 1.0
    """On the learning rate of the round, in (0, 1]; other than 1 under the schedule `plateau` only."""
    first: ModelArrays | None = None
    """The weights that the run began with: the site is asked to train by itself from them (`evaluation.alone`) and to judge both models."""
    suitability: Suitability | None = None
    """The tests that an evaluation asks scores of (`evaluation.hospital_reference`); None asks for validation statistics."""
    survey: tuple[SurveyField, ...] = ()
    """What a survey asks for, in the place of enrolment; nothing else is asked then."""

    clinical: bool = False
    """Whether sums of clinical numbers are asked for, in the place of enrolment; nothing else is asked then."""
    held: str | None = None
    """SHA-256 of weights that the site keeps since the last evaluation and that stand for `arrays`; None where these travel."""
    averaged: tuple[str, str] | None = None
    """SHA-256 of a moving average that the site keeps, and of what it becomes with `arrays`: the average is then what is asked about."""
    latest: ModelArrays | None = None
    """This round's weights where `arrays` is their moving average that the site computed; never travels."""
    other: ModelArrays | None = None
    """The model of another site, which the site is asked to judge in place of the global one (`evaluation.cross_site`)."""

    @property
    def weights(self) -> ModelArrays:
        """The arrays of an instruction that must have some.

        Raises:
            MessageError: it holds none.
        """
        if self.arrays is None:
            raise MessageError("the instruction holds no arrays")
        return self.arrays


def pack_instruction(instruction: Instruction) -> RecordDict:
    """Packs what the coordinator asks."""
    experiment = instruction.experiment.model_dump_json()
    config: dict[str, ConfigRecordValues] = {"experiment": experiment, "run": instruction.run}
    config |= {"round": instruction.round, "protocol": PROTOCOL}
    if instruction.audit_head:
        config[AUDIT_HEAD] = instruction.audit_head
    if instruction.step:
        config[STEP] = instruction.step
    if instruction.counted:
        config[COUNTED] = instruction.counted
    if instruction.rate_factor != 1.0:
        config[RATE_FACTOR] = instruction.rate_factor
    if instruction.suitability is not None:
        config[SUITABILITY] = instruction.suitability.model_dump_json()
    if instruction.survey:
        config[SURVEY] = json.dumps(instruction.survey)
    if instruction.clinical:
        config[CLINICAL] = True
    content = RecordDict({CONFIG: ConfigRecord(config)})
    if instruction.arrays is not None:
        content[ARRAYS] = pack_arrays(instruction.arrays)
    if instruction.first is not None:
        content[FIRST] = pack_arrays(instruction.first)
    if instruction.other is not None:
        content[OTHER] = pack_arrays(instruction.other)
    if instruction.variate is not None:
        content[VARIATE] = pack_variate(instruction.variate)
    return content


def pack_variate(variate: np.ndarray) -> ArrayRecord:
    """Packs SCAFFOLD's server variate, float32 [P], as the record `VARIATE` of an instruction."""
    return ArrayRecord({VARIATE: pack_values(variate)})


def with_step(message: Message, step: str) -> Message:
    """Copies a request with a step of secure aggregation in it; its arrays are shared, not copied.

    Args:
        message: an instruction to one site.
        step: as JSON; see `common.secure_aggregation.protocol`.

    Raises:
        MessageError: `message` holds no instruction.
    """
    return _with_entry(message, STEP, step)


def with_counted(message: Message, counted: int) -> Message:
    """Copies a request with the round in which the site's update was last counted; its arrays are shared, not copied.

    Args:
        message: an instruction to one site.
        counted: a round before that of the instruction; 0 for none.

    Raises:
        MessageError: `message` holds no instruction.
    """
    return _with_entry(message, COUNTED, counted)


def with_held(message: Message, held: str) -> Message:
    """Copies a request with a reference in place of its weights, for a site that keeps them.

    Args:
        message: an instruction to one site.
        held: SHA-256 of the weights in it.

    Raises:
        MessageError: `message` holds no instruction.
    """
    referring = _with_entry(message, HELD, held)
    del referring.content[ARRAYS]
    return referring


def with_average(message: Message, weights: ArrayRecord, former: str, result: str) -> Message:
    """Copies a request with a round's weights in place of their moving average, for a site that keeps the average before.

    The round that follows trains on from these weights, so that the site has what it needs by one download.

    Args:
        message: an instruction to one site, with the average in it.
        weights: of the round; shared, not copied.
        former: SHA-256 of the average before.
        result: of the average in `message`.

    Raises:
        MessageError: `message` holds no instruction.
    """
    averaging = _with_entry(_with_entry(message, AVERAGED_WITH, former), AVERAGE, result)
    averaging.content[ARRAYS] = weights
    return averaging


def unpack_instruction(content: RecordDict) -> Instruction:
    """Unpacks what the coordinator asks.

    Raises:
        MessageError: another protocol, or a record or key is missing.
        ConfigError: the experiment does not fit this version's schema.
    """
    config = record_named(content.config_records, CONFIG)
    if config.get("protocol") != PROTOCOL:
        other = foreign_sentence(str(config.get("protocol")), 20)
        raise MessageError(f"this site speaks protocol {PROTOCOL}, the coordinator {other}; install the same version")
    run, number = run_token(config.get("run")), round_number(config.get("round"))
    arrays = unpack_arrays(content.array_records[ARRAYS]) if ARRAYS in content.array_records else None
    experiment = experiment_from_json(bounded_text(config.get("experiment"), "experiment", MAX_EXPERIMENT_BYTES))
    step = bounded_text(config[STEP], "step") if STEP in config else None
    counted = round_number(config.get(COUNTED, 0))
    if counted and counted >= number:
        raise MessageError(f"the last counted round is {counted}, expected one before round {number}")
    factor = rate_factor(config[RATE_FACTOR], experiment) if RATE_FACTOR in config else 1.0
    tests = _unpack_suitability(config[SUITABILITY], experiment) if SUITABILITY in config else None
    first = _unpack_first(content, experiment)
    variate = _unpack_variate(content)
    held = held_in(config)
    if held is not None and arrays is not None:
        raise MessageError(f"expected weights or {HELD}, got both")
    averaged = average_in(config)
    if averaged is not None and (arrays is None or experiment.strategy.ema_decay == 0.0):
        raise MessageError(f"{AVERAGED_WITH}: expected weights beside it, and an experiment that asks for strategy.ema_decay")
    survey = _unpack_survey(config[SURVEY]) if SURVEY in config else ()
    clinical = config.get(CLINICAL, False) is True
    lent = _unpack_other(content, experiment)
    if lent is not None and any(
        part is not None for part in (arrays, held, first, tests, step, survey or None, clinical or None)
    ):
        raise MessageError(f"expected {OTHER} by itself, got more to judge or to do")
    asked = (survey, clinical, held, averaged)
    parts = (arrays, head_in(config), step, counted, variate, factor, first, tests, *asked)
    return Instruction(experiment, run, number, *parts, other=lent)


def _with_entry(message: Message, key: str, value: ConfigRecordValues) -> Message:
    config = ConfigRecord({**record_named(message.content.config_records, CONFIG), key: value})
    content = RecordDict({**message.content, CONFIG: config})
    return Message(content, dst_node_id=message.metadata.dst_node_id, message_type=message.metadata.message_type)


def _unpack_suitability(value: object, experiment: ExperimentConfig) -> Suitability:
    text = bounded_text(value, SUITABILITY)
    if not experiment.evaluation.hospital_reference:
        raise MessageError("suitability: expected none, since the experiment does not ask for evaluation.hospital_reference")
    try:
        return Suitability.model_validate_json(text)
    except ValueError:
        raise MessageError("suitability: expected densities and limits as a bundle has them") from None


def _unpack_survey(value: object) -> tuple[SurveyField, ...]:
    try:
        asked = json.loads(bounded_text(value, SURVEY, 1000))
    except (ValueError, RecursionError):
        asked = None
    known: tuple[SurveyField, ...] = get_args(SurveyField)
    fields = tuple(field for field in known if isinstance(asked, list) and field in asked)
    if not fields or len(fields) != len(asked):
        raise MessageError(f"survey: expected some of {', '.join(known)}, each once")
    return fields


def _unpack_first(content: RecordDict, experiment: ExperimentConfig) -> ModelArrays | None:
    if FIRST not in content.array_records:
        return None
    if not experiment.evaluation.alone:
        raise MessageError("first weights: expected none, since the experiment does not ask for evaluation.alone")
    return unpack_arrays(content.array_records[FIRST])


def _unpack_other(content: RecordDict, experiment: ExperimentConfig) -> ModelArrays | None:
    if OTHER not in content.array_records:
        return None
    if not experiment.evaluation.cross_site:
        raise MessageError(f"{OTHER}: expected none, since the experiment does not ask for evaluation.cross_site")
    return unpack_arrays(content.array_records[OTHER])


def _unpack_variate(content: RecordDict) -> np.ndarray | None:
    """SCAFFOLD's server variate, float32 [P], where one was sent."""
    if VARIATE not in content.array_records:
        return None
    record = content.array_records[VARIATE]
    if set(record) != {VARIATE}:
        raise MessageError(f"expected one array {VARIATE}, got {len(record)}")
    values = array_values(record[VARIATE], VARIATE)
    if values.dtype != np.float32 or values.ndim != 1 or not np.isfinite(values).all():
        raise MessageError(f"{VARIATE}: expected finite float32 [N], got {values.dtype} {list(values.shape)}")
    return values
