"""Checks of a site that need no connection; `client.site.preflight` runs them. Each finding is one sentence, and how to fix it.

check_environment    is this machine fit: versions, disk, memory, graphics card, work folder, clock
check_site_keys      keys and certificates: there, private, valid, and for each other
check_data           the manifest can be read, its files are there, its classes can be trained, its patients are enough; no image is
                     opened here
check_policy_file    the policy can be read, approves code, and leaves something that may run
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, get_args

from pneumofed.client.federation.exposure import describe_exposure
from pneumofed.client.federation.policy import only
from pneumofed.client.federation.policy_decision import LIMITS, ArrivalFacts, Facts, RoundsBegun, RunRequest, TrainingData, decide
from pneumofed.client.site.folder import SiteFolder
from pneumofed.common.config.choices import ModelName, StrategyName
from pneumofed.common.config.classes import class_index
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.data.label_words import LabelWords
from pneumofed.common.data.manifest import Manifest, read_manifest
from pneumofed.common.errors import ConfigError, DataError, counted

Kind = Literal["environment", "keys", "connection", "data", "policy"]
Level = Literal["ok", "warning", "problem"]
FLOWER_VERSION = "1.41"
PYTHON_VERSIONS = ((3, 11), (3, 13))
"""The first that fits, and the first that does not any more."""
GIB = 1 << 30
DISK_GIB, MEMORY_GIB = (1.0, 5.0), (2.0, 4.0)
"""Less than the first is a problem, less than the second a warning. A ResNet18 with its actors takes 1 to 2 GiB of memory."""
WARN_BEFORE_EXPIRY = timedelta(days=30)
"""A certificate that expires within this time is worth a warning."""
TRAINING_SHARE = 0.9
"""Share of the patients who are trained on, with the default `training.validation_fraction`."""
MIDNIGHT = datetime(2000, 1, 1)
"""Of any day: the rules look at the time of day only."""


@dataclass(frozen=True)
class PreflightFinding:
    """One line of the preflight. `remedy` says how to fix what is not ok."""

    kind: Kind
    name: str
    level: Level
    sentence: str
    remedy: str = ""


def check_environment(folder: SiteFolder) -> Iterator[PreflightFinding]:
    """Checks the machine: versions, work folder, disk, memory, graphics card, clock."""
    yield check_python(sys.version_info[:2])
    yield check_flower()
    yield PreflightFinding("environment", "pneumofed", "ok", f"version {version('pneumofed')}")
    yield check_work_folder(folder.work)
    yield check_disk(folder.work)
    yield check_memory(Path("/proc/meminfo"))
    yield check_device(folder.config.device)
    yield check_time_service()


def check_python(found: tuple[int, int]) -> PreflightFinding:
    fits = PYTHON_VERSIONS[0] <= found < PYTHON_VERSIONS[1]
    remedy = "" if fits else "install Python 3.11 or 3.12 and pneumofed into it"
    return PreflightFinding("environment", "Python", "ok" if fits else "problem", f"version {found[0]}.{found[1]}", remedy)


def check_flower() -> PreflightFinding:
    """All parties of a federation need the same major and minor version of Flower."""
    try:
        found = version("flwr")
    except PackageNotFoundError:
        return PreflightFinding("environment", "Flower", "problem", "not installed", f"pip install 'flwr=={FLOWER_VERSION}.*'")
    if found.split(".")[:2] == FLOWER_VERSION.split("."):
        return PreflightFinding("environment", "Flower", "ok", f"version {found}")
    return PreflightFinding(
        "environment",
        "Flower",
        "problem",
        f"version {found}, needed is {FLOWER_VERSION}",
        f"pip install 'flwr=={FLOWER_VERSION}.*'",
    )


def check_work_folder(work: Path) -> PreflightFinding:
    try:
        work.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=work) as file:
            file.write(b"x")
    except OSError as error:
        remedy = "give the service's user this folder, or set work_dir in site.yaml to one that it owns"
        return PreflightFinding("environment", "work folder", "problem", f"{work} cannot be written: {error.strerror}", remedy)
    if work.stat().st_mode & 0o077:
        return PreflightFinding("environment", "work folder", "warning", f"others can read {work}", f"chmod 700 {work}")
    return PreflightFinding("environment", "work folder", "ok", "can be written")


def check_disk(work: Path) -> PreflightFinding:
    place = next(path for path in (work, *work.parents) if path.exists())
    free = shutil.disk_usage(place).free / GIB
    remedy = f"free some space, or set work_dir in site.yaml to a larger disk; {DISK_GIB[1]:g} GiB are comfortable"
    return _amount("disk", free, DISK_GIB, "free", remedy)


def check_memory(meminfo: Path) -> PreflightFinding:
    """`MemAvailable` of proc(5)."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
        available = int(lines["MemAvailable"].split()[0]) * 1024 / GIB
    except (OSError, ValueError, KeyError):
        return PreflightFinding("environment", "memory", "ok", "not known on this system")
    return _amount("memory", available, MEMORY_GIB, "available", f"stop other programs; {MEMORY_GIB[1]:g} GiB are comfortable")


