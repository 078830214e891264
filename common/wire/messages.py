"""The messages between coordinator and site: only this module and `common.wire.instructions`, what the coordinator asks, pack and unpack
the records and keys of a Flower message.

    instruction   arrays  {parameters float32 [P], statistics float32 [B]}   config {experiment, run, round, protocol, rate-factor}
    of SCAFFOLD   and server-variate {server-variate float32 [P]}            config {..., counted}
    roll call     (no arrays)                                                config {experiment, run, round, protocol}
    update        arrays  as above, or those of common.wire.fields  metrics {num-examples, loss, ...}
                                                                             site {name, layout, report}
    secure agg.   as an instruction, with its arrays in one step only        config {..., step}
                  the replies: see common.secure_aggregation.protocol
    evaluation    metrics {num-examples, loss, seconds}   statistics {...}   site {name, layout, report}
                  personal {...}: statistics of the site's own model, where there is one and its policy lets them leave
                  arrays {...}: the model that the site trained alone, where the run asks for it and its policy gives it
    cross-site    an instruction with other-model {parameters, statistics} in place of arrays; the reply is an evaluation
    with training an update with judged {num-examples, ...}, statistics and personal as an evaluation has them, or with why there are none:
                  site {..., not-judged}
    scores        config {..., suitability}; the reply is an evaluation with statistics {features, pixels, turn}, counts by bin
    presence      site {name, layout, report}
    any reply     site {..., held-model}: hash of the weights that the site keeps since the last evaluation; an instruction with those
                  very weights then has config {..., held-model} in place of its arrays, so that a model travels once
    survey        config {..., survey}; the reply: see common.wire.survey
    clinical sums config {..., clinical: true}; the reply: see common.wire.clinical_sums
    failure       Flower's Error whose reason is JSON {site, error, sentence}: a class name and a fixed sentence, never an exception's text

`parameters` and `statistics` (BatchNorm's running mean and variance) are flat vectors; both sides derive the layout from the model and
compare its digest (`common.wire.parameter_layout`), since 122 small arrays a message cost three times as long as one vector.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message import array as flower_array
from flwr.supercore.inflatable import inflatable_utils

from pneumofed.common.config.choices import UpdatePrecision
from pneumofed.common.errors import MessageError, describe_for_wire
from pneumofed.common.wire.fields import (
    MOST_COUNT,
    PARAMETERS,
    array_values,
    class_name,
    decode_parameters,
    encode_parameters,
    foreign_sentence,
    json_object,
    layout_digest,
    metric_values,
    pack_values,
    shared_record,
    site_name,
    site_report,
)

PART_BYTES = 15 << 20
"""Of a large message, per request of Flower's; its own 5 MB make three times as many requests, each of which costs the SuperLink, the
SuperNode and the message's process some 10 ms besides its bytes."""
LONGEST_WAIT_FOR_A_PART_SEC = 5000.0
"""How long whoever waits for a part of a message tries: Flower's own 500 tries, of which each but the first few comes 10 s later."""
Content = RecordDict
"""What a Flower message carries; its name for those who only hand it on."""
PROTOCOL = 2
"""Raised when the meaning of any key changes; a site of another protocol is refused with a sentence that says so."""

