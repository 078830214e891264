"""Which patients have withdrawn: the site's own list of those who are not added again.

It lies beside the manifest and holds no number of a patient as the hospital knows it, but the site's keyed pseudonym of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from client.archive.pseudonyms import Pseudonyms, load_pseudonyms
from common.data.atomic import write_file

FILE = "withdrawn.txt"


@dataclass(frozen=True)
class Withdrawals:
    """Pseudonyms of the withdrawn."""

    listed: frozenset[str]
    pseudonyms: Pseudonyms

    @classmethod
    def of(cls, folder: Path) -> Withdrawals:
        """Those that `folder`, the manifest's, lists; not to be called while its lock is held.

        Raises:
            ConfigError: the key of the pseudonyms cannot be used.
        """
        path = folder / FILE
        listed = frozenset(path.read_text(encoding="utf-8").splitlines()) if path.exists() else frozenset()
        return cls(listed, load_pseudonyms(folder))

    def cover(self, patient: str) -> bool:
        """Whether `patient`, a pseudonym or a number, is among them."""
        return patient in self.listed or self.pseudonyms.patient(patient) in self.listed

    def extended(self, patients: Iterable[str]) -> Withdrawals:
        """These and `patients`. Each is listed as the pseudonym of what was given; one that is a pseudonym already, as it is too."""
        given = {patient.strip() for patient in patients} - {""}
        own = {patient for patient in given if self.pseudonyms.is_pseudonym(patient)}
        return Withdrawals(self.listed | own | {self.pseudonyms.patient(patient) for patient in given}, self.pseudonyms)

    def write(self, folder: Path) -> None:
        write_file(folder / FILE, "".join(f"{name}\n" for name in sorted(self.listed)).encode())
