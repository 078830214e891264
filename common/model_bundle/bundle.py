"""A model bundle as it is opened, packed and started from.

- `load_bundle`, `open_trusted`: a folder or archive as a `Bundle`; nothing of it is used before its signature and every file were checked.
- `pack`, `unpack_bundle`: the bundle as one file, a plain .zip or .tar, packed the same way each time and unpacked without trust.
- `start_values`, `check_start`, `read_start_weights`: a run that starts from a bundle's model, what it takes over from it,
  and whether the two fit.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import shutil
import stat
import tarfile
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pneumofed.common.config.classes import task_words
from pneumofed.common.config.experiment import ExperimentConfig, ModelConfig
from pneumofed.common.errors import BundleError, ConfigError, WeightsError
from pneumofed.common.model_bundle.manifest import MANIFEST, REFERENCE, REFERENCE_GROUPS, WEIGHTS, BundleManifest, OperatingPoint
from pneumofed.common.model_bundle.sealing import MAX_BYTES, MAX_FILES, check_seal, list_files
from pneumofed.common.ops.study_code import FOLDER, StudyCode, describe_name, is_study_code, remember
from pneumofed.common.wire.keys import PublicKey, read_public_key

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class ReferenceArrays:
    """The reference images, M of them, one a patient, in numbers that show no image and name no patient.

    Attributes:
        features: float32 [M, D], the classifier's input.
        probabilities: float32 [M], calibrated P(pneumonia).
        pixel_statistics: float32 [M, K].
        labels: int64 [M], 1 is pneumonia; None where nobody labelled them.
        age_group, sex, view: words of the patients' groups [M], empty where one is not known; None in bundles of earlier versions.
    """

    features: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float32]
    pixel_statistics: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64] | None = None
    age_group: npt.NDArray[np.str_] | None = None
    sex: npt.NDArray[np.str_] | None = None
    view: npt.NDArray[np.str_] | None = None


@dataclass(frozen=True, eq=False)
class Bundle:
    """A checked bundle.

    Attributes:
        folder: where its files lie; of an archive a temporary folder, which lives as long as this object.
        manifest: `bundle.json`.
        digest: SHA-256 of `bundle.json`, which holds the hash of every other file: names the model in audit trails.
        signer: fingerprint of the key that signed it.
    """

    folder: Path
    manifest: BundleManifest
    digest: str
    signer: str
    _temporary: _Temporary | None = field(default=None, repr=False)

    def path(self, name: str) -> Path:
        """Where the file `name` lies.

        Raises:
            BundleError: the bundle has no such file.
        """
        if name not in self.manifest.files:
            raise BundleError(f"the bundle holds no {name}; export it again with this version of pneumofed")
        return self.folder / name

    def read(self, name: str) -> bytes:
        """The content of the file `name`, checked once more, since it may have been changed after the bundle was opened.

        Raises:
            BundleError: there is no such file, or it was changed.
        """
        try:
            content = self.path(name).read_bytes()
        except OSError as error:
            raise BundleError(f"{self.folder / name} cannot be read: {error.strerror}") from None
        if hashlib.sha256(content).hexdigest() != self.manifest.files[name]:
            raise BundleError(f"{name} was changed after the bundle was opened; get the bundle again from the coordinator")
        return content

    def deciding_at(self, threshold: OperatingPoint) -> Bundle:
        """The same bundle, with the same digest, as it decides at another threshold."""
        return replace(self, manifest=self.manifest.model_copy(update={"threshold": threshold}))

    def load_network(self, *, run_code: bool = False) -> nn.Module:
        """The PyTorch network with its weights, in evaluation mode. Its input is normalised, unlike that of the ONNX graph.

        Args:
            run_code: consent to run the code in the bundle, where its network is a study's own. Who signed it has written that code, or
                has passed it on.

        Raises:
            BundleError: the weights do not fit the network that the manifest names, or it is a study's own and there is no consent.
            ConfigError: the study's code cannot be run here.
        """
        import torch

        from pneumofed.common.models.build import build_empty

        if is_study_code(self.manifest.model.name):
            self._take_code(run_code)
        model = build_empty(self.manifest.model, self.manifest.task)
        try:
            model.load_state_dict(torch.load(io.BytesIO(self.read(WEIGHTS)), map_location="cpu", weights_only=True))
        except (RuntimeError, TypeError, AttributeError) as error:
            raise BundleError(
                f"{WEIGHTS} does not fit the network in the manifest ({type(error).__name__}); export it again"
            ) from None
        return model.eval()

    def _take_code(self, run_code: bool) -> None:
        name = self.manifest.model.name
        digest, function = name.split(":")[1:]
        files = [file for file, found in self.manifest.files.items() if found == digest and file.startswith(f"{FOLDER}/")]
        if not files:
            raise BundleError(f"the bundle lacks the file of its network, {describe_name(name)}; export it again")
        if not run_code:
            raise BundleError(
                f"the network of this bundle is {describe_name(name)}, and only its own code can make it in PyTorch. Predictions, maps of "
                f"the reading room and monitoring need no code and work. To run the code as you, read {files[0]} in the bundle first, "
                "then give --run-bundle-code (in Python run_code=True)"
            )
        remember(StudyCode(PurePosixPath(files[0]).name, self.read(files[0]), function))

    def load_reference(self) -> ReferenceArrays:
        """The reference statistics.

        Raises:
            BundleError: the bundle has none.
        """
        with np.load(io.BytesIO(self.read(REFERENCE)), allow_pickle=False) as arrays:
            known = {name: arrays.get(name) for name in ("labels", *REFERENCE_GROUPS.values())}
            return ReferenceArrays(arrays["features"], arrays["probabilities"], arrays["pixel_statistics"], **known)


class _Temporary:
    """A folder that goes with this object, or with the process."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="pneumofed-bundle-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def load_bundle(path: Path, trusted: Sequence[PublicKey] | None) -> Bundle:
    """The bundle at `path`, a folder or an archive (.zip or .tar), after its signature and every file's SHA-256 were checked.

    Args:
        path: folder or archive.
        trusted: keys whose signature is taken; None takes any, and the caller shows whose it is (`Bundle.signer`).

    Raises:
        BundleError: the bundle is missing, damaged, changed, of a newer format, or signed by a stranger.
    """
    _refuse_run(path)
    if path.is_dir():
        return Bundle(path, *check_seal(path, trusted))
    if not path.is_file():
        raise BundleError(f"{path} does not exist; give the folder or the archive that `pneumofed export` wrote")
    temporary = _Temporary()
    folder = unpack_bundle(path, temporary.path)
    return Bundle(folder, *check_seal(folder, trusted), _temporary=temporary)


