"""Damaged DICOM and JPEG files into everything of a site that opens files: none may crash it, hang it, or go uncounted.

    python -m benchmarks.mutated_files --files 10000 --seed 0

Each file is one of a few good ones with one kind of damage: bytes flipped, the end cut off, an element or segment replaced, doubled or
left out, or a length field with a random number. It is given to `read_image`, to the header reader of `data add dicom`, and to the
way of images from the archive (parsed, de-identified, written). A file that takes longer than `--limit` seconds counts as hung, one
that ends its process as a crash, one that raises anything but an `ImageError` as escaped. Afterwards all files lie in two folders
that `data add dicom`, `data add kaggle` and `data check` have to add and count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    RLELossless,
)

from pneumofed.client.archive.import_images import ImportRules, prepare_import
from pneumofed.client.archive.receiver import parse_file
from pneumofed.common.errors import ImageError
from pneumofed.common.imaging.dicom_header import Pseudonyms, read_header
from pneumofed.common.imaging.images import read_image
from tests.dicom_factory import dicom_bytes, draw_radiograph, lut_item

Mutation = Callable[[bytes, np.random.Generator], bytes]
_LONG_VRS = (b"OB", b"OW", b"SQ", b"UN", b"UT", b"OF", b"UC", b"UR", b"OD", b"OL")
_LENGTHS = (0, 1, 2, 7, 0xFF, 0xFFFE, 0xFFFF, 0x7FFF_FFFF, 0xFFFF_FFFE, 0xFFFF_FFFF)


def good_dicoms() -> list[bytes]:
    """DICOM files of many transfer syntaxes and pixel layouts, two with lookup tables."""
    tags: dict[str, Any] = {
        "StudyInstanceUID": UID("1.2.3"),
        "SeriesInstanceUID": UID("1.2.3.4"),
        "SOPInstanceUID": UID("1.2.3.4.5"),
        "AccessionNumber": "A7",
        "PatientAge": "063Y",
        "PatientSex": "F",
        "ViewPosition": "PA",
        "WindowCenter": "2000",
        "WindowWidth": "4000",
    }
    wide, narrow = draw_radiograph(), draw_radiograph("u1", 8)
    wide_syntaxes: tuple[UID, ...] = (
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
    )
    wide_syntaxes += (RLELossless, JPEGLosslessSV1, JPEG2000Lossless)
    files = [dicom_bytes(wide, syntax=syntax, BitsStored=12, **tags) for syntax in wide_syntaxes]
    files += [dicom_bytes(narrow, syntax=syntax, **tags) for syntax in (ExplicitVRLittleEndian, JPEGBaseline8Bit)]
    for keyword in ("ModalityLUTSequence", "VOILUTSequence"):
        files.append(dicom_bytes(wide, BitsStored=12, **(tags | {keyword: [lut_item(0, np.arange(4096), 12)]})))
    return [*files, dicom_bytes(draw_radiograph("i2", 12), BitsStored=12, preamble=False, **tags)]


def good_jpegs() -> list[bytes]:
    """JPEG files: grey, colour, progressive, and one with EXIF data."""
    grey = PIL.Image.fromarray(draw_radiograph("u1", 8))
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    variants: list[tuple[PIL.Image.Image, dict[str, Any]]] = [
        (grey, {}),
        (grey.convert("RGB"), {}),
        (grey, {"progressive": True}),
        (grey, {"exif": exif}),
    ]
    files = []
    for image, options in variants:
        buffer = BytesIO()
        image.save(buffer, "JPEG", **options)
        files.append(buffer.getvalue())
    return files


def flip_bytes(data: bytes, generator: np.random.Generator) -> bytes:
    """A few random bytes at random places, a third of them within the first kilobyte, where the headers are."""
    mutated = bytearray(data)
    reach = min(len(mutated), 1024) if generator.random() < 1 / 3 else len(mutated)
    for position in generator.integers(reach, size=generator.integers(1, 24)):
        mutated[position] = generator.integers(256)
    return bytes(mutated)


def truncate(data: bytes, generator: np.random.Generator) -> bytes:
    """The beginning of the file."""
    return data[: generator.integers(len(data))]


def change_part(data: bytes, generator: np.random.Generator) -> bytes:
    """One element or segment left out, doubled, moved to the front, or filled with random bytes."""
    parts = list(_parts(data))
    if not parts:
        return flip_bytes(data, generator)
    start, body, end = parts[generator.integers(len(parts))]
    how = generator.integers(4)
    if how == 0:
        return data[:start] + data[end:]
    if how == 1:
        return data[:end] + data[start:end] + data[end:]
    if how == 2:
        return data[: parts[0][0]] + data[start:end] + data[parts[0][0] : start] + data[end:]
    return data[:body] + generator.bytes(end - body) + data[end:]


def change_length(data: bytes, generator: np.random.Generator) -> bytes:
    """One length field with another number, often an extreme one."""
    parts = list(_parts(data))
    if not parts:
        return flip_bytes(data, generator)
    _, body, _ = parts[generator.integers(len(parts))]
    extreme = int(generator.choice(_LENGTHS))
    number = extreme if generator.random() < 0.5 else int(generator.integers(2**32))
    width = int(generator.choice((2, 4)))
    order: Literal["big", "little"] = "big" if data.startswith(b"\xff\xd8") else "little"
    return data[: body - width] + (number % 2 ** (8 * width)).to_bytes(width, order) + data[body:]


MUTATIONS: tuple[Mutation, ...] = (flip_bytes, truncate, change_part, change_length)


def _parts(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(start, start of the value, end) of each DICOM element or JPEG segment that can be told without a parser."""
    if data.startswith(b"\xff\xd8"):
        position = 2
        while position + 4 <= len(data) and data[position] == 0xFF:
            end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
            yield position, position + 4, min(end, len(data))
            position = end
        return
    position = 132 if data[128:132] == b"DICM" else 0
    while position + 8 <= len(data):
        kind = data[position + 4 : position + 6]
        if kind in _LONG_VRS:
            body, length = position + 12, int.from_bytes(data[position + 8 : position + 12], "little")
        elif kind.isalpha() and kind.isupper():
            body, length = position + 8, int.from_bytes(data[position + 6 : position + 8], "little")
        else:
            body, length = position + 8, int.from_bytes(data[position + 4 : position + 8], "little")
        end = min(body + length, len(data))
        yield position, min(body, end), end
        position = end


