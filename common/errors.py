"""The project's exceptions, one class per reaction of the caller, and the form in which text of others may be shown.

    PneumofedError
    ├── ConfigError            the user mends the configuration or the command line
    ├── ArgumentError          the caller of the Python API mends what was handed over; a ValueError too
    ├── DataError              the user mends the data of one site or of the coordinator
    │   ├── ImageError         one file is left out and counted; the site goes on
    │   └── EmptySiteError     the site has nothing to train on and says so
    ├── BundleError            a model bundle is damaged, unsigned or signed by a stranger; it is not used
    ├── ReleaseError           a release record or a site's verdict is missing, changed or of a stranger; the model is not used
    ├── WeightsError           model weights cannot be had or do not fit the model
    ├── MessageError           a message from the other side is not what was agreed; the reply is left out
    ├── RoundError             a round had fewer than `min_sites` good replies; the run fails and says who and why
    ├── CheckpointError        a checkpoint cannot be read or belongs to another run; `--resume` refuses
    ├── SecureSumError         a step of a secure sum breaks the protocol; the site gives nothing away, the coordinator goes on without it
    ├── PolicyError            a site refuses a run or a round by its own policy; the coordinator goes on with the others
    │   └── BudgetError        the same, since its privacy budget does not allow it; says how much remains
    ├── ArchiveError           the hospital's archive (PACS) cannot be reached or refuses; the engineer mends the connection
    ├── AuditError             an audit log is broken: a line was changed or removed
    └── FlowerError            a Flower process did not start, or could not take or finish a run

An exception's own text may name files and thus patients, so it stays where it was raised. What may cross the wire is the
class name and `public_message`, a fixed sentence without any detail (see `describe_for_wire`). One number is let through: the
remaining epsilon of a `BudgetError`, which depends on earlier requests and on counts that are told anyway, and on no image.

A name, an error or a file's path may come from the other side of a connection, or from a disk that somebody else wrote. A terminal obeys
control characters (ECMA-48), and the bidirectional overrides of Unicode show a text in another order than it has (CVE-2021-42574). On the
way to a terminal or a log `printable` shows them as escapes.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from enum import StrEnum


class PneumofedError(Exception):
    """Base of every error that this project raises on purpose."""

    public_message = "the site failed; the reason is in the site's own log"


class ConfigError(PneumofedError):
    """The configuration or the command line is wrong; the text says where, what was expected and what came."""

    public_message = "the site's configuration does not fit this run"


class ArgumentError(PneumofedError, ValueError):
    """A value handed to the Python API is none that it takes; the text says which, what was expected, what came and what to do."""


class DataError(PneumofedError):
    """The data of one party cannot be used; the text says what to do."""

    public_message = "the site's data cannot be used"


class SkipReason(StrEnum):
    """Why one image was left out. The value is the sentence in the data report; it never names the file."""

    MISSING = "file not found"
    EMPTY = "file is empty"
    UNREADABLE = "file cannot be opened"
    UNKNOWN_FORMAT = "not a DICOM, JPEG, PNG, TIFF, BMP or WebP file"
    CORRUPT = "image data truncated or corrupt"
    NO_PIXEL_DATA = "DICOM without pixel data"
    UNSUPPORTED_COMPRESSION = "DICOM transfer syntax cannot be decoded"
    NO_DECODER = "the decoder for this DICOM transfer syntax is not installed here"
    UNSUPPORTED_BITS = "pixels of fewer than 8 or more than 16 bits"
    COLOUR = "colour image where greyscale is expected"
    MULTI_FRAME = "multi-frame image"
    TOO_LARGE = "image dimensions beyond the limit"
    OUT_OF_MEMORY = "not enough memory to decode the image"
    TOO_SMALL = "image smaller than 16 pixels a side"
    CONSTANT = "image without any contrast"
    NO_LABEL = "no label known for this image"
    UNKNOWN_LABEL = "label is none of the task's classes"
    UNCERTAIN_LABEL = "uncertain label left out by policy"
    NO_PATIENT = "patient unknown"
    NOT_FRONTAL = "not a frontal view"
    NOT_CHEST = "not the chest"
    DUPLICATE = "same image content seen before"
    BURNT_IN = "writing burnt into the image, or likely to be"
    WITHDRAWN = "patient has withdrawn"
    DISAGREED = "readers disagree on the label"
    NOT_DELIVERED = "archive did not deliver the image"
    HELD_OUT = "the patient, or the very image, is in a held-out set"
    CONTRADICTED = "rows of this image disagree on its label or patient"
    NOT_CT = "not a CT image where a CT volume is expected"
    CT_IMAGE = "CT image where a radiograph is expected"
    NOT_COPIED = "CT series that is not among the site's data: add its folder with site data add dicom --ct"
    NO_SLICES = "fewer than 3 CT slices"
    MIXED_SERIES = "more than one series, or slices that do not fit one another, in one folder"
    MISSING_SLICES = "CT series with missing or uneven slices"
    GANTRY_TILT = "CT series with gantry tilt"
    NO_GEOMETRY = "position, orientation or spacing of the slices is missing or cannot be"
    TIME_SERIES = "more than one volume, as of a time series, where one is expected"
    NOT_HOUNSFIELD = "values cannot be Hounsfield units"
    NO_NIBABEL = "NIfTI cannot be read here, since nibabel is not installed"


PASSING_REASONS = frozenset(
    {
        SkipReason.MISSING,
        SkipReason.UNREADABLE,
        SkipReason.NOT_DELIVERED,
        SkipReason.OUT_OF_MEMORY,
        SkipReason.NO_DECODER,
        SkipReason.NO_NIBABEL,
    }
)
"""Reasons that lie in the machine or the way to it and not in the image's bytes: never remembered with an image, always tried again."""