ARRAYS, CONFIG, METRICS, STATISTICS, PERSONAL, SITE = "arrays", "config", "metrics", "statistics", "personal", "site"
"""Names of the records in a message."""
BUFFERS = "statistics"
"""Name of the second array in the record `ARRAYS`; the first one's is `PARAMETERS`."""
NUM_EXAMPLES = "num-examples"
"""Key of the record `METRICS`: images that were trained or evaluated on."""
JUDGED = "judged"
"""Name of the record, in an update, that is an evaluation's `METRICS`: of the model that the training began with."""
NOT_JUDGED = "not-judged"
"""Key of the record `SITE` of an update: why there is none, as JSON {error, sentence}."""
AUDIT_HEAD = "audit-head"
"""Key of the records `CONFIG` and `SITE`: head of the sender's audit log."""
VARIATE = "server-variate"
"""Name of the record, and of the one array in it, that SCAFFOLD sends beside the weights."""
FIRST = "first-weights"
"""Name of the record with the weights that the run began with, from which a site trains alone."""
OTHER = "other-model"
"""Name of the record with the model of another site, which an evaluation asks to judge."""
HELD = "held-model"
"""Key of the records `CONFIG` and `SITE`: SHA-256 of weights that the site keeps (`common.audit.log.hash_arrays`)."""
HELD_LATEST = "held-weights"
"""Key of the record `SITE`: SHA-256 of the weights beside them that the next round trains on from, where the judged ones are an average."""
AVERAGED_WITH, AVERAGE = "averaged-with", "average"
"""Keys of the record `CONFIG`: SHA-256 of a moving average that the site keeps, and of what it becomes with the weights in the message."""
COUNTED = "counted"
"""Key of the record `CONFIG`: the last round in which the site's update was counted, 0 for none."""
SUITABILITY = "suitability"
"""Key of the record `CONFIG`: the suitability tests, as JSON, that an evaluation asks scores of instead of statistics."""
SURVEY = "survey"
"""Key of the record `CONFIG`: the fields that a survey asks for. Name of the record with the site's answer (`common.wire.survey`)."""
CLINICAL = "clinical"
"""Key of the record `CONFIG`: that sums of clinical numbers are asked for. Name of the record with them (`common.wire.clinical_sums`)."""
RATE_FACTOR = "rate-factor"
"""Key of the record `CONFIG`: the factor on the learning rate that the schedule `plateau` has come to; absent where it is 1."""
STEP = "step"
"""Key of the record `CONFIG`: a step of secure aggregation, as JSON."""
EXPERIMENT_KEY = "experiment"
"""Key of Flower's run config: the path of a YAML file, or the whole experiment as JSON."""
COORDINATOR_KEY = "coordinator"
"""Key of the run config: the path of the coordinator's own YAML file."""
SITES_KEY = "sites"
"""Key of the run config in simulation only: a folder with one YAML file a virtual hospital, named by partition number."""
SITE_CONFIG_KEY = "site-config"
"""Key of a SuperNode's own node config: the path of the hospital's YAML file."""
SITE_FAILURE_CODE = 1000
"""Flower reserves 0 to 99 for its own error codes."""


@dataclass(frozen=True)
class ModelArrays:
    """A model's weights as they travel: float32 [P] parameters and float32 [B] normalisation statistics."""

    parameters: np.ndarray
    statistics: np.ndarray

    @property
    def nbytes(self) -> int:
        return int(self.parameters.nbytes + self.statistics.nbytes)


@dataclass(frozen=True)
class Presence:
    """A site's answer at enrolment (the roll call): its name, the layout of its model, and counts about its data."""

    site: str
    layout: str
    report: Mapping[str, Any] = field(default_factory=dict)
    audit_head: str | None = None
    """Head of the site's audit log, which the coordinator's log keeps."""


@dataclass(frozen=True)
class Update:
    """A site's answer to a training instruction.

    At the site the weights are in the record that travels. At the coordinator they stay in the float32 record that Flower's arithmetic
    takes, one copy a site; `arrays` unpacks them for the moment. `nbytes` is what they took on the wire.
    """

    presence: Presence
    record: ArrayRecord
    num_examples: int
    metrics: Mapping[str, float]
    nbytes: int

    @classmethod
    def of(cls, presence: Presence, arrays: ModelArrays, num_examples: int, metrics: Mapping[str, float]) -> Update:
        """Packs trained weights as an update.

        Args:
            presence: the site's name, layout and data report.
            arrays: float32 [P] and [B], after training.
            num_examples: training images, the update's weight in the mean.
            metrics: what the site reports of its training, by name.
        """
        record = pack_arrays(arrays)
        return cls(presence, record, num_examples, metrics, record_bytes(record))

    @property
    def arrays(self) -> ModelArrays:
        """The weights, unpacked at each call."""
        return unpack_arrays(self.record)


