"""Words of the command line: what was typed for a path or a text is what is used, whatever is in it.

Hydra's grammar gives a meaning to quotes, brackets, commas, spaces, `=`, `$` and `~`. It holds for the other keys, as far as it
can read their values.
"""

import os
import re
import shlex
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from leanlm.common.errors import UserError
from leanlm.common.files import CONF, literal

TEXTS = {"prompt", "sample", "system", "tasks", "text"}
PATHS = {"run", "resume", "run_dir", "init_from", "picture", "prompts", "include", "to", "data.path", "data.tokenizer"}
PATHS |= {"hydra.sweep.dir", "hydra.run.dir"}
NEVER_NULL = {"prompt", "sample"}  # there null is a text as any other
REFUSALS = (HydraException, OmegaConfBaseException, ValueError)  # by which Hydra and OmegaConf refuse an override
NOW = "${now:"  # of the text of a path Hydra makes the time of this
SEARCHED = "hydra.searchpath"  # Hydra's key of folders that it searches beside `conf/`


def read(overrides: list[str], multirun: bool = False, config_dir: str | None = None) -> list[str]:
    """The overrides as Hydra's grammar reads them.

    Args:
        overrides: as the shell handed them over.
        multirun: commas part the values of a sweep; but not in a text, nor in a path that is there.
        config_dir: a folder of the user's that is searched beside `conf/`.

    Raises:
        UserError: there is no such folder.
    """
    own = [] if config_dir is None else [Path(config_dir).expanduser().resolve()]
    if not all(folder.is_dir() for folder in own):
        raise UserError(f"--config-dir={config_dir}: there is no such folder")
    searched = [f"{SEARCHED}=[{quoted(f'file://{folder}')}]" for folder in own]
    return [*searched, *(_read(override, multirun, [CONF, *own]) for override in overrides)]


def options(group: str, overrides: list[str]) -> dict[str, Path]:
    """What can be chosen of a group, and its file, in `conf/` and where the overrides of a command line let Hydra search."""
    own = [found.value() for found in map(parsed, overrides) if found and found.key_or_group == SEARCHED]
    folders = [CONF, *(Path(str(name).removeprefix("file://")) for names in own if isinstance(names, list) for name in names)]
    found = {file.stem: file for folder in reversed(folders) if group for file in (folder / group).glob("*.yaml")}
    return dict(sorted(found.items()))


def plain(key: str) -> str:
    """A key without Hydra's signs; that of a path of a mixture's source as any data set has it."""
    return re.sub(r"^data\.sources\.[^.]+\.path$", "data.path", key.lstrip("+"))


def _read(override: str, multirun: bool, groups: list[Path]) -> str:
    key, equals, value = override.partition("=")
    name = plain(key)
    if not equals or (value == "null" and name in (TEXTS | PATHS) - NEVER_NULL):
        return override
    if name in TEXTS:
        return f"{key}={quoted(value)}"
    if name in PATHS and NOW in value:
        return f"{key}={_in_quotes(os.path.expanduser(value))}"
    if name in PATHS:
        several = multirun and not name.startswith("hydra.") and not os.path.exists(os.path.expanduser(value))
        if several and re.match(r"(choice|shuffle|sort|tag)\(", value):
            return override
        parts = value.split(",") if several else [value]
        return f"{key}={','.join(part if part == 'null' else quoted(os.path.expanduser(part)) for part in parts)}"
    if name and any((folder / name).is_dir() for folder in groups):  # a group is left out where its options are an empty list
        value = ",".join("[]" if part == "null" else part for part in value.split(","))
    return f"{key}={value}" if parsed(f"{key}={value}") else f"{key}={quoted(value)}"


def typed(override: str) -> str:
    """What a person types for an override: the way back from `read`."""
    key, _, value = override.partition("=")
    if plain(key) not in TEXTS | PATHS or value == "null":
        return override
    return f"{key}={OmegaConf.create([OverridesParser.create().parse_override(override).value()])[0]}"


def pasted(module: str, *overrides: str) -> str:
    """A command line that a shell takes: the module `module` with these words, as a person types them."""
    return shlex.join(["python", "-m", module, *overrides])


def parsed(override: str) -> Override | None:
    """An override as Hydra's parser understands it; None where it does not."""
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


def quoted(value: str) -> str:
    """A text as a value of Hydra's grammar, whatever is in it."""
    return _in_quotes(literal(value))


def _in_quotes(value: str) -> str:
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value) + "'"
