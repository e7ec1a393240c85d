"""What was typed for a path or a text is what is used, whatever Hydra's grammar makes of its characters."""

import os
import random
import shlex
from pathlib import Path

import pytest
from conftest import composed
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from leanlm.common.errors import UserError
from leanlm.common.files import CONF
from leanlm.common.run_folder import Run
from leanlm.config import words
from leanlm.config.arguments import typed
from leanlm.config.checks import check
from leanlm.config.command_line import check_jobs, sweep_folder
from leanlm.config.line import Line
from leanlm.config.schema import Config
from leanlm.inference.continuation import Generate

ODD = [
    "the cat", '"the cat"', "'", "it's", '"a," b "c"', "a,b", "[x]", "{y: 1}", "(z", "a=b", "$HOME", "${a}", "\\${a}",
    "\\\\${a}", "~x", "a\\", "\\'", "тест 猫", "1e3", "007", "true", " ", "line\nline", "#!%&;|<>*?`", "choice(1,2)", "--x",
    "null,",
]  # fmt: skip
HARDEST = ["\"${a}\", 'b' \\", "\\${a}=[x] {y: 1} (z) ~ тест", "1e3"]


def trained(*arguments: str) -> DictConfig:
    """`conf/train.yaml` with what was typed."""
    return composed(*words.read([*arguments]))


def any_text(draw: random.Random) -> str:
    return "".join(draw.choices("ab ,=~$\\'\"[]{}():;${?é猫\n", k=draw.randint(1, 12)))


def test_whatever_is_typed_is_used_and_can_be_typed_again() -> None:
    draw = random.Random(1)
    parser = OverridesParser.create()
    for text in [*ODD, *(any_text(draw) for _ in range(40))]:
        for key in ("text", "run_dir"):
            (override,) = words.read([f"{key}={text}"])
            value = parser.parse_override(override).value()
            assert OmegaConf.create({"value": value}).value == text
            assert words.typed(override) == f"{key}={text}"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("generate", words.read([f"prompt={HARDEST[0]}", f"run={HARDEST[1]}"]))
    asked = typed(config, Generate)[1]
    assert (asked.prompt, asked.run) == (HARDEST[0], HARDEST[1])


def test_a_run_keeps_what_was_typed(tmp_path: Path) -> None:
    for number, text in enumerate(HARDEST):
        config = trained(f"sample={text}", f"data.path={text}", f"logger.tensorboard.name={text}{{")
        found, checked = typed(config)
        assert found == []
        run = Run(tmp_path / f"{number} {text.replace(os.sep, '')}")
        run.create({**vars(checked), "strategy": None, "optim": None})
        assert (run.config().sample, run.config().data.path) == (text, text)
        resumed = trained(f"resume={run.path}", f"sample={text}")
        assert (resumed.resume, resumed.sample) == (str(run.path), text)


def test_home_null_and_what_hydra_cannot_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert trained("data=text", "data.path=~/n o.txt").data.path == f"{tmp_path}/n o.txt"
    config = trained("run_dir=null", "sample=null", "logger.tensorboard.name=a (b")
    assert (config.run_dir, config.sample, config.logger.tensorboard.name) == (None, "null", "a (b")
    assert trained("logger.tensorboard.name='a (b'").logger.tensorboard.name == "a (b", "Hydra's grammar still holds"


def test_commas_in_a_sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a,b").mkdir()
    asked = [
        "-m",
        "data.path=a,b",
        "run_dir=c d,e=f",
        "sample=g,h",
        "logger=null,csv",
        "resume=choice(i,j)",
        "hydra.sweep.dir=k,l",
    ]
    jobs = Line(asked).jobs()
    assert len(jobs) == 2 * 2 * 2
    assert {tuple(map(words.typed, job)) for job in jobs} == {
        ("data.path=a,b", f"run_dir={one}", "sample=g,h", f"logger={two}", f"resume={three}", "hydra.sweep.dir=k,l")
        for one in ("c d", "e=f") for two in ("[]", "csv") for three in "ij"
    }  # fmt: skip


