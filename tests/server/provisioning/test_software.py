"""Images, compose files, units, manifests and wheelhouse: what they promise of keys, users, networks and versions."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pneumofed.client.site.init import init_from_kit
from pneumofed.common.errors import ConfigError
from pneumofed.server.provisioning.provision import provision
from pneumofed.server.provisioning.software import LOCK_FILE, WheelTarget, collect_wheelhouse, keep_lock, write_containerfile
from tests.server.federations import federation
from tests.server.provisioning.wheels import make_wheel

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
PARTIES = ("site", "coordinator")
OVERLAYS = sorted(path.parent for path in (DEPLOY / "kubernetes").rglob("kustomization.yaml"))
COMMAND = ["pneumofed", "--help"]
NO_INDEX = ("--no-index", "--find-links")


def image_of_checkout() -> str:
    return write_containerfile("", nginx=True, command=COMMAND, health=[], from_source=True)


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kits")
    provision(federation(sites=[{"name": "north"}]), out)
    return out


def kit(kits: Path, party: str) -> Path:
    return kits / ("north" if party == "site" else party)


def images(kits: Path) -> dict[str, str]:
    kit_images = {party: (kit(kits, party) / "Containerfile").read_text() for party in PARTIES}
    return {**kit_images, "checkout": (DEPLOY / "Containerfile").read_text()}


def instructions(text: str) -> list[tuple[str, str]]:
    """(name, arguments) of each instruction, continued lines joined."""
    lines = re.sub(r"\\\n\s*", "", "\n".join(line for line in text.splitlines() if not line.startswith("#"))).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]


def test_the_image_of_the_checkout_is_the_kits_template() -> None:
    assert (DEPLOY / "Containerfile").read_text() == image_of_checkout(), "write it anew: deploy/README.md"


@pytest.mark.parametrize("name", [*PARTIES, "checkout"])
def test_an_image_runs_as_nobody_special_from_a_pinned_base(kits: Path, name: str) -> None:
    found = instructions(images(kits)[name])
    last = max(number for number, (word, _) in enumerate(found) if word == "FROM")
    users = [rest for word, rest in found[last:] if word == "USER"]
    assert users == ["10001:10001"]
    after = [word for word, _ in found[[word for word, _ in found].index("USER") :]]
    assert not {"RUN", "COPY", "ADD"} & set(after), "nothing is done after the user was chosen"
    bases = {rest.split()[0] for word, rest in found if word == "FROM"}
    assert bases == {"${BASE}"}
    (base,) = [rest for word, rest in found if word == "ARG" and rest.startswith("BASE=")]
    assert re.fullmatch(r"BASE=docker\.io/library/python:3\.11\.\d+-slim-[a-z]+", base)
    labels = " ".join(rest for word, rest in found if word == "LABEL")
    assert {"title", "description", "version", "licenses"} <= set(re.findall(r"org\.opencontainers\.image\.(\w+)=", labels))


@pytest.mark.parametrize("name", PARTIES)
def test_an_image_of_a_kit_takes_the_software_and_nothing_else(kits: Path, name: str) -> None:
    found = instructions(images(kits)[name])
    copied = [rest for word, rest in found if word in ("COPY", "ADD")]
    assert copied == [
        "software/ /software/",
        "constraints.txt /software/constraints.txt",
        "--from=install /opt/pneumofed /opt/pneumofed",
    ]
    assert (kit(kits, name) / ".dockerignore").read_text().split() == ["*", "!software", "!constraints.txt"]
    secrets = {path.name for path in (kit(kits, name) / "keys").iterdir()}
    assert secrets and not [secret for secret in secrets if secret in images(kits)[name]]
    assert not re.search(r"(?i)password|secret|token|private", images(kits)[name])


@pytest.mark.parametrize("name", PARTIES)
def test_an_image_has_the_tested_versions_and_a_check_of_its_health(kits: Path, name: str) -> None:
    assert (kit(kits, name) / "constraints.txt").read_text() == (ROOT / "constraints.txt").read_text()
    found = dict(instructions(images(kits)[name]))
    assert "-c constraints.txt" in found["RUN"] or "-c constraints.txt" in images(kits)[name]
    assert "--require-hashes -r requirements.lock" in images(kits)[name]
    assert yaml.safe_load(found["CMD"]) == [f"/{name}/start.sh"]
    assert "CMD [" in found["HEALTHCHECK"]
    assert ("nginx-light" in images(kits)[name]) == (name == "coordinator")


def compose(kits: Path, party: str) -> dict[str, Any]:
    (service,) = yaml.safe_load((kit(kits, party) / "compose.yaml").read_text())["services"].items()
    assert service[0] == party
    found: dict[str, Any] = service[1]
    return found


@pytest.mark.parametrize("party", PARTIES)
def test_a_compose_file_follows_the_specification(kits: Path, party: str) -> None:
    read = pytest.importorskip("compose_spec").PyCompose.from_yaml
    text = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", (kit(kits, party) / "compose.yaml").read_text())  # the defaults of its variables
    found = read(text)
    found.validate()
    assert found.service_names() == [party] and not found.extensions
    for right, wrong in (("restart: always", "restart: sometimes"), ("read_only: true", "read_only: perhaps")):
        with pytest.raises(ValueError, match=r"(?s).+"):
            read(text.replace(right, wrong))


@pytest.mark.parametrize("party", PARTIES)
def test_a_composed_service_can_write_its_folder_and_nothing_else(kits: Path, party: str) -> None:
    service = compose(kits, party)
    assert service["read_only"] is True and service["tmpfs"] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service and "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"] == "${UID:-1000}:${GID:-1000}"
    assert service["volumes"] == [f".:/{party}"]
    assert service["build"] == {"context": ".", "dockerfile": "Containerfile"}
    assert "environment" not in service and "env_file" not in service
    settings = yaml.safe_load((kits / "coordinator" / "coordinator.yaml").read_text())
    assert service.get("ports", []) == (
        [] if party == "site" else [f"{settings[port]}:{settings[port]}" for port in ("port", "page_port")]
    )
    check = yaml.safe_load(
        dict(instructions((kit(kits, party) / "Containerfile").read_text()))["HEALTHCHECK"].partition("CMD ")[2]
    )
    assert service["healthcheck"]["test"] == ["CMD", *check]


HARDENED = {
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "PrivateDevices": "yes",
    "PrivateUsers": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectKernelModules": "yes",
    "ProtectControlGroups": "yes",
    "RestrictSUIDSGID": "yes",
    "RestrictNamespaces": "yes",
    "SystemCallArchitectures": "native",
    "UMask": "0077",
}
EXPOSURE = 1.4
"""The highest rating of a unit, that of systemd 252 for both; 0 is best and 10 worst (systemd-analyze(1))."""


def unit(kits: Path, party: str) -> Path:
    (path,) = kit(kits, party).glob("*.service")
    return path


@pytest.mark.parametrize("party", PARTIES)
def test_a_unit_may_do_what_its_service_needs_and_no_more(kits: Path, party: str) -> None:
    lines = [line.partition("=") for line in unit(kits, party).read_text().splitlines() if "=" in line and line[0] != "#"]
    found = {key: value for key, _, value in lines}
    assert {key: found.get(key) for key in HARDENED} == HARDENED
    assert found["User"] == "pneumofed" and found["ReadWritePaths"] == found["WorkingDirectory"]
    assert [value for key, _, value in lines if key == "SystemCallFilter"] == ["@system-service", "~@privileged"]


@pytest.mark.parametrize("party", PARTIES)
def test_systemd_rates_a_unit_as_ok(kits: Path, party: str) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("needs systemd-analyze")
    command = [program, "security", "--offline=true", "--no-pager", str(unit(kits, party))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    rating = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert rating, done.stderr
    assert float(rating[1]) <= EXPOSURE, done.stdout


def manifests(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl kustomize` builds; without kubectl, the files of a base as they are."""
    if shutil.which("kubectl"):
        done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True, timeout=60)
        return list(yaml.safe_load_all(done.stdout))
    if folder.name != "base":
        pytest.skip("an overlay needs kubectl")
    names = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    return [yaml.safe_load((folder / name).read_text()) for name in names]


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda path: path.relative_to(DEPLOY / "kubernetes").as_posix())
def test_manifests_follow_the_schemas_of_kubernetes(folder: Path) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    found = manifests(folder)
    assert {one["kind"] for one in found} == {"Namespace", "ServiceAccount", "StatefulSet", "Service", "NetworkPolicy"}
    for one in found:
        for version in ("1.28", "1.32"):
            kubernetes_validate.validate(one, version, strict=True)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate({**one, "metadat": {}}, "1.32", strict=True)


