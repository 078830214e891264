"""One hospital with a policy, a ledger and an audit log, asked as a coordinator asks it: through the handlers that Flower calls."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from pneumofed.client.app import app
from pneumofed.client.federation.site_data import read_site_config
from pneumofed.common.audit.log import AuditEntry, read_entries
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import SiteConfig
from pneumofed.common.data.manifest import Manifest, read_manifest, write_manifest
from pneumofed.common.evaluation.statistics import Statistics
from pneumofed.common.model_bundle.suitability import Suitability
from pneumofed.common.models.build import build_model
from pneumofed.common.wire.instructions import Instruction, pack_instruction
from pneumofed.common.wire.messages import ModelArrays, read_failure, unpack_evaluation
from pneumofed.common.wire.parameter_layout import ArraysLayout
from tests.tiny import TinyFederation, tiny_experiment

GROUP: dict[str, Any] = {"model": {"norm": "group"}, "loss": {"logit_adjustment": False}}


def private_experiment(**privacy: Any) -> ExperimentConfig:
    usual = {"mechanism": "dp_sgd", "unit": "patient", "noise_multiplier": 3.0, "expected_batch_size": 4096}
    return tiny_experiment(rounds=1, **GROUP, privacy={**usual, **privacy})


class Hospital:
    """A site of `patients` patients below `folder`, whose policy is the default one but for `policy`."""

    def __init__(self, folder: Path, patients: int, **policy: Any) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.federation = TinyFederation(folder, sites=1, patients=patients)
        self.file = self.federation.sites / "0.yaml"
        self.file.write_text(yaml.safe_dump({**yaml.safe_load(self.file.read_text()), "policy": "../policy.yaml"}))
        self.set_policy(**policy)

    @property
    def config(self) -> SiteConfig:
        return read_site_config(self.file)

    @property
    def audit(self) -> list[AuditEntry]:
        return read_entries(Path(self.config.work_dir) / "audit.jsonl")

    @property
    def manifest(self) -> Manifest:
        return read_manifest(Path(self.config.manifest))

    def set_policy(self, **policy: Any) -> None:
        (self.federation.folder / "policy.yaml").write_text(yaml.safe_dump(policy))

    def change(self, manifest: Manifest) -> None:
        """The hospital's images are now those of `manifest`."""
        write_manifest(manifest, Path(self.config.manifest))

    def ask(
        self,
        kind: str,
        experiment: ExperimentConfig,
        run: str = "run-1",
        number: int = 1,
        seed: int = 3,
        suitability: Suitability | None = None,
        alone: bool = False,
    ) -> Message:
        """Its reply to a message of `kind`, with the weights that `seed` gives; any name stands for a run's token."""
        token = hashlib.sha256(run.encode()).hexdigest()[:16]
        model = build_model(experiment.model, experiment.task, seed)
        arrays = ModelArrays(*ArraysLayout.of(model).flatten(model))
        first = arrays if alone else None
        asked = Instruction(experiment, token, number, arrays, first=first, suitability=suitability)
        context = Context(1, 5, {"partition-id": 0}, RecordDict(), {"sites": str(self.federation.sites)})
        return app(Message(pack_instruction(asked), dst_node_id=5, message_type=kind), context)

    def refusal(self, kind: str, experiment: ExperimentConfig, **asked: Any) -> str:
        """What the coordinator hears where the hospital refuses; empty where it answers."""
        reply = self.ask(kind, experiment, **asked)
        return read_failure(reply).sentence if reply.has_error() else ""

    def statistics(self, experiment: ExperimentConfig, **asked: Any) -> Statistics:
        """What leaves of its validation patients."""
        evaluation = unpack_evaluation(self.ask("evaluate", experiment, **asked).content)
        return Statistics.from_numbers(evaluation.statistics, classes=2)