@dataclass(frozen=True)
class Evaluation:
    """A site's answer to an evaluation instruction; `statistics` are the plain numbers of `common.evaluation.statistics`."""

    presence: Presence
    num_examples: int
    metrics: Mapping[str, float]
    statistics: Mapping[str, Any]
    personal: Mapping[str, Any] | None = None
    """Those of the site's own model on the same patients; None where it has none, or they may not leave."""


@dataclass(frozen=True)
class Failure:
    """What a site may say about its own failure."""

    site: str | None
    error: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.error}: {self.sentence}"


def pack_arrays(arrays: ModelArrays) -> ArrayRecord:
    """Packs the two flat vectors as a record."""
    return ArrayRecord({PARAMETERS: pack_values(arrays.parameters), BUFFERS: pack_values(arrays.statistics)})


def unpack_arrays(record: ArrayRecord) -> ModelArrays:
    """Unpacks the flat vectors of `record`.

    Raises:
        MessageError: other names, another number type, or more than one dimension.
    """
    if set(record) != {PARAMETERS, BUFFERS}:
        raise MessageError(f"expected arrays {PARAMETERS} and {BUFFERS}, got {len(record)} others")
    parameters, statistics = (array_values(record[name], name) for name in (PARAMETERS, BUFFERS))
    for name, values in ((PARAMETERS, parameters), (BUFFERS, statistics)):
        if values.dtype != np.float32 or values.ndim != 1:
            raise MessageError(f"{name}: expected float32 [N], got {values.dtype} {list(values.shape)}")
    return ModelArrays(parameters, statistics)


def pack_presence(presence: Presence) -> RecordDict:
    """Packs a site's answer at enrolment."""
    return RecordDict({SITE: _site_record(presence)})


def unpack_presence(content: RecordDict) -> Presence:
    """Unpacks who answers.

    Raises:
        MessageError: the site record is missing or malformed.
    """
    record = record_named(content.config_records, SITE)
    report = site_report(record.get("report"))
    return Presence(site_name(record.get("name")), layout_digest(record.get("layout")), report, head_in(record))


def pack_update(update: Update) -> RecordDict:
    """Packs a site's reply with an update, whose record goes as it is (see `encode_update`)."""
    metrics = MetricRecord({NUM_EXAMPLES: update.num_examples, **update.metrics})
    return RecordDict({ARRAYS: update.record, METRICS: metrics, SITE: _site_record(update.presence)})


def encode_update(
    arrays: ModelArrays, base: ModelArrays, precision: UpdatePrecision, generator: np.random.Generator
) -> ArrayRecord:
    """Encodes a model's weights for the way to the coordinator.

    Args:
        arrays: the site's weights after training.
        base: the round's global weights, which the coordinator has too.
        precision: number type on the wire.
        generator: of the stochastic rounding of `int8`; is moved on there only.

    Returns:
        The record that travels; the normalisation statistics in it stay float32.

    Raises:
        MessageError: a difference is not finite, or too large for float16.
    """
    coded = encode_parameters(arrays.parameters, base.parameters, precision, generator)
    return ArrayRecord({**{name: pack_values(values) for name, values in coded.items()}, BUFFERS: pack_values(arrays.statistics)})


def decode_update(record: ArrayRecord, base: ModelArrays, precision: UpdatePrecision) -> ArrayRecord:
    """Decodes what `encode_update` made.

    Args:
        record: as it travelled.
        base: the round's global weights.
        precision: number type on the wire, which the experiment names.

    Returns:
        The float32 record {parameters, statistics}.

    Raises:
        MessageError: other arrays than the precision has.
    """
    if precision == "float32":
        unpack_arrays(record)
        return record
    if BUFFERS not in record:
        raise MessageError(f"expected an array {BUFFERS}, got {len(record)} others")
    coded = {name: array_values(array, foreign_sentence(name, 40)) for name, array in record.items() if name != BUFFERS}
    parameters = pack_values(decode_parameters(coded, base.parameters, precision))
    decoded = shared_record({PARAMETERS: parameters, BUFFERS: record[BUFFERS]})
    unpack_arrays(decoded)
    return decoded


