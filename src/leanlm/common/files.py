"""Where files lie: the configuration, caches; and how one is replaced in one go."""

import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parents[3] / "conf"


def defaults(file: str) -> dict[str, Any]:
    """The values of a file in `conf/`, where the defaults of every key stand."""
    node: Any = OmegaConf.to_container(OmegaConf.load(CONF / file))
    return node


def cache_folder() -> Path:
    """Where prepared data lives: `LEANLM_CACHE`, or `leanlm` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leanlm"
    return Path(os.environ.get("LEANLM_CACHE") or default).expanduser()


def write(path: Path, content: str) -> None:
    """Replace a file in one go: whoever looks sees the old content or the new."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(content)
    part.rename(path)
