"""An archive over DICOMweb: QIDO-RS to search and WADO-RS to fetch (DICOM PS3.18, 10.6 and 10.4)."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import quote, urlsplit

import httpx

from pneumofed.client.archive.http_answers import read_instance, read_matches
from pneumofed.client.archive.query import (
    RETURN_KEYS,
    Answer,
    Instance,
    Level,
    RequestError,
    RetryPolicy,
    TransientArchiveError,
    TransientRequestError,
)
from pneumofed.common.errors import ArchiveError, ConfigError, ImageError, SkipReason

for _name in ("httpx", "httpcore"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)  # they log addresses, which hold accession numbers

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_TRANSIENT_STATUSES = frozenset(
    {202, 408, 425, 429, 500, 502, 503, 504}
)  # 202: the image comes from a slower store (PS3.18, 8.5)
_NOT_ACCEPTABLE = frozenset({400, 406, 415})
"""No answer in a form that we accept (PS3.18, 8.7.5), or what services send that cannot read the Accept field."""
_NO_SUCH_PAGE = frozenset({400, 404, 410, 416})
"""What services send for an offset behind the last match; by the standard it is an empty answer (PS3.18, 8.3.4.4)."""
_JSON = ("application/dicom+json, application/json;q=0.9", "application/json", "*/*")
_MULTIPART = 'multipart/related; type="application/dicom"'
_DICOM = (f"{_MULTIPART}; transfer-syntax=*", _MULTIPART, "application/dicom; transfer-syntax=*", "application/dicom", "*/*")
"""Media types to ask for, one after the other until one is acceptable: as stored, whatever the transfer syntax (PS3.18, 8.7.3.5.2), as
Explicit VR Little Endian, and bare, without the multipart message."""


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
        self._url = address.url.rstrip("/")
        self._host = urlsplit(address.url).netloc
        self._retry_policy = retry
        self._client = _open_client(address, retry.timeout_sec)
        self._accepted = {_JSON: 0, _DICOM: 0}
        """Which of the media types the service took last, so that it is not asked for others each time."""
        self._answers_searches = False

    def search(self, level: Level, conditions: Mapping[str, str]) -> list[Answer]:
        """Searches over QIDO-RS, page by page; see `Archive.search`.

        Args:
            level: of the answers.
            conditions: matching keys by keyword; for SERIES and IMAGE the higher levels' UIDs are part of the URL.
        """
        path, filters = _search_path(level, conditions)
        query = [*filters.items(), *(("includefield", keyword) for keyword in RETURN_KEYS[level])]
        pages: list[Answer] = []
        found: set[str] = set()
        is_cut = False
        while True:  # a service may cut its answer short at any length; some ignore `offset` and give the same page for ever
            offset = [("offset", str(len(pages)))] if pages else []
            page = self._retry_policy.retry(lambda: self._get(path, [*query, *offset], _JSON))  # noqa: B023 - called at once
            if pages and not is_cut and page.status_code in _NO_SUCH_PAGE:
                return pages
            if page.status_code == HTTPStatus.NOT_FOUND and self._is_service():
                return pages
            self._check(page)
            self._answers_searches = True
            answers = read_matches(page)
            new = {uid for answer in answers if (uid := answer.get(RETURN_KEYS[level][0], ""))}
            if pages and new <= found:
                return pages
            pages += [answer for answer in answers if answer.get(RETURN_KEYS[level][0], "") not in found]
            found |= new
            is_cut = page.headers.get("Warning", "").strip().startswith("299")  # there are more matches: PS3.18, 8.3.4.4
            if not answers:
                return pages

    def fetch(self, instance: Instance) -> bytes:
        """Fetches one image over WADO-RS; see `Archive.fetch`."""
        path = f"/studies/{_quote(instance.study_uid)}/series/{_quote(instance.series_uid)}/instances/{_quote(instance.sop_uid)}"

        def request() -> bytes:
            answer = self._get(path, [], _DICOM)
            if answer.status_code in (204, 404, 410):
                raise ImageError(SkipReason.NOT_DELIVERED)
            self._check(answer)
            return read_instance(answer)

        return self._retry_policy.retry(request)

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _is_service(self) -> bool:
        """Whether there is a DICOMweb service that answers searches, so that HTTP 404 to one means that nothing matches."""
        if not self._answers_searches:
            answer = self._retry_policy.retry(lambda: self._get("/studies", [("limit", "1")], _JSON))
            self._answers_searches = answer.status_code in (200, 204, 206)
        return self._answers_searches

    def _get(self, path: str, query: list[tuple[str, str]], accepts: tuple[str, ...]) -> httpx.Response:
        """Returns the answer in the first of the media types that the service takes; whatever its status, but those worth another try.

        Raises:
            TransientRequestError: the service is busy, or the answer was cut off.
            ArchiveError: there is no connection. Its text has nothing of the query.
        """
        start = self._accepted[accepts]
        answer = self._send(path, query, accepts[start])
        for index in range(len(accepts)):
            if answer.status_code not in _NOT_ACCEPTABLE or index == start:
                continue
            other = self._send(path, query, accepts[index])
            if other.is_success:
                self._accepted[accepts] = index
                return other
        if answer.status_code in _TRANSIENT_STATUSES:
            raise TransientRequestError(f"the archive {self._host} answered with HTTP {answer.status_code}; its own log says why")
        return answer

    def _send(self, path: str, query: list[tuple[str, str]], accept: str) -> httpx.Response:
        host = self._host
        try:
            return self._client.get(
                self._url + path, params=httpx.QueryParams(tuple(query)) if query else None, headers={"Accept": accept}
            )
        except httpx.ConnectError as error:
            if _is_about_tls(error):
                raise ArchiveError(
                    f"TLS with the archive {host} failed: its certificate is expired, for another name or not of a known authority, or "
                    "the port speaks no TLS; give the hospital's authority with --ca"
                ) from None
            raise self._unreachable(error) from None
        except (httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError, httpx.UnsupportedProtocol) as error:
            raise self._unreachable(error) from None
        except httpx.TimeoutException:
            raise TransientRequestError(
                f"the archive {host} did not answer within {self._retry_policy.timeout_sec:g} s; see that it runs and is not overloaded"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise TransientRequestError(
                f"the archive {host} broke off its answer ({type(error).__name__}); its own log says why"
            ) from None

    def _unreachable(self, error: Exception) -> ArchiveError:
        return TransientArchiveError(
            f"the archive {self._host} cannot be reached ({type(error).__name__}); check the address, the network and the firewall"
        )

    def _check(self, answer: httpx.Response) -> None:
        """Raises what a status other than success means: an ArchiveError where all requests would fail, else a RequestError."""
        status, host = answer.status_code, self._host
        if status in (401, 407):
            hint = "check user and password (PNEUMOFED_ARCHIVE_PASSWORD) or the token, and that the account may read images"
            raise ArchiveError(f"the archive {host} refuses this account (HTTP {status}); {hint}")
        if status == HTTPStatus.FORBIDDEN:
            raise RequestError(
                f"the archive {host} refuses this account an examination (HTTP 403); it may not be allowed to read it"
            )
        if status in (404, 405, 410) and not self._answers_searches:
            raise ArchiveError(
                f"the archive {host} has no DICOMweb service at this address (HTTP {status}); check the URL's path"
            )
        if not answer.is_success:
            raise RequestError(f"the archive {host} answered with HTTP {status}; its own log says why")


def _search_path(level: Level, conditions: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """The path of a search (PS3.18, 10.6.1) and what is left for its query."""
    if level == "STUDY":
        return "/studies", dict(conditions)
    path = f"/studies/{_quote(conditions['StudyInstanceUID'])}/series"
    return (path, {}) if level == "SERIES" else (f"{path}/{_quote(conditions['SeriesInstanceUID'])}/instances", {})


def _quote(uid: str) -> str:
    return quote(uid, safe="").replace("..", "%2E%2E")


def _open_client(address: WebAddress, timeout_sec: float) -> httpx.Client:
    try:
        context = ssl.create_default_context(cafile=address.ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"certificate authority {address.ca} cannot be read: {type(error).__name__}") from None
    return httpx.Client(
        verify=context,
        auth=(address.user, address.password or "") if address.user else None,
        headers={"Authorization": f"Bearer {address.token}"} if address.token else {},
        timeout=timeout_sec,
        follow_redirects=True,
    )


def _is_about_tls(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return True
        error = error.__cause__ or error.__context__
    return False