def unpack_update(content: RecordDict, base: ModelArrays, precision: UpdatePrecision = "float32") -> Update:
    """Unpacks a site's update; its values are checked by `server.federation.replies`.

    Args:
        content: of the reply.
        base: the round's global weights.
        precision: number type on the wire, which the experiment names.

    Raises:
        MessageError: a record or key is missing or of the wrong type.
    """
    if ARRAYS not in content.array_records:
        raise MessageError("the update holds no arrays")
    num_examples, metrics = _unpack_metrics(content)
    travelled = content.array_records[ARRAYS]
    record = decode_update(travelled, base, precision)
    return Update(unpack_presence(content), record, num_examples, metrics, record_bytes(travelled))


def record_bytes(record: ArrayRecord) -> int:
    """Counts the bytes of the arrays in `record` on the wire."""
    return sum(len(array.data) for array in record.values())


def pack_evaluation(evaluation: Evaluation, own_model: ModelArrays | None = None) -> RecordDict:
    """Packs a site's reply to an evaluation instruction.

    Args:
        evaluation: who answers, and its statistics.
        own_model: the model that the site trained alone, where it gives it (`evaluation.cross_site`).
    """
    metrics = MetricRecord({NUM_EXAMPLES: evaluation.num_examples, **evaluation.metrics})
    statistics = MetricRecord(dict(evaluation.statistics))
    personal = {} if evaluation.personal is None else {PERSONAL: MetricRecord(dict(evaluation.personal))}
    given = {} if own_model is None else {ARRAYS: pack_arrays(own_model)}
    return RecordDict({METRICS: metrics, STATISTICS: statistics, **personal, **given, SITE: _site_record(evaluation.presence)})


def unpack_evaluation(content: RecordDict) -> Evaluation:
    """Unpacks a site's evaluation; the statistics are checked when they are rebuilt.

    Raises:
        MessageError: a record or key is missing or of the wrong type.
    """
    num_examples, metrics = _unpack_metrics(content)
    statistics = dict(record_named(content.metric_records, STATISTICS))
    personal = dict(content.metric_records[PERSONAL]) if PERSONAL in content.metric_records else None
    return Evaluation(unpack_presence(content), num_examples, metrics, statistics, personal)


def attach_evaluation(content: RecordDict, evaluation: Evaluation) -> None:
    """Adds to a site's update what it found of the model that it trained on from (`evaluation.with_training`).

    Args:
        content: of the reply, changed in place.
        evaluation: who answers, and its statistics.
    """
    packed = pack_evaluation(evaluation)
    content[JUDGED] = packed[METRICS]
    content.update({kind: packed[kind] for kind in (STATISTICS, PERSONAL) if kind in packed})


def attach_not_judged(content: RecordDict, error: BaseException) -> None:
    """Adds to a site's update why it did not judge the model; without any detail, as `build_failure`.

    Args:
        content: of the reply, changed in place.
        error: only a class name and a fixed sentence of it travel.
    """
    name, sentence = describe_for_wire(error)
    record_named(content.config_records, SITE)[NOT_JUDGED] = json.dumps({"error": name, "sentence": sentence})


def unpack_attached(content: RecordDict, site: str) -> Evaluation | Failure:
    """Unpacks what came with an update of the model that the site trained on from, or why it says nothing of it.

    Args:
        content: of the reply, not trusted.
        site: who was asked.

    Raises:
        MessageError: neither is there, or it is malformed; statistics are checked when they are rebuilt.
    """
    said = record_named(content.config_records, SITE).get(NOT_JUDGED)
    if said is not None:
        return _failure_in(said, site)
    kept = {name: content[name] for name in (STATISTICS, PERSONAL, SITE) if name in content}
    return unpack_evaluation(RecordDict({**kept, METRICS: record_named(content.metric_records, JUDGED)}))