def pods(folder: Path) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    for one in manifests(folder):
        if one["kind"] == "StatefulSet":
            pod = one["spec"]["template"]["spec"]
            yield pod, [*pod.get("initContainers", []), *pod["containers"]]


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda path: path.relative_to(DEPLOY / "kubernetes").as_posix())
def test_a_pod_is_restricted(folder: Path) -> None:
    """The pod security standard `restricted`, which the namespace enforces, a read-only root and no token of the API besides."""
    (namespace,) = [one for one in manifests(folder) if one["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    ((pod, containers),) = pods(folder)
    assert pod["automountServiceAccountToken"] is False
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True and context["runAsUser"] == 10001
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert not [volume for volume in pod["volumes"] if "hostPath" in volume]
    for container in containers:
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False and own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert container["image"].startswith("pneumofed") and not container["image"].endswith(":latest")
        assert {"requests", "limits"} <= set(container["resources"])
        assert "env" not in container, "keys come as files of a secret and never as variables"
    assert {"startupProbe", "livenessProbe"} <= set(pod["containers"][0])


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda path: path.relative_to(DEPLOY / "kubernetes").as_posix())
def test_a_site_lets_nobody_in_and_a_coordinator_only_the_gateway(folder: Path) -> None:
    (policy,) = [one["spec"] for one in manifests(folder) if one["kind"] == "NetworkPolicy"]
    (stateful,) = [one for one in manifests(folder) if one["kind"] == "StatefulSet"]
    assert policy["podSelector"]["matchLabels"] == stateful["spec"]["selector"]["matchLabels"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    entries = [port["port"] for rule in policy["ingress"] for port in rule["ports"]]
    exits = [port["port"] for rule in policy["egress"] for port in rule["ports"]]
    if "/site/" in str(folder):
        assert entries == [] and sorted(exits) == [53, 53, 9443]
    else:
        assert entries == ([9443, 9444] if folder.name == "auditors" else [9443]) and sorted(exits) == [53, 53]


def test_a_graphics_card_is_asked_for_by_its_overlay_only() -> None:
    asked = {
        folder.name: pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
        for folder in OVERLAYS
        if "/site/" in str(folder)
        for pod, _ in pods(folder)
    }
    assert asked == {"base": None, "gpu": 1, "coordinator-address": None}


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package `pneumofed` that needs two others, of which the index has a newer version than the constraints allow."""
    place = tmp_path_factory.mktemp("software")
    for name, version in (("tiny", "1.0"), ("tiny", "2.0"), ("smaller", "3.1"), ("unasked", "1.0")):
        make_wheel(place / "index", name, version)
    wheel = make_wheel(place, "pneumofed", "0.2.0", needs=("tiny>=1", "smaller; extra == 'more'"), program=True)
    (place / "constraints.txt").write_text("tiny==1.0\n")
    pip = [*NO_INDEX, str(place / "index")]
    found = collect_wheelhouse(place / "house", f"{wheel}[more]", constraints=place / "constraints.txt", pip=pip)
    assert len(found.wheels) == 3
    return found.folder


def test_a_wheelhouse_holds_the_pinned_versions_and_their_hashes(wheelhouse: Path) -> None:
    names = {"pneumofed-0.2.0", "tiny-1.0", "smaller-3.1"}
    assert {path.name.removesuffix("-py3-none-any.whl") for path in wheelhouse.glob("*.whl")} == names
    lock = [line for line in (wheelhouse / LOCK_FILE).read_text().splitlines() if not line.startswith("#")]
    assert lock == [
        f"{path.name.split('-')[0]}=={path.name.split('-')[1]} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in sorted(wheelhouse.glob("*.whl"))
    ]


def test_the_list_of_a_wheelhouse_travels_with_the_kits(wheelhouse: Path, tmp_path: Path) -> None:
    from pneumofed.server.provisioning.software import Wheelhouse

    keep_lock(Wheelhouse(wheelhouse, (), 0), tmp_path / "kits")
    provision(federation(sites=[{"name": "north"}]), tmp_path / "kits")
    content = (wheelhouse / LOCK_FILE).read_bytes()
    assert {(kit(tmp_path / "kits", party) / LOCK_FILE).read_bytes() for party in PARTIES} == {content}
    init_from_kit(tmp_path / "site", tmp_path / "kits" / "north.tar.gz")
    assert (tmp_path / "site" / LOCK_FILE).read_bytes() == content


@pytest.mark.parametrize("line", ["--index-url https://example.org/", "tiny==1.0", "tiny @ https://example.org/tiny.whl", "-e ."])
def test_a_kit_whose_list_names_more_than_hashed_packages_is_refused(kits: Path, tmp_path: Path, line: str) -> None:
    shutil.copytree(kits / "north", tmp_path / "kit")
    (tmp_path / "kit" / LOCK_FILE).write_text(f"{line}\n")
    with pytest.raises(ConfigError, match="by version and hash"):
        init_from_kit(tmp_path / "site", tmp_path / "kit")


def test_a_wheelhouse_that_cannot_be_collected_says_why(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "pneumofed", "0.2.0", needs=("nowhere>=1",))
    with pytest.raises(ConfigError, match=r"not complete.*nowhere"):
        collect_wheelhouse(tmp_path / "house", str(wheel), constraints=Path("/dev/null"), pip=[*NO_INDEX, str(tmp_path)])
    with pytest.raises(ConfigError, match="not empty"):
        collect_wheelhouse(tmp_path, str(wheel))
    with pytest.raises(ConfigError, match="is no wheel"):
        collect_wheelhouse(tmp_path / "other", str(tmp_path / "pneumofed"))
    for target in (
        WheelTarget(python="3.11"),
        WheelTarget(platforms=("manylinux_2_28_x86_64",)),
        WheelTarget("3", ("x",)),
        WheelTarget("3.11", ("; rm",)),
    ):
        with pytest.raises(ConfigError, match=r"--python|--platform"):
            target.options()


def install(wheelhouse: Path, environment: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(wheelhouse / "install.sh"), str(environment), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)


@pytest.mark.slow
def test_the_script_installs_without_an_index_and_refuses_an_exchanged_wheel(wheelhouse: Path, tmp_path: Path) -> None:
    done = install(wheelhouse, tmp_path / "environment")
    assert done.returncode == 0 and done.stdout.endswith("pneumofed 0.2.0\n"), done.stderr
    exchanged = tmp_path / "exchanged"
    shutil.copytree(wheelhouse, exchanged)
    (tmp_path / "kit.lock").write_bytes((wheelhouse / LOCK_FILE).read_bytes())
    make_wheel(exchanged, "tiny", "1.0", needs=("smaller",))
    digest = hashlib.sha256((exchanged / "tiny-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    lock = re.sub(r"(tiny==1.0 --hash=sha256:)\w+", rf"\g<1>{digest}", (exchanged / LOCK_FILE).read_text())
    (exchanged / LOCK_FILE).write_text(lock)
    refused = install(exchanged, tmp_path / "second", str(tmp_path / "kit.lock"))
    assert refused.returncode != 0 and "HASHES" in refused.stderr, (
        "who exchanged the list beside the wheels too is found by the kit's"
    )
    (exchanged / "smaller-3.1-py3-none-any.whl").unlink()
    assert install(exchanged, tmp_path / "third").returncode != 0


if __name__ == "__main__":
    (DEPLOY / "Containerfile").write_text(image_of_checkout())
