"""An archive over DICOMweb: QIDO-RS to search and WADO-RS to fetch (DICOM PS3.18, 10.6 and 10.4)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
from dicomweb_client.api import DICOMwebClient
from pydicom.datadict import keyword_for_tag
from pydicom.dataset import Dataset

from pneumofed.client.archive.query import RETURN_KEYS, Answer, Instance, Level, RetryPolicy, TransientArchiveError
from pneumofed.common.errors import ArchiveError, ConfigError, ImageError, SkipReason

T = TypeVar("T")
for _name in ("dicomweb_client", "urllib3"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)  # they log addresses, which hold accession numbers

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
_AS_STORED = (("application/dicom", "*"),)
"""Media type of an image as it is stored, whatever the transfer syntax (PS3.18, 8.7.3.5.2)."""


@dataclass(frozen=True)
class WebAddress:
    """Where a DICOMweb service is, and how the site shows who it is."""

    url: str
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    ca: str | None = None
    """Certificate authority (PEM) of the archive; the system's own authorities where it is unset."""

    def __post_init__(self) -> None:
        """Refuses an address that cannot be used, or would show a secret to others.

        Raises:
            ConfigError: it is no http or https address, holds a password, or would send one in the clear.
        """
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError("the archive's address: expected a URL such as https://pacs.hospital.example/dicom-web")
        if parts.username or parts.password:
            raise ConfigError(
                "the archive's address holds a user or password; give them as options, where other users do not see them"
            )
        if parts.scheme == "http" and (self.password or self.token) and parts.hostname not in _LOOPBACK:
            raise ConfigError("the archive's password would cross the network in the clear; use an https address")


class DicomWebArchive:
    """`client.archive.query.Archive` over DICOMweb."""

    def __init__(self, address: WebAddress, retry: RetryPolicy) -> None:
        self._host = urlsplit(address.url).netloc
        self._retry_policy = retry
        self._session = _open_session(address)
        self._client = DICOMwebClient(
            address.url.rstrip("/"), session=self._session, timeout=retry.timeout_sec, permissive_uid=True
        )
        self._client.set_http_retry_params(retry=False)  # `RetryPolicy` does it, and logs what it waits for

    def search(self, level: Level, conditions: Mapping[str, str]) -> list[Answer]:
        """Searches over QIDO-RS, page by page; see `Archive.search`.

        Args:
            level: of the answers.
            conditions: matching keys by keyword; for SERIES and IMAGE the higher levels' UIDs are part of the URL.
        """
        answers: dict[str, Answer] = {}
        while True:  # a service may cut its answer short at any length; some ignore `offset` and give the same page for ever
            page = self._search(level, dict(conditions), offset=len(answers))
            new = {answer.get(RETURN_KEYS[level][0], ""): answer for answer in page}
            if new.keys() <= answers.keys():
                return list(answers.values())
            answers = new | answers

    def fetch(self, instance: Instance) -> Dataset:
        """Fetches one image over WADO-RS; see `Archive.fetch`."""

        def request() -> Dataset:
            return self._client.retrieve_instance(
                instance.study_uid, instance.series_uid, instance.sop_uid, media_types=_AS_STORED
            )

        try:
            return self._retry_policy.retry(lambda: self._ask(request))
        except _NotFoundError:
            raise ImageError(SkipReason.NOT_DELIVERED) from None
        except ArchiveError:
            raise
        except Exception as error:  # the client parses what came, and damaged bytes make it raise nearly any class
            raise ImageError(SkipReason.CORRUPT, type(error).__name__) from None

    def close(self) -> None:
        """Closes the HTTP session."""
        self._session.close()

    def _search(self, level: Level, conditions: dict[str, str], offset: int) -> list[Answer]:
        options: dict[str, Any] = {"fields": list(RETURN_KEYS[level]), "offset": offset or None}

        def request() -> list[Any]:
            if level == "STUDY":
                return list(self._client.search_for_studies(search_filters=conditions, **options))
            if level == "SERIES":
                return list(self._client.search_for_series(conditions["StudyInstanceUID"], **options))
            return list(
                self._client.search_for_instances(conditions["StudyInstanceUID"], conditions["SeriesInstanceUID"], **options)
            )

        return [_read_answer(item) for item in self._retry_policy.retry(lambda: self._ask(request))]

    def _ask(self, request: Callable[[], T]) -> T:
        """Returns the answer to `request`; whatever goes wrong on the way becomes an ArchiveError without the address's query."""
        host = self._host
        try:
            return request()
        except requests.exceptions.SSLError:
            raise ArchiveError(
                f"TLS with the archive {host} failed: its certificate is expired, for another name or not of a known authority, or the "
                "port speaks no TLS; give the hospital's authority with --ca"
            ) from None
        except requests.exceptions.HTTPError as error:
            raise _explain_status(host, error.response.status_code if error.response is not None else 0) from None
        except requests.exceptions.Timeout:
            raise TransientArchiveError(
                f"the archive {host} did not answer within {self._retry_policy.timeout_sec:g} s; see that it runs and is not overloaded"
            ) from None
        except (requests.exceptions.RequestException, OSError) as error:
            raise TransientArchiveError(
                f"the archive {host} cannot be reached ({type(error).__name__}); check the address, the network and the firewall"
            ) from None


class _NotFoundError(ArchiveError):
    """HTTP 404: for an image, that the archive does not have it; for anything else, that there is no such service."""


def _explain_status(host: str, status: int) -> ArchiveError:
    if status in (401, 403):
        hint = "check user and password (PNEUMOFED_ARCHIVE_PASSWORD) or the token, and that the account may read images"
        return ArchiveError(f"the archive {host} refuses this account (HTTP {status}); {hint}")
    if status in (404, 405, 410):
        return _NotFoundError(f"the archive {host} has no DICOMweb service at this address (HTTP {status}); check the URL's path")
    kind = TransientArchiveError if status in _TRANSIENT_STATUSES else ArchiveError
    return kind(f"the archive {host} answered with HTTP {status}; its own log says why")


def _open_session(address: WebAddress) -> requests.Session:
    session = requests.Session()
    session.verify = address.ca or True
    if address.user:
        session.auth = (address.user, address.password or "")
    if address.token:
        session.headers["Authorization"] = f"Bearer {address.token}"
    return session


def _read_answer(item: Mapping[str, Any]) -> Answer:
    """Texts of a DICOM JSON object (PS3.18, F.2.2): `{"00080050": {"vr": "SH", "Value": ["A7"]}}`."""
    answer: dict[str, str] = {}
    for tag, element in item.items():
        values = element.get("Value") if isinstance(element, Mapping) else None
        if isinstance(values, list) and values and isinstance(values[0], str | int | float):
            answer[_keyword(tag)] = str(values[0]).strip(" \0")
    return answer


def _keyword(tag: str) -> str:
    try:
        return keyword_for_tag(int(tag, 16)) or tag
    except ValueError:
        return tag
