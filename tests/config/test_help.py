"""`--help` of each command: every key that it composes, with the comment of `conf/`, in 80 columns."""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from itertools import zip_longest
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from leanlm.common.errors import UserError
from leanlm.common.files import CONF
from leanlm.config.arguments import leaves
from leanlm.config.command_line import check_jobs
from leanlm.config.help import WIDTH, comments, heading, help_text
from leanlm.config.line import Line
from leanlm.config.schema import Config
from leanlm.inference.continuation import Generate
from leanlm.inference.evaluation import Evaluate
from leanlm.inference.export import Export
from leanlm.inference.harness import Harness
from leanlm.planning.query import Ask

SCHEMAS = {"train": Config, "evaluate": Evaluate, "generate": Generate, "export": Export, "harness": Harness, "plan": Ask}


@cache
def beside(folder: Path) -> dict[str, set[str]]:
    """The last part of a key -> every comment that stands behind it in the YAML files of a folder."""
    found: dict[str, set[str]] = {}
    for file in folder.glob("*.yaml"):
        for key, comment in re.findall(r"^ *(\w+):.*\S +# (.*)$", file.read_text(), re.MULTILINE):
            found.setdefault(key, set()).add(comment)
    return found


def options(name: str) -> dict[str, list[str]]:
    """The groups of a command and what can be chosen of each."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(name, return_hydra_config=True)
    known = [group for group in {**config, **config.hydra.runtime.choices} if "/" not in group and group != "hydra"]
    found = {group: [file.stem for file in CONF.glob(f"{group}/*.yaml")] for group in known}
    return {group: names for group, names in found.items() if names}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_key_is_there_with_its_comment_on_two_lines_at_most(name: str) -> None:
    groups = options(name)
    single = [[f"{group}={one}" for one in several] for group, several in groups.items() if group != "experiment"]
    every = [[override for override in each if override] for each in zip_longest(*single)]
    every += [[f"experiment={one}"] for one in groups.get("experiment", [])]
    for overrides in [[], *(every if name == "train" else every[:1])]:  # the others have groups of it
        text = help_text(name, overrides)
        assert max(map(len, text.splitlines())) <= WIDTH, overrides
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose(name, overrides)
        said = " ".join(text.split())
        for key in leaves(config):
            group, _, rest = key.partition(".")
            known = beside(CONF / group if group in groups else CONF)
            *_, outer, inner = ["", *key.split(".")]
            head = f".{rest}" if group in groups else key
            comments = known.get(inner) or known.get(outer, {"nothing"})
            found = re.search(rf"{re.escape(head)} = .{{1,60}}? (?:{'|'.join(map(re.escape, comments))})", said)
            assert found or key == group in groups, (overrides, key)
        for row in re.split(r"\n(?=\S|  \.|$)", text):
            assert row.strip().count("\n") <= 1 or row.split()[0] in groups or " = " not in row, row
        for group, several in groups.items():
            named = re.search(rf"{group} = \S+ (?:one of|several, as in \[best,ema\], of) ((?:\S+, )*\S+)", said)
            assert named is not None
            assert named[1].split(", ") == sorted(several)


def test_a_comment_is_that_of_the_file_or_of_the_one_on_which_it_builds(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "# Head.\na: 1   # one\nb: '#x'   # two\nc: {d: 1}  # three\ne:\n  f: 1  # four\n  g: 2\n"
    )
    (tmp_path / "child.yaml").write_text("defaults: [base]\na: 5\nb: 6  # six\n")
    expected = {"a": "one", "b": "two", "c": "three", "e.f": "four", "e.g": ""}
    assert comments(tmp_path / "base.yaml") == expected
    assert comments(tmp_path / "child.yaml") == expected | {"b": "six", "defaults": ""}
    assert heading(tmp_path / "base.yaml") == ["Head."]


def test_values_are_those_of_the_command_line() -> None:
    text = help_text("train", ["model=lstm", "seed=7", "model.cutoffs=[20,30]", "strategy=ddp"])
    for line in ("seed = 7 ", "model = lstm ", "  .cutoffs = [20, 30] ", "  .cell = lstm ", "  .replicate = -1 "):
        assert f"\n{line}" in text, line
    assert "heads" not in text


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_examples_are_good_command_lines(name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(text.read_text())
    Path("runs/X/checkpoints/step-1").mkdir(parents=True)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        Path("runs/X/config.yaml").write_text(OmegaConf.to_yaml(compose("train", ["data=text", "data.path=book.txt"])))
    examples = [line for line in help_text(name, []).splitlines() if line.startswith("  python -m ")]
    assert len(examples) == 5
    for line in examples:
        _, _, module, *arguments = shlex.split(line)
        assert module == f"leanlm.{name}"
        check_jobs(Line(arguments), name, SCHEMAS[name])


def test_from_the_shell_in_time() -> None:
    begin = os.times()
    done = subprocess.run([sys.executable, "-m", "leanlm.train", "--help"], capture_output=True, text=True, timeout=100)
    spent = os.times()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == help_text("train", []) + "\n"
    assert spent.children_user - begin.children_user < 4
    for wrong in ("seed=${nothing}", "model=1"):
        with pytest.raises(UserError):
            help_text("train", [wrong])
    wrong = subprocess.run(
        [sys.executable, "-m", "leanlm.train", "--help", "modle=x"], capture_output=True, text=True, timeout=100
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