def open_trusted(path: Path, trusted: Sequence[Path] | None) -> Bundle:
    """Opens a bundle that one of the keys in files must have signed, as commands are given them.

    Args:
        path: folder or archive.
        trusted: files of public keys; None or empty takes any signer, and the caller shows whose it is.

    Raises:
        ConfigError: a key cannot be read.
        BundleError: as `load_bundle`.
    """
    return load_bundle(path, [read_public_key(file) for file in trusted or ()] or None)


def _refuse_run(path: Path) -> None:
    """Says what to do with the folder of a run, or a checkpoint in one, where a bundle is wanted.

    Raises:
        BundleError: `path` is one; its names are those of `server.runs.folder`.
    """
    run = path.parent.parent if path.suffix == ".pt" and path.parent.name == "checkpoints" else path
    if not ((run / "config.yaml").is_file() and (run / "checkpoints").is_dir()):
        return
    what = "the folder of a run" if run == path else "a checkpoint of a run"
    made = run / "bundle"
    advice = f"give {made}" if (made / MANIFEST).is_file() else f"`pneumofed export {run}` makes one in {made}"
    raise BundleError(f"{path} is {what} and no model bundle; {advice}")


_ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that zip can say: the same files give the same bytes
_CHUNK_BYTES = 2**20
_ARCHIVE_ERRORS = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
    NotImplementedError,
)