def test_only_the_time_is_filled_into_a_path() -> None:
    parser = OverridesParser.create()
    for key in ("hydra.sweep.dir", "run_dir"):
        (time, text) = words.read([f"{key}=a b/${{now:%Y}}", f"{key}=a b/${{c}}"])
        assert parser.parse_override(time).value() == "a b/${now:%Y}"
        assert parser.parse_override(text).value() == "a b/\\${c}"


def test_what_is_printed_can_be_pasted() -> None:
    for text in ODD:
        _, _, module, word = shlex.split(words.pasted("leanlm.train", f"resume={text}"))
        assert (module, word) == ("leanlm.train", f"resume={text}")


def problems(*arguments: str) -> list[str]:
    with pytest.raises(UserError) as error:
        check_jobs(Line([*arguments]), "train", Config)
    return list(error.value.problems)


def test_groups_that_are_left_out(text: Path) -> None:
    config = trained("logger=null", "callbacks=null", "experiment=null", "optim=null", "strategy=null", "data=text",
                      f"data.path={text}", "sequence=16")  # fmt: skip
    settings = check(config)
    assert (settings.config.logger, settings.config.callbacks, settings.plan.world) == (None, {}, 1)
    found = problems("model=null", "data=null", "device=null")
    assert [line.partition(":")[0] for line in found] == ["model=null", "data=null", "device=null"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("model=1", "model=1: there is no model of that name; choose one of"),
        ("model=gpt2 xl", "there is no model of that name"),
        ("data={a: 1}", "there is no data of that name"),
        ("max_steps=3 (", "max_steps=3 (: "),
        ("sample_tokens=${nothing}", "Interpolation key 'nothing' not found"),
        ("just a word", "just a word: not of the form key=value"),
        ("=3", "=3: not of the form key=value"),
        ("model=interval(1,2)", "model=interval(1,2): several values need -m, which makes a job of each"),
    ],
)
def test_one_line_for_what_hydra_takes_badly(wrong: str, says: str) -> None:
    (line,) = problems(wrong)
    assert says in line
    assert "\n" not in line


def test_folders_of_ones_own(tmp_path: Path) -> None:
    for file, content in (
        ("experiment/mine.yaml", "# @package _global_\nmax_steps: 5\ndefaults: [{override /model: own}]\n"),
        ("model/own.yaml", "defaults: [small]\nwidth: 32\n"),
    ):
        (tmp_path / "c d" / file).parent.mkdir(parents=True)
        (tmp_path / "c d" / file).write_text(content)
    folder = tmp_path / "c d"
    line = Line(["experiment=mine", "--config-dir", str(folder), "model=own"])
    check_jobs(line, "train", Config)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", line.overrides)
    assert (config.max_steps, config.model.width) == (5, 32)
    (line,) = problems("experiment=mina", f"--config-dir={folder}")
    assert "mine, nanogpt_cpu" in line
    assert "(did you mean mine?)" in line
    assert problems("seed=1", f"--config-dir={tmp_path / 'none'}") == [
        f"--config-dir={tmp_path / 'none'}: there is no such folder"
    ]


def test_a_sweep_is_not_written_over(tmp_path: Path) -> None:
    for name in ("2026-11-28_notes", "about"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    line = Line(["-m", "seed=1,2", f"hydra.sweep.dir={tmp_path}"])
    assert sweep_folder(line, "train") == []
    (tmp_path / "0_seed-1").mkdir()
    (tmp_path / "0_seed-1" / "config.yaml").touch()
    with pytest.raises(UserError, match=f"hydra.sweep.dir={tmp_path} holds a sweep already, with 0_seed-1: name another"):
        sweep_folder(line, "train")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (line,) = problems(f"run_dir={tmp_path}/file/run")
    assert line == f"run_dir={tmp_path}/file/run: {tmp_path}/file is no folder, choose another run_dir"
