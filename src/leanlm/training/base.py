"""What an adapter stands on: weights that its checkpoints do not hold."""

import hashlib
from pathlib import Path
from typing import Any

from leanlm.common.errors import UserError
from leanlm.common.run_folder import Run
from leanlm.config.pretrained import is_run
from leanlm.config.schema import Config
from leanlm.launch.ranks import on_rank_0
from leanlm.models.pretrained import Weights
from leanlm.training.checkpoint import newest_whole


def base_of(config: Config) -> str | None:
    """A fingerprint of the weights that a run's adapter stands on; None: it has none. All ranks must call it."""
    source = config.init_from if config.adapter else None
    if source is None:
        return None
    if not is_run(source):
        return on_rank_0(lambda: Weights(Path(source)).fingerprint())
    whole = newest_whole(Run(source).checkpoints)
    return None if whole is None else hashlib.sha256((whole / "manifest.json").read_bytes()).hexdigest()


def check_base(run: Run, state: dict[str, Any], found: str | None) -> None:
    """Raise UserError if the adapter of a checkpoint with this `state` stands on other weights than those `found`."""
    if state.get("base") != found:
        raise UserError(
            f"{run.path} holds an adapter alone, and {run.config().init_from} has other weights than those that it was trained "
            f"beside: put these back, or name their folder as init_from in {run.path / 'config.yaml'}"
        )
