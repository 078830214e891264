"""Where in a CT volume a model finds its evidence: Grad-CAM in three dimensions, over the volume's own slices, as numbers and as pictures.

`explain_volume` makes the maps of one volume (`inference.explain.cam.volume_map`) with what is said of them, `save_map` writes one as NIfTI
or DICOM, `explain_volumes` does what `pneumofed explain` does for a model that judges CT. Method, checks and words are those of radiographs
(`inference.explain.files`); of a volume there are class activation maps only, and nothing is said of lungs and markers, which are found
in radiographs.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pneumofed.common.config.classes import positive_word
from pneumofed.common.errors import ConfigError, ImageError
from pneumofed.common.evaluation.plots import write
from pneumofed.common.evaluation.similarity import ssim
from pneumofed.common.files import atomic_write
from pneumofed.common.imaging.types import Image
from pneumofed.common.imaging.volumes import NIFTI_ENDINGS, Volume, is_nifti, nifti_affine, read_volume, turn_back
from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.model_bundle.predictor import Predictor
from pneumofed.common.model_bundle.series import as_input, find_series, read_series_header
from pneumofed.common.model_bundle.suitability import Judgement
from pneumofed.common.ops.progress import NO_PROGRESS, Progress
from pneumofed.inference.explain.cam import VolumeMap, refuse_others, volume_map
from pneumofed.inference.explain.faithfulness import LEAST_PAIRS, Likeness, Sanity, conclude, randomised, spearman
from pneumofed.inference.explain.files import (
    CHECK,
    MAP_LIMITS_NOTE,
    PHANTOM_NOTE,
    ExplanationReport,
    ExplanationRequest,
    ExplanationSetup,
    explain_beside,
    explain_each,
    headline,
    json_entry,
    network_input,
    population_line,
    read_usable,
)
from pneumofed.inference.explain.methods import FACTS, Method
from pneumofed.inference.explain.pictures import choose_slices, draw_slices, place_on_slices, strongest_slices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pneumofed.common.imaging.dicom_header import DicomHeader

CHECKED_VOLUMES = 2
"""With three random networks each they are `LEAST_PAIRS` pairs of maps."""


def check_volume_maps(
    network: nn.Module, images: Sequence[Image], predictor: Predictor, request: ExplanationRequest
) -> dict[Method, Sanity]:
    """Checks whether the maps of each method depend on the weights, as `inference.explain.faithfulness.sanity_check` does for radiographs;
    nothing without volumes, or where it was not asked for.

    Args:
        network: the bundle's.
        images: volumes as the network takes them, to make the maps of; a few are enough.
        predictor: of the bundle.
        request: the methods, the target, the seed and the detail.
    """
    if not (images and request.checked):
        return {}
    volumes = [network_input(predictor, image) for image in images]
    networks = [randomised(network, 1.0, request.seed + number) for number in range(math.ceil(LEAST_PAIRS / len(volumes)))]
    found: dict[Method, Sanity] = {}
    for method in request.methods:
        likenesses: list[Likeness] = []
        for volume in volumes:
            maps = [volume_map(one, volume, request.target, method, request.detail).values for one in (network, *networks)]
            likenesses += [_likeness(maps[0], other) for other in maps[1:]]
        found[method] = conclude(method, likenesses)
    return found


def _likeness(first: NDArray[np.float32], second: NDArray[np.float32]) -> Likeness:
    """Neither map is below zero; their structure is compared slice by slice."""
    rank = spearman(first, second)
    scaled = [values.astype(np.float64) / max(float(values.max()), 1e-30) for values in (first, second)]
    structure = math.nan if math.isnan(rank) else float(np.mean([ssim(*pair) for pair in zip(*scaled, strict=True)]))
    return Likeness(rank, rank, structure)


@dataclass(frozen=True)
class ExplainedVolume:
    """One map of one volume, with what is said of it.

    Attributes:
        volume: as it was read.
        found: the map over the network's grid.
        method: that made it.
        lines: for the reader.
        numbers: Instance Number of each slice of a DICOM series; empty of another volume.
    """

    volume: Volume = field(repr=False)
    found: VolumeMap
    method: Method
    lines: tuple[str, ...]
    numbers: tuple[int, ...] = ()

    def draw(self, title: str) -> Figure:
        """Draws the volume's slices with most of the map's weight; `title` stands after the method's name."""
        return draw_slices(self.volume, self.found.values, self.method, title, self.lines, self.numbers)

    def on_slices(self) -> NDArray[np.float32]:
        """Returns the map over all of the volume's own slices, float32 [slices, rows, columns] as `Volume.hounsfield`."""
        return place_on_slices(self.found.values, self.volume, range(len(self.volume.hounsfield)))

    def after(self, lines: tuple[str, ...]) -> ExplainedVolume:
        """Returns the same with `lines` before its own."""
        return replace(self, lines=(*lines, *self.lines))

    def in_steps(self) -> tuple[NDArray[np.uint8], float]:
        """Returns `on_slices` in 255 steps, uint8, and the value of one step: a map that is coarse needs no more, and takes a quarter."""
        step = (float(self.found.values.max()) or 1.0) / 255
        stored = np.empty(self.volume.hounsfield.shape, np.uint8)
        for place in range(len(stored)):
            stored[place] = np.rint(place_on_slices(self.found.values, self.volume, [place])[0] / step)
        return stored, step