class ImageError(DataError):
    """One image cannot be used.

    Attributes:
        reason: the kind of failure, safe to count and to show outside the site.
    """

    public_message = "an image cannot be used"

    def __init__(self, reason: SkipReason, detail: str = "") -> None:
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[ImageError], tuple[SkipReason, str]]:
        """Both arguments again, so that the error crosses process pools."""
        return type(self), (self.reason, self.detail)


class EmptySiteError(DataError):
    """A site has no usable image for this task."""

    public_message = "the site has no usable image for this task"


class BundleError(PneumofedError):
    """A model bundle cannot be trusted, read or made; the text says why and what to do."""

    public_message = "the model bundle cannot be used"


class ReleaseError(PneumofedError):
    """A release record or a site's verdict cannot be trusted, or does not release the model at hand."""

    public_message = "the model's release cannot be verified"


class WeightsError(PneumofedError):
    """Model weights cannot be downloaded, read or loaded into this model."""

    public_message = "the model's weights cannot be loaded at the site"


class MessageError(PneumofedError):
    """A message of the other side breaks the agreement in `common.wire.messages`."""

    public_message = "the message does not follow the agreed format"


class HeldModelError(MessageError):
    """The weights that a message refers to are not kept here (any more); the coordinator sends them whole then."""

    public_message = "the site does not keep the model that the message refers to"


class RoundError(PneumofedError):
    """A round could not be completed; the text names each site and its reason."""


class SecureSumError(PneumofedError):
    """A step of a secure sum is not what the protocol allows: keys that were swapped, a set of sites that is too small, a replay."""

    public_message = "the site refuses this step of the secure sum, since it breaks the protocol"


class CheckpointError(PneumofedError):
    """A checkpoint is damaged or belongs to another experiment."""


class PolicyError(PneumofedError):
    """The site's own policy forbids what was asked. `rule` names the rule, and is all of it that leaves the site."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(detail)
        self.rule = rule
        self.public_message = f"the site's policy refuses this ({rule})"

    def __reduce__(self) -> tuple[type[PolicyError], tuple[str, str]]:
        return type(self), (self.rule, str(self))


class BudgetError(PolicyError):
    """A round would exceed the site's privacy budget.

    Attributes:
        remaining: epsilon that is left, 0 at least. It leaves the site, rounded down to hundredths.
    """

    def __init__(self, rule: str, detail: str, remaining: float) -> None:
        super().__init__(rule, detail)
        self.remaining = max(0.0, remaining) if math.isfinite(remaining) else 0.0
        self.public_message = f"{self.public_message}: epsilon {math.floor(100 * self.remaining) / 100:.2f} remains"

    def __reduce__(self) -> tuple[type[BudgetError], tuple[str, str, float]]:  # type: ignore[override]
        return type(self), (self.rule, str(self), self.remaining)


class ArchiveError(PneumofedError):
    """The archive cannot be reached, or refuses a query or a transfer."""

    public_message = "the site's archive cannot be reached"


class AuditError(PneumofedError):
    """The chain of an audit log is broken; the text names the line."""

    public_message = "the site's audit log is damaged"


class FlowerError(PneumofedError):
    """Flower did not start, or could not take or finish a run; the text says what it said."""


def describe_for_wire(error: BaseException) -> tuple[str, str]:
    """(class name, fixed sentence) of `error`: all that may leave a site about a failure.

    Never uses `str(error)`, which may hold a path and with it a patient's name. A class of another library is reported by its
    name alone, and only if it comes from the standard library or one of the declared dependencies (a class name is code, not data).
    """
    if isinstance(error, PneumofedError):
        return type(error).__name__, error.public_message
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return type(error).__name__, "the site ran out of memory; a smaller batch size may help"
    if isinstance(error, OSError):
        return type(error).__name__, "the site could not read or write a file; see the site's own log"
    return type(error).__name__, PneumofedError.public_message


CONTROLS = "\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069"
"""Inside a regular expression's brackets: C0 and C1 control characters, and what steers the direction or the lines of a text (Unicode
15, annex 9, table 4; U+2028 and U+2029 end a line)."""
_UNPRINTABLE = re.compile(f"(?![\n\t])[{CONTROLS}\\ud800-\\udfff]")
_UNPRINTABLE_IN_LINE = re.compile(f"[{CONTROLS}\\ud800-\\udfff]")


def printable(text: str) -> str:
    """Replaces what a terminal would obey by its escape, such as `\\x1b`; newlines and tabs stay, and so does every letter."""
    return _UNPRINTABLE.sub(_escape, text)


def printable_line(text: str) -> str:
    """As `printable`, with newlines and tabs replaced too: what stands for one name must not look like two lines."""
    return _UNPRINTABLE_IN_LINE.sub(_escape, text)


class PrintableFormatter(logging.Formatter):
    """Formats the lines of a log so that whoever reads it at a terminal sees what was written and nothing else happens."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _escape(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape", "surrogatepass").decode("ascii")


def counted(n: int, noun: str, plural: str = "") -> str:
    """Formats a count with its noun for a sentence: `1 image`, `5,216 images`.

    Args:
        n: how many.
        noun: in the singular.
        plural: unset, the noun and an s.
    """
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def in_a_row(words: Iterable[str]) -> str:
    """Lists words in a sentence: `AP`, `AP and PA`, `AP, PA and lateral`.

    Args:
        words: in their order; of none comes the empty string.
    """
    listed = list(words)
    return f"{', '.join(listed[:-1])} and {listed[-1]}" if len(listed) > 1 else "".join(listed)