def pack(folder: Path, archive: Path) -> Path:
    """Writes a bundle as one zip file, all below one folder of the archive's name; the same files give the same bytes.

    Args:
        folder: the sealed bundle.
        archive: the file to write, replaced if it is there; its stem names the folder inside.

    Returns:
        `archive`.
    """
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name in list_files(folder):
            entry = zipfile.ZipInfo(f"{archive.stem}/{name}", _ZIP_DATE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            with (folder / name).open("rb") as source, file.open(entry, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, _CHUNK_BYTES)
    return archive


def unpack_bundle(archive: Path, folder: Path) -> Path:
    """Unpacks an archive without trust.

    Only plain files with plain relative names are taken, and no more of them or their bytes than a bundle may have, whatever the
    archive claims of their sizes.

    Args:
        archive: a .zip or an uncompressed .tar; the content decides, not the name.
        folder: an empty folder to unpack into.

    Returns:
        Where the bundle lies: `folder`, or the one folder in it.

    Raises:
        BundleError: the archive is damaged, is no zip or tar, or holds anything else.
    """
    try:
        if _begins(archive, b"PK"):  # not is_zipfile, which would find the weights' own zip at the end of a .tar
            with zipfile.ZipFile(archive) as zip_file:
                _take(_zip_entries(zip_file), folder)
        else:
            with tarfile.open(archive, "r:") as tar_file:
                _take(_tar_entries(tar_file), folder)
    except _ARCHIVE_ERRORS as error:
        raise BundleError(f"{archive} is damaged or is no .zip or .tar ({type(error).__name__}); get it again") from None
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def _begins(archive: Path, magic: bytes) -> bool:
    with archive.open("rb") as file:
        return file.read(len(magic)) == magic


def _zip_entries(archive: zipfile.ZipFile) -> Iterator[tuple[str, IO[bytes]]]:
    for entry in archive.infolist():
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if entry.is_dir() and kind in (0, stat.S_IFDIR):
            continue
        if kind not in (0, stat.S_IFREG):
            raise BundleError("the archive holds a link or a device, which a model bundle must not")
        with archive.open(entry) as content:
            yield entry.filename, content


def _tar_entries(archive: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    for entry in archive:
        if entry.isdir():
            continue
        content = archive.extractfile(entry) if entry.isreg() and not entry.issparse() else None
        if content is None:
            raise BundleError("the archive holds a link or a device, which a model bundle must not")
        yield entry.name, content


def _take(entries: Iterator[tuple[str, IO[bytes]]], folder: Path) -> None:
    room = MAX_BYTES
    for count, (name, content) in enumerate(entries, start=1):
        if count > MAX_FILES:
            raise BundleError(f"the archive holds more than {MAX_FILES} files, more than any model bundle")
        target = folder / _plain(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            while chunk := content.read(min(_CHUNK_BYTES, room + 1)):
                room -= len(chunk)
                if room < 0:
                    raise BundleError(f"the archive unpacks to more than {MAX_BYTES} bytes, more than any model bundle")
                file.write(chunk)


def _plain(name: str) -> PurePosixPath:
    """`name` as a path that stays below where it is put."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or any(sign in name for sign in ("\\", ":", "\0")):
        raise BundleError("the archive holds a file name that leads out of its folder; do not use it")
    return path


def start_values(bundle: Bundle, path: Path) -> dict[str, Any]:
    """Makes the settings of an experiment that starts from a bundle: its weights, its digest, and the parent's own draw of
    validation patients, so that the new model is not validated on patients whom the parent was trained on.

    Args:
        bundle: the parent.
        path: where it lies, made absolute, since a run starts from another folder.

    Returns:
        Nested keys of the experiment; `training` only where the bundle knows its draw.
    """
    values: dict[str, Any] = {"parent": bundle.digest, "model": {"weights": str(path.resolve())}}
    origin = bundle.manifest.card.provenance
    if origin is not None and origin.split_seed is not None and origin.validation_fraction is not None:
        values["training"] = {"split_seed": origin.split_seed, "validation_fraction": origin.validation_fraction}
    return values


def check_start(experiment: ExperimentConfig, bundle: Bundle) -> None:
    """Checks that an experiment can start from a bundle.

    Args:
        experiment: its `parent` must be the bundle's digest, its network and task the bundle's.
        bundle: the one that `experiment.model.weights` names.

    Raises:
        ConfigError: the bundle is another one, or its network or task differs.
    """
    if experiment.parent != bundle.digest:
        raise ConfigError(
            f"{experiment.model.weights} is not the bundle that the run was to start from: its digest is {bundle.digest}, "
            f"expected {experiment.parent}"
        )
    other = [f"model.{sentence}" for sentence in bundle.manifest.model.differences(experiment.model)]
    if bundle.manifest.task != experiment.task:
        other.insert(0, f"task is '{task_words(bundle.manifest.task)}', not '{task_words(experiment.task)}'")
    if other:
        raise ConfigError(f"the bundle does not fit the run, in it {'; '.join(other)}. Set the run to what the bundle has")


def read_start_weights(cfg: ModelConfig) -> dict[str, Tensor] | None:
    """The state dict of the bundle that `cfg.weights` names, for `build_model`; None where it names no bundle.

    A folder, .zip or .tar is meant as a bundle: by its name, since PyTorch's own files are zip archives too. Who may have signed it
    is for the caller to say.

    Raises:
        WeightsError: the bundle is damaged, or its model is another network than `cfg`.
    """
    path = Path(cfg.weights)
    if not (path.suffix in (".zip", ".tar") or (cfg.weights not in ("none", "imagenet") and path.is_dir())):
        return None
    import torch

    from pneumofed.common.models.build import as_state

    try:
        bundle = load_bundle(path, trusted=None)
        other = bundle.manifest.model.differences(cfg)
        if other:
            raise WeightsError(
                f"the model in the bundle {path} is another network: {'; '.join(other)}; set the run's model to it"
            )
        return as_state(torch.load(io.BytesIO(bundle.read(WEIGHTS)), map_location="cpu", weights_only=True), str(path))
    except (BundleError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise WeightsError(f"the bundle {path} cannot be started from: {error}") from error