@dataclass(frozen=True)
class ReadVolume:
    """A volume as it lies in the archive, and as the network takes it.

    Attributes:
        volume: as it was read.
        image: of it, in the network's grid.
        numbers: of its slices in the archive; empty of NIfTI, and where slices are not axial.
        header: of a DICOM series, of its first file.
    """

    volume: Volume
    image: Image
    numbers: tuple[int, ...] = ()
    header: DicomHeader | None = field(default=None, repr=False)


def read_explainable(path: Path, predictor: Predictor) -> ReadVolume:
    """Reads a volume as `explain_volume` takes it.

    Args:
        path: the folder of a DICOM series, a multi-frame DICOM file, or a NIfTI file.
        predictor: of the bundle.

    Raises:
        ImageError: it cannot be used, or is no CT.
    """
    volume, image = read_volume(path), predictor.manifest.preprocessing.image
    if is_nifti(path):
        return ReadVolume(volume, as_input(volume, image))
    from pneumofed.inference.predict.dicom_contents import list_axial_slices, slice_numbers

    header = read_series_header(path)
    return ReadVolume(volume, as_input(volume, image, header), slice_numbers(list_axial_slices(path)), header)


def explain_volume(
    setup: ExplanationSetup, image: Image, judgement: Judgement, volume: Volume, numbers: tuple[int, ...] = ()
) -> Iterator[ExplainedVolume]:
    """Makes one map for each of the methods that were asked for, in their order; none of a volume that cannot be judged.

    Args:
        setup: the bundle, what was asked for, and what the check found.
        image: of the volume, as it was judged.
        judgement: of `image`.
        volume: as it was read.
        numbers: of its slices.
    """
    request, predictor = setup.request, setup.predictor
    for method in request.methods if judgement.prediction else ():
        found = volume_map(setup.network, network_input(predictor, image), request.target, method, request.detail)
        lines = describe_map(found, method, request, predictor, setup.sanity.get(method))
        yield ExplainedVolume(volume, found, method, (*population_line(judgement), *lines), numbers)


def save_map(explained: ExplainedVolume, target: Path, source: Path | None, predictor: Predictor) -> None:
    """Writes a map over the volume's own slices: each voxel of the source has one of the map, in `ExplainedVolume.in_steps`.

    Args:
        explained: the map.
        target: `.nii` or `.nii.gz`, which needs nibabel, or `.dcm`, a Parametric Map in the study and of the patient of the source.
        source: what the volume was read from; a NIfTI file's map has its axes. None of one that was made by hand.
        predictor: that judged it.

    Raises:
        ConfigError: there is no place in space to write, nibabel is not installed, or the source is no DICOM series.
        ImageError, ValueError, TypeError, AttributeError, KeyError: the source's header does not allow it.
    """
    if explained.volume.affine is None:
        raise ConfigError(f"{target}: this volume states no place in space; read it from a series or a NIfTI file")
    stored, step = explained.in_steps()
    if target.name.lower().endswith(NIFTI_ENDINGS):
        _save_nifti(stored, step, explained.volume.affine, target, source)
        return
    if source is None or is_nifti(source):
        raise ConfigError(f"{target}: a DICOM map belongs to a DICOM series; give a name that ends in .nii.gz")
    from pneumofed.inference.predict.dicom_objects import MapScale, make_parametric_map

    title = FACTS[explained.method].title
    made = make_parametric_map(source, stored, explained.volume.affine, MapScale(step, title), predictor)
    with atomic_write(target) as file:
        made.save_as(file, enforce_file_format=True)


def _save_nifti(stored: NDArray[np.uint8], step: float, affine: NDArray[np.float64], target: Path, source: Path | None) -> None:
    """On the axes of `source` if that is NIfTI, else from the patient's right to the left, front to back, feet to head."""
    try:
        import nibabel
    except ImportError:
        raise ConfigError(f"{target}: NIfTI needs nibabel; run: pip install 'pneumofed[ct]'") from None
    if source is not None and is_nifti(source):
        opened: Any = nibabel.load(source)
        original, own = nifti_affine(opened), opened.affine
    else:
        original = affine[:, [2, 1, 0, 3]]
        own = np.diag([-1.0, -1.0, 1.0, 1.0]) @ original
    image = nibabel.Nifti1Image(turn_back(stored, affine, original), own)
    image.header.set_slope_inter(step, 0.0)
    image.header.set_xyzt_units(opened.header.get_xyzt_units()[0] if source is not None and is_nifti(source) else "mm")
    with atomic_write(target) as file:
        content = image.to_bytes()
        file.write(gzip.compress(content, 1, mtime=0) if target.name.lower().endswith(".gz") else content)


