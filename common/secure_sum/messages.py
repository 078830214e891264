"""The replies of a secure sum as records of Flower's messages; the steps themselves travel in `common.messages.Instruction`."""

from __future__ import annotations

from typing import TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import ValidationError

from common.config_types import Section
from common.errors import MessageError
from common.messages import Presence, pack_presence
from common.secure_sum.masks import SumShape, SumVector
from common.secure_sum.steps import Confirmation, SealedShares, Shares, SignedKeys

SECURE, BODY, TAIL, MASKED = "secure", "body", "tail", "masked"

Reply = TypeVar("Reply", SignedKeys, SealedShares, Confirmation, Shares)


def pack_reply(presence: Presence, reply: Section) -> RecordDict:
    content = pack_presence(presence)
    content[SECURE] = ConfigRecord({"reply": reply.model_dump_json()})
    return content


def unpack_reply(content: RecordDict, kind: type[Reply]) -> Reply:
    """The site's answer to a step.

    Raises:
        MessageError: it is missing or malformed.
    """
    try:
        return kind.model_validate_json(str(content.config_records[SECURE]["reply"]))
    except (KeyError, ValidationError):
        raise MessageError(f"expected a reply with {kind.__name__}, got something else") from None


def pack_masked(presence: Presence, vector: SumVector) -> RecordDict:
    content = pack_presence(presence)
    content[MASKED] = ArrayRecord({BODY: Array(vector.body), TAIL: Array(vector.tail)})
    return content


def unpack_masked(content: RecordDict, shape: SumShape) -> SumVector:
    """A site's masked vector.

    Raises:
        MessageError: it is missing, or of another shape or number type.
    """
    record = content.array_records.get(MASKED)
    if record is None or set(record) != {BODY, TAIL}:
        raise MessageError("the reply holds no masked vector")
    vector = SumVector(record[BODY].numpy(), record[TAIL].numpy())
    for words, wanted in ((vector.body, shape.zeros().body), (vector.tail, shape.zeros().tail)):
        if words.dtype != wanted.dtype or words.shape != wanted.shape:
            raise MessageError(f"masked vector: expected {wanted.dtype} {list(wanted.shape)}, got {words.dtype}")
    return vector
