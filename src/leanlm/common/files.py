"""Where files lie: the configuration, caches; and how one is replaced in one go."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from leanlm.common.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
# In an installed package the configuration lies in it (see setup.py), in a clone beside `src`.
CONF = next((folder for folder in (PACKAGE / "conf", PACKAGE.parents[1] / "conf") if folder.is_dir()), PACKAGE / "conf")
SET_CACHE = "set LEANLM_CACHE to a folder that can be written and has room"


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
    """Where prepared data lives: `LEANLM_CACHE`, or `leanlm` in the user's cache folder.

    Raises:
        UserError: there is neither, since this user has no home folder.
    """
    given, base = os.environ.get("LEANLM_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(os.path.expanduser(given or f"{base}/leanlm"))
    if not given and str(folder).startswith("~"):
        raise UserError(f"this user has no home folder for prepared data: {SET_CACHE}")
    return folder


def writable(folder: Path) -> Path:
    """A folder in the cache, made if need be.

    Raises:
        UserError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
        reason = "it is read-only"
    except OSError as error:
        reason = str(error.strerror)
    raise UserError(f"prepared data cannot be kept in {folder} ({reason}): {SET_CACHE}")


def write_json(path: Path, content: dict[str, Any]) -> None:
    write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write(path: Path, content: str | Iterable[bytes]) -> None:
    """Replace a file in one go: whoever looks sees the old content or the new, also after the machine has stopped. Processes of
    any number of machines may write the same file at once."""
    part = path.with_name(f".{path.name}.{os.urandom(6).hex()}")
    try:
        with open(part, "wb") as file:
            file.writelines([content.encode()] if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
