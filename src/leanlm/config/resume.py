"""The configuration of a run that goes on."""

from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from leanlm.common.errors import UserError
from leanlm.common.files import literal
from leanlm.common.run_folder import Run
from leanlm.config.pretrained import begun_from_weights
from leanlm.config.schema import Settings
from leanlm.config.words import parsed, plain
from leanlm.launch.ranks import restarted, say

# What a resumed run may set anew; anything else would make another run of it.
RESUMABLE = {
    "resume", "restarts", "allow", "run_dir", "strategy", "devices", "device", "logger", "callbacks", "max_steps", "log_every",
    "val_every", "val_lanes", "val_overlap", "checkpoint_every", "keep_checkpoints", "sample", "sample_tokens", "data.path",
}  # fmt: skip
HYDRA = ("hydra.", "hydra/")  # keys and groups of Hydra's own


def effective(config: DictConfig, overrides: list[str]) -> DictConfig:
    """The configuration to run: with `resume`, the old run's own with the new overrides on top; with `init_from`, its model.

    Raises:
        UserError: an override would change the mathematics of the run.
    """
    if not config.resume:
        if restarted() and config.run_dir and Path(config.run_dir, "config.yaml").is_file():
            config.resume = literal(config.run_dir)  # torchrun has begun its processes again
        return begun_from_weights(config, overrides)
    run = Run.find(config.resume)
    merged = run.config()
    merged.resume, merged.run_dir = literal(str(run.path)), None
    given = [override.key_or_group for override in map(parsed, overrides) if override]
    refused = [
        key for key in given if not (plain(key) in RESUMABLE or key.partition(".")[0] in RESUMABLE or key.startswith(HYDRA))
    ]
    if refused:
        instead = f"would make another run of {run.path}, not continue it: leave it out, or start a new run"
        raise UserError(*(f"{key}=... {instead}" for key in refused))
    if "strategy" in given and "devices" not in given:
        merged.devices = None  # another plan brings its own
    for key in given:
        if key != "resume" and not key.startswith(HYDRA):
            OmegaConf.update(merged, key, literal(OmegaConf.select(config, key)), merge=False, force_add=True)
    return merged


def goes_on(settings: Settings, run: Run) -> Settings:
    """Settings with which a run resumes from its own last checkpoint, where its processes have been begun again after a failure
    and there is a checkpoint; else the same as before."""
    if not restarted() or not any(run.checkpoints.glob("step-*")):
        return settings
    say(f"begun again after a failure, {restarted()} of at most {settings.config.restarts} times")
    return replace(settings, config=replace(settings.config, resume=str(run.path)))
