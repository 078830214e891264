"""Public DICOM files of test packages, read and compared with an independent decoder (GDCM, where it is installed).

    python -m benchmarks.public_dicom FOLDER ...

Without a folder the files in the package pydicom are taken. For each file: read, or refused with the reason; and where it was read, the
largest difference of its stored values to what the other decoder gives. `pip install python-gdcm` beside the project gives the other one.
"""

from __future__ import annotations

import argparse
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
from pydicom.pixels import pixel_array

from pneumofed.common.errors import ImageError
from pneumofed.common.imaging.dicom_pixels import parse, read_codes, read_layout
from pneumofed.common.imaging.dicom_tags import quiet_warnings
from pneumofed.common.imaging.images import decode_image


def compare(data: bytes) -> str:
    """Returns what the stored values of our decoder are to the other's: `same`, the largest difference, or why there is none."""
    dataset = parse(data)
    layout = read_layout(dataset)
    ours = layout.values_of(read_codes(dataset, layout))
    other = pydicom.dcmread(BytesIO(data), force=True)
    syntax = other.file_meta.get("TransferSyntaxUID") if hasattr(other, "file_meta") else None
    try:
        plugin = "gdcm" if syntax and syntax.is_encapsulated and "RLE" not in syntax.name else ""
        theirs = pixel_array(other, decoding_plugin=plugin, raw=True)
    except Exception as error:  # of the other decoder, on files that are broken on purpose
        return f"no other value ({type(error).__name__})"
    if theirs.shape != ours.shape:
        return f"shape {theirs.shape}"
    most = float(np.abs(ours - theirs).max())
    return "same" if most == 0 else f"differs by {most:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path(pydicom.__file__).parent / "data"])
    counts: Counter[str] = Counter()
    for folder in parser.parse_args().folders:
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in (".dcm", "")):
            data = path.read_bytes()
            try:
                with quiet_warnings():
                    decode_image(data)
                    outcome = f"read, {compare(data)}"
            except ImageError as error:
                outcome = f"refused: {error}"
            counts[outcome.split(" (")[0].split(" by ")[0]] += 1
            print(f"{path.name}\t{outcome}")
    print("\n".join(f"{count:4d}  {outcome}" for outcome, count in counts.most_common()))


if __name__ == "__main__":
    main()
