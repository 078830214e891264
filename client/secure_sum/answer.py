"""A site's answers to the steps of a secure sum. The one between `share` and `confirm` comes with a model: see `client.app`."""

from __future__ import annotations

from client.secure_sum.identity import Identity
from client.secure_sum.memory import MemoryFolder
from client.secure_sum.stages import MaskPlan, Participant
from common.audit_events import hash_arrays, hash_experiment
from common.config_types import Section
from common.errors import MessageError, SecureSumError
from common.messages import Instruction
from common.party_config import SiteConfig
from common.secure_sum.session import Purpose
from common.secure_sum.steps import Step, read_step


def answer_step(instruction: Instruction, config: SiteConfig) -> Section:
    """The reply to `advertise`, `share`, `confirm` or `unmask`; no data is read for it.

    Raises:
        SecureSumError: the step is not what the protocol allows.
        ConfigError: the site has no node key, or no certificate of the authority.
    """
    step = _step_of(instruction)
    return _take(step, _participant(instruction, step, config))


def begin_masking(instruction: Instruction, config: SiteConfig, purpose: Purpose) -> MaskPlan:
    """What will hide the vector that `instruction` asks for.

    Raises:
        SecureSumError: no step of a secure sum for `purpose`, or one that the protocol does not allow now.
        ConfigError: as above.
    """
    step = _step_of(instruction)
    if step.stage != "mask" or step.purpose != purpose:
        raise SecureSumError(f"a step '{step.stage}' for '{step.purpose}' came with a message to {purpose}")
    if instruction.arrays is None:
        raise MessageError("the instruction holds no arrays")
    return _participant(instruction, step, config).begin_masking(step, hash_arrays(instruction.arrays))


def _step_of(instruction: Instruction) -> Step:
    if not instruction.experiment.secure_aggregation.enabled or instruction.step is None:
        raise SecureSumError("the experiment and the message disagree on secure aggregation; nothing is sent in the clear")
    return read_step(instruction.step)


def _participant(instruction: Instruction, step: Step, config: SiteConfig) -> Participant:
    session = step.session(instruction.run, instruction.round, hash_experiment(instruction.experiment))
    return Participant(Identity.of(config), MemoryFolder(config.work_dir), instruction.experiment.secure_aggregation, session)


def _take(step: Step, participant: Participant) -> Section:
    match step.stage:
        case "advertise":
            return participant.advertise(step)
        case "share":
            return participant.share(step)
        case "confirm":
            return participant.confirm(step)
        case "unmask":
            return participant.unmask(step)
    raise MessageError("masking is asked for with training or evaluation, not alone")
