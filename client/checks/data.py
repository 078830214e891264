"""The manifest: can be read, its files are there, its classes can be trained, its patients are enough. Images are not opened here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from client.checks.finding import Finding, Level
from client.folder import SiteFolder
from client.policy_decision import Request, TrainingData, decide
from common.config import ExperimentConfig
from common.data.manifest import Manifest, class_index, read_manifest
from common.errors import ConfigError, DataError

TRAINING_SHARE = 0.9
"""Of the patients, with the default `training.validation_fraction`."""


def check(folder: SiteFolder) -> Iterator[Finding]:
    path = Path(folder.config.manifest)
    add = "add images with `pneumofed site data add`"
    if not path.is_file():
        yield Finding("data", "manifest", "problem", "there is none yet", add)
        return
    try:
        manifest = read_manifest(path)
    except DataError as error:
        yield Finding(
            "data", "manifest", "problem", str(error), "mend that line, or add the images anew: pneumofed site data add"
        )
        return
    if not len(manifest):
        yield Finding("data", "manifest", "problem", "it names no image", add)
        return
    yield Finding("data", "manifest", "ok", f"{len(manifest)} images of {len(set(manifest.patients))} patients")
    yield check_files(manifest)
    yield check_classes(manifest)
    yield from check_patients(folder, manifest)


def check_files(manifest: Manifest) -> Finding:
    missing = sum(not record.path.is_file() for record in manifest.records)
    if not missing:
        return Finding("data", "files", "ok", "all are there")
    level: Level = "problem" if missing == len(manifest) else "warning"
    sentence = f"{missing} of {len(manifest)} files are missing"
    return Finding("data", "files", level, sentence, "mount the disk, or add the images again")


def check_classes(manifest: Manifest) -> Finding:
    """Both classes of the plain task, normal and pneumonia."""
    classes = Counter(class_index(label, "binary") for label in manifest.labels)
    counts = f"{classes[0]} normal, {classes[1]} pneumonia, {classes[None]} without a class"
    if not classes[0] + classes[1]:
        return Finding("data", "classes", "problem", counts, "check the labels: docs/data.md lists the words that are known")
    if not (classes[0] and classes[1]):
        return Finding("data", "classes", "warning", counts, "one class alone helps little; add the other if you have it")
    return Finding("data", "classes", "ok", counts)


def check_patients(folder: SiteFolder, manifest: Manifest) -> Iterator[Finding]:
    try:
        policy = folder.policy
    except ConfigError:
        return  # told by the policy's check
    known = {record.patient for record in manifest.records if class_index(record.label, "binary") is not None}
    training = int(len(known) * TRAINING_SHARE)
    sentence = f"about {training} for training, the policy asks for {policy.min_patients}"
    remedy = "add images of more patients, or lower min_patients in policy.yaml if your privacy officer agrees"
    if decide(policy, Request.of(ExperimentConfig(), "train", "preflight", 1), TrainingData(training)).permit:
        yield Finding("data", "patients", "ok", sentence)
    else:
        yield Finding("data", "patients", "problem", sentence, remedy)