def explain_volumes(
    paths: Sequence[Path],
    bundle: Bundle,
    out: Path,
    request: ExplanationRequest,
    tell: Callable[[str], None],
    progress: Progress = NO_PROGRESS,
) -> ExplanationReport:
    """Writes for each series `NUMBER-METHOD.npy`, the map on the network's grid, `.dcm` or `.nii.gz`, the map on the series' own slices,
    `.png`, its strongest slices, and `explanations.json` into `out`.

    Args:
        paths: series, NIfTI files, and folders that are searched with all below them. What cannot be read is counted, with its reason.
        bundle: of a model that judges CT volumes.
        out: made if missing.
        request: what is asked for.
        tell: takes a sentence after each series.
        progress: shows how many series are explained.

    Raises:
        ConfigError: a method or detail that is not made of volumes.
        EmptySiteError: no series could be read; the JSON file says why.
    """
    refuse_others(request.methods, request.detail)
    out.mkdir(parents=True, exist_ok=True)
    report, predictor = ExplanationReport(bundle.digest), Predictor(bundle, threads=1)
    network, readable = bundle.load_network(run_code=request.run_code), list(read_usable(find_series(paths), predictor, report))
    images = (predictor.read(path).image for path in readable) if request.checked else iter(())
    judged = list(islice((image for image in images if predictor.judge([image])[0].prediction), CHECKED_VOLUMES))
    if judged:
        progress.show(CHECK, note=f"{len(judged)} volumes, {len(request.methods)} methods")
    verdicts = check_volume_maps(network, judged, predictor, request)
    progress.finish(CHECK)
    report.sanity = {method: found.as_json() for method, found in verdicts.items()}
    setup = ExplanationSetup(predictor, network, request, verdicts)
    explain_each(readable, partial(_explain, setup), report, out, tell, progress, "series")
    return report


def _explain(setup: ExplanationSetup, path: Path, stem: Path) -> dict[str, Any]:
    """Writes all maps of one series; what the JSON file says of it."""
    read, table = read_explainable(path, setup.predictor), setup.request.clinical
    volume, numbers, values = read.volume, read.numbers, table.find(path, read.header) if table else None
    (judgement,) = setup.predictor.judge([read.image], [str(path)], [values])
    explain = partial(explain_volume, volume=volume, numbers=numbers)
    explained, evidence = explain_beside(explain, setup, read.image, judgement, values)
    maps: dict[Method, Any] = {}
    for made in explained:
        found, name = made.found, f"{stem.name}-{made.method}"
        with atomic_write(stem.with_name(f"{name}.npy")) as file:
            np.save(file, found.values)
        write(made.draw(headline(judgement)), stem.with_name(f"{name}.png"))
        slices, shown = len(found.values), choose_slices(found.values, len(found.values), volume)
        maps[made.method] = {
            "score": found.score, "detail": setup.request.detail, "cells": found.cells, "peak": found.peak(),
            "slices": strongest_slices(found.values, slices), "shown": shown, "images": [numbers[place] for place in shown if numbers],
            **_save_beside(made, path, stem.with_name(name), setup.predictor), "text": made.lines,
        }  # fmt: skip
    return json_entry(stem.name, judgement, maps) | ({"clinical": evidence.to_json()} if evidence else {})


def _save_beside(made: ExplainedVolume, path: Path, stem: Path, predictor: Predictor) -> dict[str, str]:
    """Writes the map in the form of its source, and says under which name, or why there is none; that stops nothing."""
    target = stem.with_name(stem.name + (".nii.gz" if is_nifti(path) else ".dcm"))
    try:
        save_map(made, target, path, predictor)
    except (ImageError, ValueError, TypeError, AttributeError, KeyError) as error:
        return {
            "original": "",
            "note": f"no map over the series' own slices: its header does not allow it; {type(error).__name__}",
        }
    return {"original": target.name}


def describe_map(
    found: VolumeMap, method: Method, request: ExplanationRequest, predictor: Predictor, sanity: Sanity | None
) -> tuple[str, ...]:
    """Words the lines below the pictures of one map.

    Args:
        found: the map.
        method: that made it.
        request: what was asked for.
        predictor: of the bundle.
        sanity: of the method; None where it was not checked.
    """
    facts, manifest, target = FACTS[method], predictor.manifest, request.target
    word = positive_word(manifest.classes) if isinstance(target, str) else manifest.classes[target]
    depth, height, width = found.cells
    return (
        f"{facts.title} ({facts.source}) in three dimensions shows {facts.shows}. Evidence for: {word}.",
        f"It is made of {depth} x {height} x {width} cells (slices, rows, columns): what is smaller than one cannot be told apart.",
        sanity.sentence() if sanity else "Whether the map can be believed was not checked.",
        "Slices are numbered from the feet, and shown from below: the patient's right is on the left.",
        MAP_LIMITS_NOTE,
        *([PHANTOM_NOTE] if manifest.card.phantom else []),
    )
