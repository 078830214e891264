"""Opening a model bundle: nothing of it is used before its signature and every file were checked."""

from __future__ import annotations

import hashlib
import io
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from common.errors import BundleError
from common.keys import PublicKey
from common.model_bundle.archive import unpack_bundle
from common.model_bundle.manifest import REFERENCE, WEIGHTS, BundleManifest
from common.model_bundle.sealing import check_seal

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, eq=False)
class ReferenceArrays:
    """The reference images, M of them, one a patient, in numbers that show no image and name no patient.

    Attributes:
        features: float32 [M, D], the classifier's input.
        probabilities: float32 [M], calibrated P(pneumonia).
        pixel_statistics: float32 [M, K].
        labels: int64 [M], 1 is pneumonia; None where nobody labelled them.
    """

    features: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float32]
    pixel_statistics: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64] | None = None


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

    def load_network(self) -> nn.Module:
        """The PyTorch network with its weights, in evaluation mode. Its input is normalised, unlike that of the ONNX graph.

        Raises:
            BundleError: the weights do not fit the network that the manifest names.
        """
        import torch

        from common.models import build_model

        model = build_model(self.manifest.model.without_weights(), self.manifest.task, seed=0)
        try:
            model.load_state_dict(torch.load(io.BytesIO(self.read(WEIGHTS)), map_location="cpu", weights_only=True))
        except (RuntimeError, TypeError, AttributeError) as error:
            raise BundleError(
                f"{WEIGHTS} does not fit the network in the manifest ({type(error).__name__}); export it again"
            ) from None
        return model.eval()

    def load_reference(self) -> ReferenceArrays:
        """The reference statistics.

        Raises:
            BundleError: the bundle has none.
        """
        with np.load(io.BytesIO(self.read(REFERENCE)), allow_pickle=False) as arrays:
            return ReferenceArrays(
                arrays["features"], arrays["probabilities"], arrays["pixel_statistics"], labels=arrays.get("labels")
            )


class _Temporary:
    """A folder that goes with this object, or with the process."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="pneumofed-bundle-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def open_bundle(path: Path, trusted: Sequence[PublicKey] | None) -> Bundle:
    """The bundle at `path`, a folder or an archive (.zip or .tar), after its signature and every file's SHA-256 were checked.

    Args:
        path: folder or archive.
        trusted: keys whose signature is taken; None takes any, and the caller shows whose it is (`Bundle.signer`).

    Raises:
        BundleError: the bundle is missing, damaged, changed, of a newer format, or signed by a stranger.
    """
    if path.is_dir():
        return Bundle(path, *check_seal(path, trusted))
    if not path.is_file():
        raise BundleError(f"{path} does not exist; give the folder or the archive that `pneumofed export` wrote")
    temporary = _Temporary()
    folder = unpack_bundle(path, temporary.path)
    return Bundle(folder, *check_seal(folder, trusted), _temporary=temporary)
