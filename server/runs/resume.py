"""May a run be gone on with, and what can be done with one that ended early? Answered from its folder, before anything starts.

A run goes on only with the settings that it was started with, since its schedules and draws depend on them: another number of rounds
gives another learning rate in each. What has succeeded is over, and nothing undoes it.
"""

from __future__ import annotations

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.reader import differing_keys
from pneumofed.common.errors import CheckpointError
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.records import RunState
from pneumofed.server.runs.summary_records import RunSummary


def check_resumable(folder: RunFolder, experiment: ExperimentConfig) -> None:
    """Checks that the run in `folder` has something to go on from, and was started with `experiment`. Needs no torch.

    Args:
        folder: of the run to resume.
        experiment: what is asked for now.

    Raises:
        CheckpointError: no round was completed, or a key differs, which is named; says what to do.
        ConfigError: the run's configuration cannot be read.
    """
    if not folder.has_succeeded and not folder.last_checkpoint.exists():
        raise CheckpointError(f"{folder.path} cannot be resumed: {describe_way_on(folder)}")
    different = differing_keys(folder.read_config().model_dump(), experiment.model_dump())
    if not different:
        return
    way_on = "resume with the same settings, or start a new run in another folder"
    if folder.has_succeeded:
        way_on = "it has finished; a new run in another folder goes on from its model (`pneumofed export`, then --init)"
    raise CheckpointError(f"the run to resume in {folder.path} was started with other settings: {'; '.join(different)}; {way_on}")


def describe_way_on(folder: RunFolder) -> str:
    """Writes the end of a sentence about a run that was stopped or failed: what can be done with it now."""
    if folder.has_succeeded:
        return "the run itself has finished, and nothing of it is lost; --resume --baselines goes on with the baselines"
    if folder.last_checkpoint.exists() and (history := folder.read_history()):
        return f"--resume goes on after round {history[-1].round}"
    return "no round was completed; start it again without --resume"


def clear_ending(folder: RunFolder) -> None:
    """Removes the earlier attempt's status and heartbeat, which would be read as this one's; of a damaged summary nothing is kept."""
    try:
        summary = folder.read_summary()
    except CheckpointError:
        summary = RunSummary()
    if summary.model_fields_set:
        folder.write_summary(summary.without("error").updated(status=RunState.SUBMITTED.value))
    folder.heartbeat.unlink(missing_ok=True)
