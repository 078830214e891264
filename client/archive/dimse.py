"""An archive over the classic protocol, DIMSE: C-FIND to search, C-GET or C-MOVE to fetch (DICOM PS3.4, annex C; PS3.7).

DimseAddress    where the archive listens, and under which AE titles both sides speak (PS3.8, 9.3)
DimseArchive    `client.archive.query.Archive` over one association
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydicom.dataset import Dataset
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)

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
from pneumofed.client.archive.receiver import STORAGE_CLASSES, TRANSFER_SYNTAXES, Receiver
from pneumofed.common.errors import ArchiveError, ConfigError, ImageError, SkipReason
from pneumofed.common.imaging.dicom_tags import text_of

logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)  # it logs what is sent and received

_FIND, _GET, _MOVE = (
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)
_SUCCESS, _UNKNOWN_DESTINATION, _NO_SUB_OPERATION = 0x0000, 0xA801, 0xA702
"""PS3.4, tables C.4-2 and C.4-3. A702, unable to perform sub-operations, is also sent by archives for an image that they cannot send."""
_PENDING = (0xFF00, 0xFF01)
_REJECTED = {
    3: "it does not know this site's AE title; have the archive's administrator register it (--ae-title)",
    7: "it goes by another AE title; ask the archive's administrator for it (--called-ae-title)",
}
"""Diagnostics of the service user (PS3.8, table 9-21)."""


@dataclass(frozen=True)
class DimseAddress:
    """Where an archive listens, the AE titles of both sides, and how images come back."""

    host: str
    port: int
    called_ae_title: str
    ae_title: str = "PNEUMOFED"
    retrieve: Literal["get", "move"] = "get"
    listen_host: str = "0.0.0.0"
    listen_port: int = 11112
    """Of C-MOVE only: where the archive sends images to. It has to know this port under `ae_title`."""
    tls: bool = False
    ca: str | None = None

    def __post_init__(self) -> None:
        """Refuses AE titles and ports that cannot be.

        Raises:
            ConfigError: an AE title is not 1 to 16 printable characters (PS3.5, 6.2: AE), or a port is out of range.
        """
        for title in (self.called_ae_title, self.ae_title):
            if not (1 <= len(title.strip()) <= 16 and title.isascii() and title.isprintable() and "\\" not in title):
                raise ConfigError(f"AE title '{title}': expected 1 to 16 printable characters")
        if not (0 < self.port < 2**16 and 0 < self.listen_port < 2**16):
            raise ConfigError(f"ports: expected 1 to 65535, got {self.port} and {self.listen_port}")


class DimseArchive:
    """`client.archive.query.Archive` over the classic protocol, with one association that is opened again when it breaks."""

    def __init__(self, address: DimseAddress, retry: RetryPolicy) -> None:
        self._address = address
        self._retry_policy = retry
        self._receiver = Receiver()
        self._association: Association | None = None
        self._server: Any = None

    def search(self, level: Level, conditions: Mapping[str, str]) -> list[Answer]:
        """Searches by C-FIND; see `Archive.search`.

        Args:
            level: of the answers.
            conditions: matching keys by keyword, the higher levels' UIDs among them.
        """
        return self._retry_policy.retry(lambda: self._search(level, conditions))

    def fetch(self, instance: Instance) -> bytes:
        """Fetches one image by C-GET or C-MOVE, as the address says; see `Archive.fetch`."""
        return self._retry_policy.retry(lambda: self._fetch(instance))

    def close(self) -> None:
        """Releases the association and stops listening."""
        if self._association is not None and self._association.is_established:
            self._association.release()
        self._association = None
        if self._server is not None:
            self._server.shutdown()
            self._server = None

    def _search(self, level: Level, conditions: Mapping[str, str]) -> list[Answer]:
        request = Dataset()
        request.QueryRetrieveLevel = level
        for keyword in RETURN_KEYS[level]:
            setattr(request, keyword, "")
        for keyword, value in conditions.items():
            setattr(request, keyword, value)
        answers: list[Answer] = []
        for status, found in self._send("send_c_find", request, _FIND):
            if self._read_status(status, "search"):
                if found is None:
                    raise RequestError(f"the archive {self._name} sent an answer to a search that cannot be read")
                answers.append({keyword: text_of(found, keyword) for keyword in RETURN_KEYS[level]})
        return answers

    def _fetch(self, instance: Instance) -> bytes:
        request = Dataset()
        request.QueryRetrieveLevel = "IMAGE"
        request.StudyInstanceUID, request.SeriesInstanceUID = instance.study_uid, instance.series_uid
        request.SOPInstanceUID = instance.sop_uid
        with self._receiver.expect(instance.sop_uid):
            if self._address.retrieve == "get":
                responses = self._send("send_c_get", request, _GET)
            else:
                self._listen()
                responses = self._send("send_c_move", request, self._address.ae_title, _MOVE)
            try:
                for status, _ in responses:
                    self._read_status(status, "transfer")
            except RequestError:
                if self._receiver.take() is None:  # else it came, whatever the archive says of it
                    raise
            data = self._receiver.take()
        if data is None:
            raise ImageError(SkipReason.NOT_DELIVERED)
        return data

    def _send(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._associate(), method)(*arguments)
        except (
            ValueError
        ) as error:  # pynetdicom: the request cannot be written, or there is no accepted presentation context for it
            if "encode" in str(error):
                raise RequestError("a number of an examination has characters that a DICOM request cannot hold") from None
            raise ArchiveError(
                f"the archive {self._name} does not offer this site {method.removeprefix('send_').replace('_', '-').upper()}; "
                "ask its administrator, or choose the other of --retrieve get and move"
            ) from None

    def _read_status(self, status: Dataset, what: str) -> bool:
        """True for an answer with content, False at the end.

        Raises:
            TransientRequestError: the connection broke or the archive has no resources now.
            RequestError: the archive fails or refuses this request.
            ArchiveError: it would refuse all.
        """
        if "Status" not in status:
            raise TransientRequestError(
                f"the archive {self._name} broke off or did not answer in time during a {what}; see that it "
                f"knows the AE title {self._address.ae_title} and is not overloaded"
            )
        code = int(status.Status)
        if code == _UNKNOWN_DESTINATION:
            raise ArchiveError(
                f"the archive {self._name} does not know where {self._address.ae_title} is (C-MOVE status A801); have its "
                f"administrator register this AE title with this machine's address and port {self._address.listen_port}"
            )
        if what == "transfer" and (code == 0xB000 or code & 0xF000 == 0xC000 or code == _NO_SUB_OPERATION):
            if status.get("NumberOfFailedSuboperations"):
                # One image was asked for, so it is this one that the archive cannot send: often in a transfer syntax, or of a SOP
                # class, that was not offered to it, which another try does not change.
                raise RequestError(f"the archive {self._name} cannot send an image (status {code:04X}); its own log says why")
            if code != _NO_SUB_OPERATION:
                return False  # what has arrived decides
        if code & 0xFF00 == 0xA700:  # refused: out of resources, of several kinds
            raise TransientRequestError(f"the archive {self._name} is out of resources (status {code:04X})")
        if code not in (_SUCCESS, *_PENDING):
            raise RequestError(f"the archive {self._name} refuses a {what} (status {code:04X}); its own log says why")
        return code in _PENDING

    @property
    def _name(self) -> str:
        return f"{self._address.called_ae_title} at {self._address.host}:{self._address.port}"

    def _associate(self) -> Association:
        """Returns the open association, or a new one.

        Raises:
            TransientArchiveError: the archive cannot be reached.
            ArchiveError: it rejects the association, or TLS fails.
        """
        if self._association is not None and self._association.is_established:
            return self._association
        entity = AE(ae_title=self._address.ae_title)
        entity.acse_timeout = entity.dimse_timeout = self._retry_policy.timeout_sec
        entity.network_timeout = entity.connection_timeout = self._retry_policy.timeout_sec
        opened: list[bool] = []
        association = entity.associate(
            self._address.host,
            self._address.port,
            contexts=_contexts(self._address.retrieve),
            ae_title=self._address.called_ae_title,
            ext_neg=[build_role(uid, scp_role=True) for uid in STORAGE_CLASSES] if self._address.retrieve == "get" else [],
            tls_args=self._tls_args(),
            evt_handlers=[(evt.EVT_C_STORE, self._receiver.store), (evt.EVT_CONN_OPEN, lambda _: opened.append(True))],
        )
        if not association.is_established:
            raise self._explain_refusal(association, bool(opened))
        self._association = association
        return association

    def _explain_refusal(self, association: Association, opened: bool) -> ArchiveError:
        if association.is_rejected:
            answer = association.acceptor.primitive
            diagnostic = getattr(answer, "diagnostic", None)
            if getattr(answer, "result_source", None) == 1 and diagnostic in _REJECTED:
                return ArchiveError(f"the archive {self._name} refuses the association: {_REJECTED[diagnostic]}")
            busy = getattr(answer, "result", None) == 2  # transient (PS3.8, table 9-21)
            kind = TransientArchiveError if busy else ArchiveError
            return kind(f"the archive {self._name} refuses the association; its own log says why")
        if not opened:
            hint = "check host and port, the network and the firewall" + (", and its certificate" if self._address.tls else "")
            return TransientArchiveError(f"the archive {self._name} cannot be reached; {hint}")
        return TransientArchiveError(
            f"the archive {self._name} takes connections but no association; check that the port speaks DICOM"
            + ("" if self._address.tls else ", and whether it wants TLS (--tls)")
        )

    def _tls_args(self) -> tuple[ssl.SSLContext, str] | None:
        if not self._address.tls:
            return None
        try:
            return ssl.create_default_context(cafile=self._address.ca), self._address.host
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"certificate authority {self._address.ca} cannot be read: {type(error).__name__}") from None

    def _listen(self) -> None:
        if self._server is not None:
            return
        entity = AE(ae_title=self._address.ae_title)
        entity.require_called_aet = True
        entity.network_timeout = self._retry_policy.timeout_sec
        for uid in STORAGE_CLASSES:
            entity.add_supported_context(uid, list(TRANSFER_SYNTAXES))
        where = (self._address.listen_host, self._address.listen_port)
        try:
            self._server = entity.start_server(where, block=False, evt_handlers=[(evt.EVT_C_STORE, self._receiver.store)])
        except OSError as error:
            raise ConfigError(f"port {where[1]} for images from the archive cannot be opened: {error.strerror}") from None


def _contexts(retrieve: str) -> list[Any]:
    """The services to ask for. For C-GET each transfer syntax has its own context, so that the archive can send each image as it is."""
    if retrieve == "move":
        return [build_context(_FIND), build_context(_MOVE)]
    storage = [build_context(uid, syntax) for uid in STORAGE_CLASSES for syntax in TRANSFER_SYNTAXES]
    return [build_context(_FIND), build_context(_GET), *storage]