def describe_content(content: RecordDict) -> dict[str, Any]:
    """Describes what leaves with a reply, for the audit log.

    Returns:
        `bytes` of its arrays, names of `arrays` and `metrics` (with statistics; those of the site's own model are named `personal index`
        and so on, those of judging that came with training `judged num-examples`), of a survey the fields of its `tables`, `values` of the
        metrics that are single numbers, the `report` with the numbers of images and what is withheld, the columns of clinical numbers whose
        `sums` are in it, and `sent`, the SHA-256 of all of it (see `hash_content`).
    """
    arrays = content.array_records.values()
    metrics = content.metric_records.items()
    single = content.metric_records.get(METRICS, {}).items()
    survey = content.config_records.get(SURVEY)
    tables = {} if survey is None else {"tables": sorted(json.loads(str(survey["answer"]))["tables"])}
    clinical = content.config_records.get(CLINICAL)
    sums = {} if clinical is None else {"sums": sorted(json.loads(str(clinical["sums"])))}
    return {
        **tables,
        **sums,
        "bytes": content_bytes(content),
        "arrays": sorted(name for record in arrays for name in record),
        "metrics": sorted(
            f"{kind} {name}" if kind in (PERSONAL, JUDGED) else name for kind, record in metrics for name in record
        ),
        "values": {name: value if math.isfinite(value) else None for name, value in single if isinstance(value, int | float)},
        "report": json.loads(str(record_named(content.config_records, SITE)["report"])),
        "sent": hash_content(content),
    }


def hash_content(content: RecordDict) -> str:
    """Computes the SHA-256 of a message's records: names and bytes of arrays in their order, then metrics and configuration as JSON."""
    digest = hashlib.sha256()
    for kind, record in sorted(content.array_records.items()):
        for name, array in sorted(record.items()):
            digest.update(f"{kind}/{name} {len(array.data)}\n".encode() + array.data)
    plain: dict[str, dict[str, Any]] = {kind: dict(record) for kind, record in content.metric_records.items()}
    plain |= {kind: dict(record) for kind, record in content.config_records.items()}
    digest.update(json.dumps(plain, sort_keys=True, default=bytes.hex).encode())
    return digest.hexdigest()


def content_bytes(content: RecordDict) -> int:
    """Counts the bytes of all arrays in `content` on the wire."""
    return sum(record_bytes(record) for record in content.array_records.values())


def attach_head(content: RecordDict, head: str) -> None:
    """Adds the head of the site's audit log to its reply.

    Args:
        content: of the reply, changed in place.
        head: hash of the log's last line, the one about this very reply.

    Raises:
        MessageError: the reply holds no site record.
    """
    record_named(content.config_records, SITE)[AUDIT_HEAD] = head


def attach_held(content: RecordDict, held: Sequence[str]) -> None:
    """Adds the hashes of the weights that the site keeps to its reply.

    Args:
        content: of the reply, changed in place.
        held: SHA-256 in hexadecimal of what was judged, and of this round's weights where the judged ones are their moving average.

    Raises:
        MessageError: the reply holds no site record.
    """
    for key, digest in zip((HELD, HELD_LATEST), held, strict=False):
        record_named(content.config_records, SITE)[key] = digest