def make_files(folder: Path, count: int, seed: int) -> list[Path]:
    """Writes `count` damaged files, half of them in `dicom`, half in the Kaggle layout; pure in (count, seed)."""
    generator = np.random.default_rng(seed)
    kinds = {"dicom": good_dicoms(), "kaggle/train/NORMAL": good_jpegs(), "kaggle/train/PNEUMONIA": good_jpegs()}
    files = []
    for name in kinds:
        (folder / name).mkdir(parents=True)
    for number in range(count):
        name = "dicom" if number % 2 == 0 else list(kinds)[1 + number // 2 % 2]
        original = kinds[name][generator.integers(len(kinds[name]))]
        mutation = MUTATIONS[generator.integers(len(MUTATIONS))]
        ending = "dcm" if name == "dicom" else "jpeg"
        file = folder / name / f"person{number}_{mutation.__name__}.{ending}"
        file.write_bytes(mutation(original, generator))
        files.append(file)
    return files


def open_everywhere(path: Path) -> dict[str, str]:
    """What became of the file at each door: `used`, the reason why not, or `escaped: <class>`."""
    doors: dict[str, Callable[[], object]] = {"read_image": lambda: read_image(path)}
    if path.suffix == ".dcm":
        doors["header"] = lambda: read_header(path)
        doors["arrival"] = lambda: prepare_import(
            parse_file(path.read_bytes()), "1.2.3.4.5", Pseudonyms(b"k" * 32), ImportRules()
        )
    return {name: _outcome(door) for name, door in doors.items()}


def _outcome(door: Callable[[], object]) -> str:
    try:
        door()
    except ImageError as error:
        return error.reason.name
    except BaseException as error:
        return f"escaped: {type(error).__module__}.{type(error).__name__}"
    return "used"


def serve(connection: Connection) -> None:
    """Answers paths with outcomes until the other side closes."""
    while path := connection.recv():
        connection.send(open_everywhere(path))


@dataclass
class Tally:
    """Outcomes by door, and the files that broke something."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    slowest_sec: float = 0.0

    def add(self, file: Path, outcome: dict[str, str], seconds: float) -> None:
        """Counts one file."""
        self.slowest_sec = max(self.slowest_sec, seconds)
        for door, result in outcome.items():
            self.outcomes.setdefault(door, Counter())[result] += 1
            if result.startswith(("escaped", "hung", "crashed")):
                self.bad.append(f"{file.name} {door}: {result}")


class Worker:
    """One process that opens files, replaced when a file hangs or kills it."""

    def __init__(self, limit_sec: float) -> None:
        self._limit_sec = limit_sec
        self._process: BaseProcess | None = None

    def open(self, file: Path) -> dict[str, str]:
        """The outcomes of `file`."""
        if self._process is None:
            self._connection, theirs = get_context("spawn").Pipe()
            self._process = get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
            self._connection.send(file)
            self._connection.poll(60)  # the imports of a new process are not the file's fault
        else:
            self._connection.send(file)
        try:
            if self._connection.poll(self._limit_sec):
                answer: dict[str, str] = self._connection.recv()
                return answer
            result = "hung"
        except (EOFError, ConnectionError):
            self._process.join(10)
            result = f"crashed with {self._process.exitcode}"
        self.close()
        return {"process": result}

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def open_all(files: list[Path], limit_sec: float) -> Tally:
    """The outcomes of all files, one after the other."""
    tally, worker = Tally(), Worker(limit_sec)
    try:
        for file in files:
            started = time.perf_counter()
            tally.add(file, worker.open(file), time.perf_counter() - started)
    finally:
        worker.close()
    return tally


def add_all(folder: Path) -> dict[str, dict[str, object]]:
    """What the commands say of all files at once; each has to end by itself and to account for every file."""
    site = folder / "site"
    site.mkdir()
    (site / "site.yaml").write_text("name: mutated\nmanifest: data/manifest.csv\nwork_dir: work\n")
    (site / "labels.csv").write_text("AccessionNumber,StudyInstanceUID,label\nA7,1.2.3,normal\n")
    commands = {
        "add dicom": ["add", "dicom", str(folder / "dicom"), "--labels", str(site / "labels.csv")],
        "add kaggle": ["add", "kaggle", str(folder / "kaggle")],
        "check": ["check"],
    }
    program = [sys.executable, "-c", "from pneumofed.client.cli.data import app; app()"]
    reports = {}
    for name, arguments in commands.items():
        command = [*program, *arguments, "--site", str(site), "--json"]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
        report = json.loads(done.stdout) if done.stdout.strip() else {}
        accounted = bool(report) and report["found"] == report["used"] + sum(report["skipped"].values())
        seconds = round(time.perf_counter() - started, 1)
        reports[name] = {
            "exit": done.returncode,
            "sec": seconds,
            "all counted": accounted,
            **report,
            "errors": done.stderr[-500:],
        }
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=10.0, help="seconds for a file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        files = make_files(Path(name), options.files, options.seed)
        started = time.perf_counter()
        tally = open_all(files, options.limit)
        print(f"{len(files)} files in {time.perf_counter() - started:.0f} s, the slowest {tally.slowest_sec:.2f} s")
        for door, outcomes in tally.outcomes.items():
            print(door, json.dumps(dict(outcomes.most_common())))
        print("crashed, hung or escaped:", len(tally.bad), *tally.bad[:20], sep="\n  ")
        for command, report in add_all(Path(name)).items():
            print(command, json.dumps(report))
    sys.exit(bool(tally.bad))


if __name__ == "__main__":
    main()