def check_device(device: str) -> PreflightFinding:
    """`auto` takes a graphics card where torch finds one; a card that is there and that torch cannot use is worth a word."""
    import torch

    if torch.cuda.is_available():
        number = int(device.partition(":")[2] or 0) if device.startswith("cuda") else 0
        if number >= torch.cuda.device_count():
            sentence = f"site.yaml asks for {device}; {torch.cuda.device_count()} are there"
            return PreflightFinding(
                "environment", "graphics card", "problem", sentence, "set device in site.yaml to cuda:0 or auto"
            )
        return PreflightFinding("environment", "graphics card", "ok", torch.cuda.get_device_name(number))
    remedy = "install the NVIDIA driver and the torch build for it, or set device: auto in site.yaml"
    if device.startswith("cuda"):
        return PreflightFinding(
            "environment", "graphics card", "problem", f"site.yaml asks for {device} and torch finds none", remedy
        )
    if device == "auto" and Path("/dev/nvidia0").exists():
        return PreflightFinding("environment", "graphics card", "warning", "there is one that torch cannot use", remedy)
    return PreflightFinding("environment", "graphics card", "ok", "none; training uses the processor")


def check_time_service() -> PreflightFinding:
    """Whether the system keeps its clock right by itself; the clock is compared with the coordinator's by the connection's check."""
    state = _ntp_state()
    if state == "no":
        remedy = "switch time synchronisation on: timedatectl set-ntp true"
        return PreflightFinding("environment", "time service", "warning", "the clock is not synchronised", remedy)
    return PreflightFinding("environment", "time service", "ok", "synchronised" if state == "yes" else "not known on this system")


def check_site_keys(folder: SiteFolder) -> Iterator[PreflightFinding]:
    """Checks the authority, the key of the node, and the certificate for mutual TLS where there is one."""
    connection = folder.connection
    yield check_certificate("authority", Path(connection.ca), "ask the coordinator for the federation's ca.crt")
    yield check_node_key(Path(connection.key))
    yield from check_modes(folder.path, [Path(connection.key)])
    if connection.client_certificate is not None and connection.client_key is not None:
        remedy = "ask the coordinator for a new kit, or send keys/node.pub again"
        certificate = check_certificate("site certificate", Path(connection.client_certificate), remedy)
        yield certificate
        yield from check_modes(folder.path, [Path(connection.client_key)])
        if certificate.level != "problem":
            yield check_pair(Path(connection.client_certificate), Path(connection.client_key))


def check_certificate(name: str, path: Path, remedy: str, now: datetime | None = None) -> PreflightFinding:
    """Checks a certificate's validity; one that expires within 30 days is worth a warning.

    Args:
        name: of the check, as the preflight shows it.
        path: the certificate's file (PEM).
        remedy: what to do where it cannot be used or expires.
        now: with a zone; the clock where it is None.
    """
    from pneumofed.common.wire.keys import certificate_validity

    now = now or datetime.now(UTC)
    try:
        begin, end = certificate_validity(path)
    except ConfigError as error:
        return PreflightFinding("keys", name, "problem", str(error), remedy)
    if now < begin:
        return PreflightFinding(
            "keys", name, "problem", f"not valid before {begin:%Y-%m-%d %H:%M} UTC", "set this machine's clock right"
        )
    if now >= end:
        return PreflightFinding("keys", name, "problem", f"expired on {end:%Y-%m-%d}", remedy)
    days = (end - now).days
    if end - now < WARN_BEFORE_EXPIRY:
        return PreflightFinding("keys", name, "warning", f"expires in {counted(days, 'day')}, on {end:%Y-%m-%d}", remedy)
    return PreflightFinding("keys", name, "ok", f"valid until {end:%Y-%m-%d}")


def check_node_key(path: Path) -> PreflightFinding:
    """The private key can be used, and its public part beside it, which the coordinator got, is its own."""
    from pneumofed.common.wire.keys import key_fingerprint, read_private_key, read_public_key

    remedy = "take keys/node from the kit, or make a new pair with `pneumofed site init` and send node.pub to the coordinator"
    try:
        public = read_private_key(path).public_key()
        beside = path.with_name(path.name + ".pub")
        if beside.exists() and read_public_key(beside) != public:
            return PreflightFinding("keys", "node key", "problem", f"{beside.name} is not the public part of {path.name}", remedy)
    except ConfigError as error:
        return PreflightFinding("keys", "node key", "problem", str(error), remedy)
    return PreflightFinding("keys", "node key", "ok", key_fingerprint(public))


