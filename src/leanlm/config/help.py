"""What `--help` prints: every key of a command, its value, and the comment that stands beside it in `conf/`."""

import json
import textwrap
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from leanlm.common.errors import UserError
from leanlm.common.files import CONF
from leanlm.config import words
from leanlm.config.arguments import leaves

SEVERAL = {"callbacks"}  # groups of which several options may be chosen at once
WIDTH, COLUMN = 80, 24  # characters of a line, and of those the ones before a comment
END = """
A key of a group is written with the group's name, as in model.width=256, and
several values with -m, as in -m model=lstm,gru seed=1,2: one run for each pair.
`--help model=lstm` shows other keys, `--cfg job` the configuration as YAML."""


def help_text(name: str, overrides: list[str]) -> str:
    """The help of the command `name`, with the values that `overrides` choose.

    Raises:
        UserError: there is no such key or value.
    """
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose(name, overrides, return_hydra_config=True)
        choices = config.hydra.runtime.choices
        config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        leaves(config)  # so that a value that leads nowhere is met here
    except words.REFUSALS as error:
        raise UserError(str(error).splitlines()[0]) from None
    groups = [str(key) for key in {**config, **choices} if "/" not in str(key) and (CONF / str(key)).is_dir()]
    file = CONF / f"{name}.yaml"
    alone = OmegaConf.masked_copy(config, [str(key) for key in config if key not in groups])
    lines = [*heading(file), "", *_rows(alone, comments(file), "")]
    for group in groups:
        options = words.options(group, overrides)
        chosen = [file for option, file in options.items() if option == choices.get(group)]
        how = "several, as in [best,ema], of" if group in SEVERAL else "one of"
        lines += ["", *_row(f"{group} = {_shown(choices.get(group))}", f"{how} {', '.join(options)}")]
        lines += [line for file in chosen for line in _row("", " ".join(heading(file)))]
        several = map(comments, chosen or options.values())  # each of them may be among those that are chosen at once
        described = {key: comment for each in several for key, comment in each.items()}
        lines += _rows(config.get(group) or DictConfig({}), described, "  .")
    return "\n".join([*lines, END])


def heading(file: Path) -> list[str]:
    """The lines of the comment with which a file of `conf/` begins."""
    first = takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    return [line.removeprefix("#").removeprefix(" ") for line in first if "@package" not in line]


def comments(file: Path) -> dict[str, str]:
    """Dotted key -> the comment beside it in a file of `conf/`, or else in the file of the same folder on which it builds."""
    source = file.read_text()
    found: dict[str, str] = {}
    for parent in yaml.safe_load(source).get("defaults", []):
        if isinstance(parent, str) and (other := file.with_name(f"{parent}.yaml")).is_file():
            found |= comments(other)
    return found | {key: comment or found.get(key, "") for key, comment in _beside(yaml.compose(source), source.splitlines())}


def _beside(node: yaml.MappingNode, lines: list[str], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each dotted key below a node of a YAML file that has a value beside it, and the comment after that."""
    for key, value in node.value:
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield from _beside(value, lines, f"{prefix}{key.value}.")
        else:
            yield f"{prefix}{key.value}", lines[value.end_mark.line][value.end_mark.column :].partition("#")[2].strip()


def _rows(config: DictConfig, described: dict[str, str], before: str) -> list[str]:
    """Lines with all keys of a configuration; a key without a comment has that of the mapping in which it stands."""
    rows = []
    for key, value in leaves(config).items():
        comment = described.get(key) or described.get(key.rpartition(".")[0], "")
        rows += _row(f"{before}{key} = {_shown(value)}", comment)
    return rows


def _row(head: str, comment: str) -> list[str]:
    """Lines with a key and its value before the column of comments."""
    first, later = f"{head}  ".ljust(COLUMN), " " * COLUMN
    if len(first) > WIDTH - COLUMN:  # the comment has the line below for itself
        return [head, *textwrap.wrap(comment, WIDTH, initial_indent=later, subsequent_indent=later, break_on_hyphens=False)]
    lines = textwrap.wrap(comment, WIDTH, initial_indent=first, subsequent_indent=later, break_on_hyphens=False)
    return lines or [head]


def _shown(value: Any) -> str:
    """A value as the command line takes it."""
    return (
        value if isinstance(value, str) and value.strip() == value != "" else json.dumps(value, default=OmegaConf.to_container)
    )
