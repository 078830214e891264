"""Every answer above 399 in one form: a fixed word for the page to translate, a sentence, and nothing of the request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.inference.reading_room.clinical import ClinicalValueError
from pneumofed.inference.reading_room.schema import ErrorBody, ErrorCode

SENTENCES: dict[ErrorCode, str] = {
    "not_signed_in": "sign in first",
    "wrong_login": "the name or the password is wrong",
    "locked": "too many wrong passwords; wait a little",
    "forbidden": "this needs the role admin",
    "no_csrf": "the session's CSRF token is missing; load the page again",
    "foreign_page": "asked for by another page",
    "weak_password": "the password is too short or too easy to guess",
    "invalid_request": "the request is not as the interface describes it",
    "not_found": "there is nothing at this address",
    "wrong_method": "this address does not take requests of this kind",
    "no_map": "there is no heat map for this image",
    "too_slow": "the request took too long to arrive",
    "request_too_large": "the request is too large",
    "too_many_files": "too many files in one request",
    "busy": "too many are at work; try again in a moment",
    "not_ready": "the model is still starting; try again in a moment",
    "disk_full": "there is no room for more files; an administrator has to make some",
    "internal": "something went wrong; the room's log tells the administrator more",
    "archive_file": "an archive such as zip is not opened; unpack it and send the files in it",
    "ct_image": "this is a CT image, and the model of this room judges radiographs; send it to a room whose model judges CT",
    "not_ct": "this is no CT series, and the model of this room judges CT; send a radiograph to a room whose model judges these",
    "no_slice": "the image has no such slice",
    "file_too_large": "the file is too large",
    "value_column": "a name is none of the model's clinical columns",
    "value_unit": "a clinical value has a unit that cannot be converted",
    "value_range": "a clinical value lies outside the range of its column",
    "value_number": "a clinical value is no number",
    "value_yes_no": "a clinical value is neither yes nor no",
    "value_code": "a clinical value is none of the codes of its column",
    "other_model": "another model judged this case; its values stay as they are",
    "no_evidence": "there is nothing to tell what the answer rests on: no value is known, or the model cannot say it",
}
"""For all codes but those of `SkipReason` that are not named here, whose value is the sentence."""

_BY_REASON: dict[SkipReason, ErrorCode] = {
    SkipReason.EMPTY: "empty",
    SkipReason.UNREADABLE: "unreadable",
    SkipReason.MISSING: "unreadable",
    SkipReason.UNKNOWN_FORMAT: "unknown_format",
    SkipReason.CORRUPT: "corrupt",
    SkipReason.NO_PIXEL_DATA: "no_pixel_data",
    SkipReason.UNSUPPORTED_COMPRESSION: "unsupported_compression",
    SkipReason.NO_DECODER: "unsupported_compression",
    SkipReason.UNSUPPORTED_BITS: "unsupported_bits",
    SkipReason.COLOUR: "colour",
    SkipReason.MULTI_FRAME: "multi_frame",
    SkipReason.TOO_LARGE: "too_large",
    SkipReason.OUT_OF_MEMORY: "too_large",
    SkipReason.TOO_SMALL: "too_small",
    SkipReason.CONSTANT: "constant",
    SkipReason.CT_IMAGE: "ct_image",
    SkipReason.NOT_CT: "not_ct",
    SkipReason.NO_SLICES: "no_slices",
    SkipReason.MIXED_SERIES: "mixed_series",
    SkipReason.MISSING_SLICES: "missing_slices",
    SkipReason.GANTRY_TILT: "gantry_tilt",
    SkipReason.NO_GEOMETRY: "no_geometry",
    SkipReason.TIME_SERIES: "time_series",
    SkipReason.NOT_HOUNSFIELD: "not_hounsfield",
    SkipReason.NO_NIBABEL: "no_nibabel",
}
_WITH_CAUSE = (
    "not_ct",
    "no_slices",
    "mixed_series",
    "missing_slices",
    "gantry_tilt",
    "no_geometry",
    "time_series",
    "not_hounsfield",
)
"""Of series: `common.imaging.volumes` says how many and where, and nothing of a patient."""

RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorBody, "description": text}
    for code, text in {
        400: "No host name of the room's, or a header that cannot be read",
        401: "Not signed in",
        403: "Not allowed",
        404: "Not found",
        413: "Too large",
        422: "Not as described",
        429: "Too many; later again",
    }.items()
}
"""For the description of the interface: what any route may answer."""


class Refusal(Exception):  # noqa: N818 - an answer, not a fault
    """Ends a request with a problem."""

    def __init__(self, status: int, code: ErrorCode, *, retry_sec: int | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(code)
        self.status, self.code, self.retry_sec, self.headers = status, code, retry_sec, dict(headers or {})


def sentence(code: ErrorCode) -> str:
    """Returns what the code means, in English."""
    return SENTENCES.get(code) or SkipReason[code.upper()].value


def error_code(error: ImageError) -> ErrorCode:
    """Returns the code of a file that cannot be used."""
    return _BY_REASON[error.reason]


def with_cause(text: str, cause: str) -> str:
    """Joins a sentence and its cause.

    Args:
        text: of `sentence`.
        cause: of `cause_of`; may be empty.
    """
    return f"{text}: {cause}" if cause else text


def cause_of(error: ImageError) -> str:
    """Returns how many slices of a CT series are wrong and where, in English; empty where there is nothing to say, or it is no series."""
    of_volume = error.reason is SkipReason.TOO_LARGE and ("voxels" in error.detail or "archive" in error.detail)
    return error.detail if of_volume or error_code(error) in _WITH_CAUSE else ""


def error_response(
    status: int,
    code: ErrorCode,
    retry_sec: int | None = None,
    headers: Mapping[str, str] | None = None,
    cause: str = "",
) -> Response:
    """Builds the answer for `code`.

    Args:
        status: HTTP status, 400 or above.
        code: fixed word, for the page to translate.
        retry_sec: when to try again, in seconds; goes into the body and the header Retry-After.
        headers: further headers of the answer; they win over ours.
        cause: what follows the sentence, see `cause_of`.
    """
    body = ErrorBody(error=code, detail=with_cause(sentence(code), cause), retry_sec=retry_sec)
    more = {"Retry-After": str(retry_sec)} if retry_sec is not None else {}
    return JSONResponse(body.model_dump(), status, {**more, **(headers or {})})


def add_problem_handlers(app: FastAPI) -> None:
    """Makes `app` answer in this form whatever goes wrong."""

    @app.exception_handler(Refusal)
    async def refuse(_: Request, error: Refusal) -> Response:
        return error_response(error.status, error.code, error.retry_sec, error.headers)

    @app.exception_handler(ImageError)
    async def refuse_file(_: Request, error: ImageError) -> Response:
        return error_response(422, error_code(error), cause=cause_of(error))

    @app.exception_handler(ClinicalValueError)
    async def refuse_values(_: Request, error: ClinicalValueError) -> Response:
        body = ErrorBody(error=error.problem, detail=str(error), column=error.column)
        return JSONResponse(body.model_dump(), 422)

    @app.exception_handler(RequestValidationError)
    async def refuse_form(_: Request, error: RequestValidationError) -> Response:
        return error_response(422, "invalid_request")

    @app.exception_handler(HTTPException)
    async def refuse_http(_: Request, error: HTTPException) -> Response:
        codes: dict[int, ErrorCode] = {404: "not_found", 405: "wrong_method", 400: "invalid_request"}
        return error_response(error.status_code, codes.get(error.status_code, "invalid_request"), headers=error.headers)