def tune_parts(first_sec: float = 0.05, longest_sec: float = 0.25) -> None:
    """Lets Flower, in this process, send large messages in parts of `PART_BYTES`, and ask soon again for parts that are still on their way.

    A message is announced before its parts are there, so that who asks for them waits for nearly each large message; Flower pauses
    1, 2, 4, 8 and then always 10 s.

    Args:
        first_sec: the first pause; each is twice as long as the one before. The defaults are for whoever asks by itself.
        longest_sec: the longest one.
    """
    flower_array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE = PART_BYTES
    tries = math.ceil(LONGEST_WAIT_FOR_A_PART_SEC / longest_sec)
    patience = {"initial_backoff": first_sec, "backoff_cap": longest_sec, "max_tries_per_object": tries}
    for function in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        function.__kwdefaults__ = {**(function.__kwdefaults__ or {}), **patience}


def held_in(record: Mapping[str, Any]) -> str | None:
    """Reads the hash of kept weights that an instruction refers to, if there is one and it is a hash."""
    return _hash_in(record, HELD)


def all_held_in(record: Mapping[str, Any]) -> frozenset[str]:
    """Reads the hashes of the weights that a site keeps from the site record of its reply; what is no hash is passed over."""
    return frozenset(found for key in (HELD, HELD_LATEST) if (found := _hash_in(record, key)) is not None)


def average_in(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """Reads the hashes of `AVERAGED_WITH` and `AVERAGE` from an instruction; None where it has neither.

    Raises:
        MessageError: it has one without the other, or one that is no hash.
    """
    former, result = _hash_in(record, AVERAGED_WITH), _hash_in(record, AVERAGE)
    if former is not None and result is not None:
        return former, result
    if AVERAGED_WITH in record or AVERAGE in record:
        raise MessageError(f"expected two hashes, {AVERAGED_WITH} and {AVERAGE}")
    return None


def build_failure(error: BaseException, site: str | None, request: Message) -> Message:
    """Builds the reply that reports a failure to the coordinator without any detail (see `common.errors.describe_for_wire`).

    Args:
        error: only a class name and a fixed sentence of it travel.
        site: the site's name; None where it is not known yet.
        request: what the reply answers.
    """
    name, sentence = describe_for_wire(error)
    reason = json.dumps({"site": site, "error": name, "sentence": sentence})
    return Message(Error(code=SITE_FAILURE_CODE, reason=reason), reply_to=request)


def read_failure(message: Message) -> Failure:
    """Reads what an error reply says: a site's own report, or Flower's code where the site could not answer any more."""
    if message.error.code == SITE_FAILURE_CODE:
        try:
            named = json_object(message.error.reason, "failure")["site"]
            return _failure_in(message.error.reason, None if named is None else site_name(named))
        except (MessageError, KeyError):
            return Failure(None, "MessageError", "the site's failure could not be read")
    return Failure(None, f"Flower error {message.error.code}", "the site was lost or its process died while it worked")


def _failure_in(text: object, site: str | None) -> Failure:
    said = json_object(text, "failure")
    if not {"error", "sentence"} <= set(said):
        raise MessageError("failure: expected its error and a sentence")
    return Failure(site, class_name(said["error"]), foreign_sentence(said["sentence"]))


def _site_record(presence: Presence) -> ConfigRecord:
    return ConfigRecord({"name": presence.site, "layout": presence.layout, "report": json.dumps(dict(presence.report))})


def head_in(record: Mapping[str, Any]) -> str | None:
    """The other side's head, if there is one and it is a hash: it goes into our log, where nothing else may be smuggled in."""
    return _hash_in(record, AUDIT_HEAD)


def _hash_in(record: Mapping[str, Any], key: str) -> str | None:
    value = record.get(key)
    return value if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else None


def record_named(records: Mapping[str, Any], name: str) -> Any:
    if name not in records:
        raise MessageError(f"record '{name}' is missing")
    return records[name]


def _unpack_metrics(content: RecordDict) -> tuple[int, dict[str, float]]:
    record = dict(record_named(content.metric_records, METRICS))
    num_examples = record.pop(NUM_EXAMPLES, None)
    if not isinstance(num_examples, int) or not 0 <= num_examples <= MOST_COUNT:
        raise MessageError(f"{NUM_EXAMPLES}: expected a count")
    return num_examples, metric_values(record)
