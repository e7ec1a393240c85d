"""Where files lie: the configuration, caches; and how one is replaced in one go."""

import os
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

PACKAGE = Path(__file__).resolve().parents[1]
# In an installed package the configuration lies in it (see setup.py), in a clone beside `src`.
CONF = next((folder for folder in (PACKAGE / "conf", PACKAGE.parents[1] / "conf") if folder.is_dir()), PACKAGE / "conf")


def defaults(file: str) -> dict[str, Any]:
    """The values of a file in `conf/`, where the defaults of every key stand."""
    node: Any = OmegaConf.to_container(OmegaConf.load(CONF / file))
    return node


def literal(value: Any) -> Any:
    """A value for OmegaConf, of whose texts `${` is a part as any other, also in lists and mappings."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, dict):
        return {key: literal(each) for key, each in value.items()}
    if isinstance(value, list):
        return [literal(each) for each in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def cache_folder() -> Path:
    """Where prepared data lives: `LEANLM_CACHE`, or `leanlm` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leanlm"
    return Path(os.environ.get("LEANLM_CACHE") or default).expanduser()


def write(path: Path, content: str) -> None:
    """Replace a file in one go: whoever looks sees the old content or the new."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(content)
    part.rename(path)