def check_modes(folder: Path, private: list[Path]) -> Iterator[PreflightFinding]:
    """Checks whether others than the owner can read what is private.

    Args:
        folder: the site's; that others can read it is a warning.
        private: files that nobody else may read: that others can is a problem.

    Returns:
        Findings of what others can read; none where all is private.
    """
    for path in (folder, *private):
        if path.exists() and path.stat().st_mode & 0o077:
            mode = "700" if path.is_dir() else "600"
            level: Level = "warning" if path.is_dir() else "problem"
            yield PreflightFinding("keys", f"mode of {path.name}", level, f"others can read {path}", f"chmod {mode} {path}")


def check_pair(certificate: Path, key: Path) -> PreflightFinding:
    """Checks that a certificate and a key belong together.

    Args:
        certificate: the site's, for mutual TLS (PEM).
        key: its private key (PEM).
    """
    import ssl

    try:
        ssl.create_default_context().load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError):
        remedy = "take both from one kit"
        return PreflightFinding(
            "keys", "site certificate's key", "problem", f"{key.name} does not fit {certificate.name}", remedy
        )
    return PreflightFinding("keys", "site certificate's key", "ok", "fits")


def check_data(folder: SiteFolder) -> Iterator[PreflightFinding]:
    """Checks the manifest, up to the first problem that makes the later checks useless."""
    path = Path(folder.config.manifest)
    add = "add images with `pneumofed site data add`"
    if not path.is_file():
        yield PreflightFinding("data", "manifest", "problem", "there is none yet", add)
        return
    try:
        manifest = LabelWords.of(folder.config.label_words, "site.yaml, label_words").apply(read_manifest(path))
    except DataError as error:
        yield PreflightFinding(
            "data", "manifest", "problem", str(error), "fix that line, or add the images anew: pneumofed site data add"
        )
        return
    if not len(manifest):
        yield PreflightFinding("data", "manifest", "problem", "it names no image", add)
        return
    yield PreflightFinding(
        "data", "manifest", "ok", f"{counted(len(manifest), 'image')} of {len(set(manifest.patients))} patients"
    )
    yield check_files(manifest)
    yield check_classes(manifest, folder.config.label_words)
    yield from check_patient_count(folder, manifest)


def check_files(manifest: Manifest) -> PreflightFinding:
    missing = sum(not record.path.exists() for record in manifest.records)
    if not missing:
        return PreflightFinding("data", "files", "ok", "all are there")
    level: Level = "problem" if missing == len(manifest) else "warning"
    sentence = f"{missing} of {len(manifest)} files are missing"
    return PreflightFinding("data", "files", level, sentence, "mount the disk, or add the images again")


def check_classes(manifest: Manifest, label_words: Mapping[str, str]) -> PreflightFinding:
    """Checks that there are images of normal and of pneumonia, or of another class that the site maps words to.

    Args:
        manifest: its labels are read by the site's own words already.
        label_words: of site.yaml.
    """
    others = {label for label in label_words.values() if class_index(label, "binary") is None}
    own = Counter(label for label in manifest.labels if label in others)
    classes = Counter(class_index(label, "binary") for label in manifest.labels if label not in others)
    classes[1] += own.total()
    named = "".join(f", {count} {label}" for label, count in sorted(own.items()))
    counts = f"{classes[0]} normal, {classes[1] - own.total()} pneumonia{named}, {classes[None]} without a class"
    if not classes[0] + classes[1]:
        return PreflightFinding(
            "data", "classes", "problem", counts, "check the labels: docs/data.md lists the words that are known"
        )
    if not (classes[0] and classes[1]):
        return PreflightFinding("data", "classes", "warning", counts, "a single class helps little; add the other if you have it")
    return PreflightFinding("data", "classes", "ok", counts)


def check_patient_count(folder: SiteFolder, manifest: Manifest) -> Iterator[PreflightFinding]:
    """Checks that about as many patients would be trained on as the policy asks for.

    Args:
        folder: the site's; nothing is checked where its policy cannot be read.
        manifest: its images; patients count who have an image of a label that the site knows.
    """
    try:
        policy = folder.policy
    except ConfigError:
        return  # the policy's check reports it
    words = LabelWords.of(folder.config.label_words, "label_words")
    known = {record.patient for record in manifest.records if words.knows(record.label)}
    training = int(len(known) * TRAINING_SHARE)
    sentence = f"about {training} for training, the policy asks for {policy.min_patients}"
    remedy = "add images of more patients, or lower min_patients in policy.yaml if your privacy officer agrees"
    if decide(policy, RunRequest.of(ExperimentConfig(), "train", "preflight", 1), TrainingData(training)).permit:
        yield PreflightFinding("data", "patients", "ok", sentence)
    else:
        yield PreflightFinding("data", "patients", "problem", sentence, remedy)


def check_policy_file(folder: SiteFolder) -> Iterator[PreflightFinding]:
    """Checks the policy: that it can be read, approves code, and leaves something that may run."""
    try:
        path, policy = folder.policy_file, folder.policy
    except ConfigError as error:
        yield PreflightFinding("policy", "policy", "problem", str(error), "fix policy.yaml; until then everything is refused")
        return
    if path.stat().st_mode & 0o022:
        yield PreflightFinding("policy", "policy", "problem", f"others can change {path.name}", f"chmod 600 {path}")
    yield check_code(folder, policy)
    yield check_privacy(policy)
    for sentence in describe_exposure(policy):
        yield PreflightFinding("policy", "what leaves", "ok", sentence)
    yield from check_limits(policy)


def check_code(folder: SiteFolder, policy: SitePolicy) -> PreflightFinding:
    """Checks that the policy approves some code.

    Args:
        folder: the site's; its work folder keeps the hash of the installed code.
        policy: the site's.
    """
    from pneumofed.client.site.approval import INSTALLED, installed_hash

    if not policy.approved_apps:
        return PreflightFinding("policy", "code", "problem", "no app is approved", "pneumofed site approve --installed")
    installed = f", installed is {installed_hash(folder.work)[:12]}…" if INSTALLED in policy.approved_apps else ""
    return PreflightFinding("policy", "code", "ok", f"{len(policy.approved_apps)} approved{installed}")


def check_privacy(policy: SitePolicy) -> PreflightFinding:
    decision = decide(only(policy, *LIMITS), usual_request(), ArrivalFacts(MIDNIGHT))
    if decision.permit:
        return PreflightFinding("policy", "privacy", "ok", "no limit is set")
    limits = [limit for limit in (policy.max_epsilon, policy.max_epsilon_per_study) if limit is not None]
    remedy = "keep the site out of runs that are not differentially private, or set the limits to null"
    sentence = f"epsilon {min(limits):g} is the limit: every run that is not differentially private is refused"
    return PreflightFinding("policy", "privacy", "warning", sentence, remedy)


def check_limits(policy: SitePolicy) -> Iterator[PreflightFinding]:
    """Checks for limits that let nothing run, whatever the run and the time."""
    for name, every in POSSIBLE_REQUESTS.items():
        if name == "models" and any(entry.startswith("study") for entry in policy.models or ()):
            continue  # which network of a study it lets in stands in no list
        single_rule = only(policy, name)
        if not any(decide(single_rule, request, facts).permit for request, facts in every()):
            yield PreflightFinding(
                "policy", name, "problem", "as it is set, no round is ever trained here", f"change {name} in policy.yaml"
            )


def usual_request() -> RunRequest:
    """A training round of the default experiment, which is not private."""
    return RunRequest.of(ExperimentConfig(), "train", "preflight", 1)


POSSIBLE_REQUESTS: dict[str, Callable[[], Iterable[tuple[RunRequest, Facts]]]] = {
    "strategies": lambda: [(replace(usual_request(), strategy=name), ArrivalFacts(MIDNIGHT)) for name in get_args(StrategyName)],
    "models": lambda: [(replace(usual_request(), model=name), ArrivalFacts(MIDNIGHT)) for name in get_args(ModelName)],
    "max_rounds_per_day": lambda: [(usual_request(), RoundsBegun(0))],
    "quiet_hours": lambda: [(usual_request(), ArrivalFacts(MIDNIGHT + timedelta(minutes=minute))) for minute in range(24 * 60)],
}
"""By key of the policy: every request and state of the site that this key can judge differently."""


def _ntp_state() -> Literal["yes", "no", "unknown"]:
    command = shutil.which("timedatectl")
    if command is None:
        return "unknown"
    try:
        words = [command, "show", "-p", "NTPSynchronized", "--value"]
        said = subprocess.run(words, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return "yes" if said == "yes" else "no" if said == "no" else "unknown"


def _amount(name: str, gib: float, limits: tuple[float, float], word: str, remedy: str) -> PreflightFinding:
    level: Level = "problem" if gib < limits[0] else "warning" if gib < limits[1] else "ok"
    return PreflightFinding("environment", name, level, f"{gib:.1f} GiB {word}", "" if level == "ok" else remedy)
