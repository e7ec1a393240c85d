"""Every problem of a command line in one message, with the arithmetic, before anything is made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import composed

from leanlm.common.errors import UserError
from leanlm.common.files import CONF
from leanlm.common.run_folder import Run
from leanlm.config.checks import check
from leanlm.config.command_line import check_jobs
from leanlm.config.line import Line
from leanlm.config.schema import Config, exactness
from leanlm.data.corpus import Corpus, whole
from leanlm.launch.supervisor import ATTEMPT, PREDICTED
from leanlm.strategies.checks import on_gpus, resolve
from leanlm.strategies.plan import Plan


def problems(*arguments: str) -> list[str]:
    with pytest.raises(UserError) as error:
        check_jobs(Line(list(arguments)), "train", Config)
    return list(error.value.problems)


def test_good_command_lines_pass(text: Path) -> None:
    check_jobs(Line([]), "train", Config)
    check_jobs(Line(["--help"]), "train", Config)
    check_jobs(Line(["-m", "strategy=single,accumulate,ddp", "model=lstm,transformer"]), "train", Config)
    check_jobs(Line(["data=text", f"data.path={text}", "model=gpt2", "strategy.replicate=2"]), "train", Config)


def test_all_problems_at_once() -> None:
    found = problems(
        "modle=lstm", "max_stepps=3", "model=lstmm", "seed=abc", "strategy=dpp", "optim.lrr=1", "model.cell=gru",
    )  # fmt: skip
    assert len(found) == 6, "and no word about a key of the model that could not be found"
    for wanted in (
        "did you mean model",
        "did you mean max_steps",
        "did you mean lstm",
        "abc",
        "ddp",
        "did you mean optim.lr",
    ):
        assert any(wanted in line for line in found), wanted


def test_values_that_do_not_work_are_collected(text: Path) -> None:
    found = problems(
        "max_steps=0", "global_batch=10", "strategy.accumulate_grad_batches=4", "clip=-1", "optim.name=adam", "model.width=100",
        "model.heads=3", "data=text", "data.path=nowhere.txt", "data.tokenizer=bpee", "device.accelerator=tpu",
    )  # fmt: skip
    text = "\n".join(found)
    assert len(found) == 7, text
    assert "max_steps=0: it must be at least 1" in text
    assert "global_batch=10 does not divide by accumulate_grad_batches=4 = 4: write global_batch=8 or 12" in text
    assert "accumulate_grad_batches=5" in text
    assert "width=100 does not divide by heads=3: write heads=2" in text
    assert "data.tokenizer=bpee" in text


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["model.widht=7"], "did you mean model.width"),
        (["model.width=wide"], "model.width=wide: it must be a whole number"),
        (["model.positions=sine"], "one of learned, rope"),
        (["seed=1.5"], "seed=1.5"),
        (["clip=much"], "clip=much"),
        (["data=text"], "needs data.path"),
        (["data=text", "data.path=/nowhere"], "no such file"),
        (["data.tokenizer=x.json"], "no such file"),
        (["resume=/nowhere"], "not the folder of a run"),
        (["devices=4"], "write strategy=ddp, or devices=1"),
        (["strategy=ddp", "devices=32"], "global_batch=16 does not divide by replicate=32"),
        (["precision=fp16"], "bf16-mixed"),
        (["model=transformer", "model.cutoffs=[20]", "strategy.compile=true"], "sizes in an adaptive softmax"),
        (["optim.state=int2"], "choose one of fp32, bf16, int8, int4"),
        (["strategy.precision=fp64"], "it is precision=fp64 now"),
        (["strategy.optimizer_state=int8"], "it is optim.state=int8 now"),
        (["model=lstm", "model.cell=qrnn"], "one of elman_tanh"),
        (["model._target_=leanlm.nothing"], "no such class"),
        (["strategy.replicate=0"], "at least 1"),
        (["device=cuda"], "write device=cpu"),
        (["+model.new=1"], "no such argument"),
        (["model.dropout=1.5"], "dropout=1.5"),
        (["model.cutoffs=[20,10]"], "whole numbers that grow"),
        (["model=lstm", "model.cutoffs=[20]", "model.tied=true"], "nothing can be shared"),
        (["model=lstm", "model.width=12", "model.cutoffs=[20,30]"], "12 / 4**2 numbers, fewer than 1"),
        (["logger.tensorboard.needs=nosuchpackage"], "pip install nosuchpackage"),
        (["sequence=16", "val_overlap=16"], "of windows of sequence=16 tokens none would be counted"),
    ],
)
def test_one_line_for_one_mistake(wrong: list[str], says: str) -> None:
    found = problems(*wrong)
    assert len(found) == 1, found
    assert says in found[0]


def test_sequence_longer_than_the_text(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("x" * 900 + "\n" + "y" * 99)
    (line,) = problems("data=text", f"data.path={tmp_path}/t.txt", "sequence=5000")
    assert "901 bytes" in line
    assert "write sequence=900 or less" in line
    (line,) = problems("data=text", f"data.path={tmp_path}/t.txt", "model=lstm", "sequence=64", "global_batch=16")
    assert "16 lanes x sequence=64 + 1 = 1,025" in line
    assert "write sequence=56 or less" in line


def test_a_sweep_is_checked_whole_before_its_first_job() -> None:
    found = problems("-m", "strategy=single,ddp", "global_batch=16,15", "model=lstm,lstn")
    assert any("lstn" in line for line in found)
    assert any("global_batch=15 does not divide by replicate=2" in line for line in found)
    assert any("run_dir" in line for line in problems("-m", "run_dir=x", "seed=1,2"))


def test_an_existing_run_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (line,) = problems(f"run_dir={tmp_path}")
    assert f"resume={tmp_path}" in line


@pytest.mark.parametrize("name", [ATTEMPT, PREDICTED])
def test_a_run_that_is_planned_again_has_its_folder_already(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may end before the first checkpoint: the planner begins anew, and then the run that it has chosen."""
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    monkeypatch.setenv(name, "1")
    check(composed(f"run_dir={tmp_path}"))  # raises nothing


def time_of_children() -> float:
    """Processor seconds of the processes that were waited for."""
    spent = os.times()
    return spent.children_user + spent.children_system


def test_from_the_shell_in_time_and_without_a_trace(tmp_path: Path) -> None:
    """In less time than the import of Lightning takes, which a run needs and an error does not."""
    begin = time_of_children()
    subprocess.run([sys.executable, "-c", "import lightning"], check=True, timeout=100)
    bound = time_of_children() - begin
    begin = time_of_children()
    done = subprocess.run(
        [sys.executable, "-m", "leanlm.train", "model.width=100", "model.heads=3", "seed=x", f"run_dir={tmp_path}/run"],
        capture_output=True, text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert time_of_children() - begin < bound
    assert done.returncode == 2
    assert done.stderr.splitlines() == [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert not list(tmp_path.iterdir()), "nothing was made"


@pytest.mark.parametrize("group", ["model", "data", "strategy", "optim", "logger", "device", "experiment"])
def test_every_shipped_yaml_is_good(group: str, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leanlm.data import corpus

    monkeypatch.setattr(corpus, "_fetch", lambda *args: text)
    monkeypatch.setattr("leanlm.config.callbacks.find_spec", lambda name: name)  # wandb and mlflow need not be installed here
    for file in Path(CONF, group).glob("*.yaml"):
        more = [f"data.path={text}"] if group == "data" and file.stem in ("text", "jsonl") else []
        more += [f"data.sources={{a: {{data: text, path: '{text}'}}}}"] if file.stem == "mixture" else []
        more += ["objective=masked"] if file.stem in ("bert", "roberta", "modernbert") else []
        if group == "device" and "accelerator: cuda" in file.read_text():
            continue
        check(composed(f"{group}={file.stem}", "sequence=16", "global_batch=8", *more))


def test_every_key_of_the_yaml_files_has_a_comment() -> None:
    for file in Path(CONF).rglob("*.yaml"):
        lines = file.read_text().splitlines()
        assert any("#" in line for line in lines), file
    for line in Path(CONF, "train.yaml").read_text().split("\n\n")[1].splitlines():
        assert "#" in line, line


def test_resolve_fills_what_is_left_open() -> None:
    assert resolve(Plan(replicate=-1), 4, 16) == (Plan(replicate=4), [])
    assert resolve(Plan(replicate=-1), None, 16)[0].replicate >= 2
    plan, found = resolve(Plan(replicate=3, accumulate_grad_batches=2), None, 16)
    assert found == [
        "global_batch=16 does not divide by replicate=3 x accumulate_grad_batches=2 = 6: write global_batch=12 or 18"
    ]
    assert Plan(replicate=2, accumulate_grad_batches=4).micro_batch(32) == 4


@pytest.mark.parametrize(
    ("gpus", "arguments", "said"),
    [
        (2, ["strategy.replicate=4"], "replicate=4 = 4 GPUs, one for each process, and this machine has 2: write "
            "strategy.replicate=2 strategy.accumulate_grad_batches=2, or device=cpu"),
        (3, ["strategy.replicate=2", "strategy.tensor=2"], "strategy.tensor=1 strategy.accumulate_grad_batches=1, or"),
        (1, ["strategy=hsdp", "devices=4"], "write strategy=single strategy.accumulate_grad_batches=4, or device=cpu"),
        (1, ["strategy=ddp"], "replicate=2 = 2 GPUs, one for each process, and this machine has 1: write "
            "strategy.replicate=1 strategy.accumulate_grad_batches=2"),
    ],
)  # fmt: skip
def test_more_processes_than_gpus(
    gpus: int, arguments: list[str], said: str, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leanlm.config.checks.on_gpus", on_gpus)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    arguments = ["data=text", f"data.path={text}", "model=gpt2", "global_batch=16", "sequence=16", "precision=fp32", *arguments]
    check(composed(*arguments))  # no GPU that torch can use
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check(composed(*arguments, "device=cpu"))
    with pytest.raises(UserError, match="one for each process") as refused:
        check(composed(*arguments))
    assert said in str(refused.value)
    instead = str(refused.value).partition("write ")[2].partition(", or")[0].split()
    check(composed(*arguments, *instead, "devices=null"))
    for name, value in {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": gpus + 1, "WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    assert on_gpus(Plan(replicate=4), "auto") == [
        f"{gpus + 1} processes were started on this machine, which has {gpus} GPUs: start {gpus}, or write device=cpu"
    ]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(gpus))
    assert on_gpus(Plan(replicate=4), "auto") == []


@pytest.mark.parametrize(
    ("plan", "label"),
    [
        (Plan(), "bitwise"),
        (Plan(accumulate_grad_batches=2), "rounding"),
        (Plan(replicate=2), "rounding"),
        (Plan(compile=True), "rounding"),
    ],
)
def test_exactness_labels(plan: Plan, label: str) -> None:
    assert exactness(plan, "fp32", "fp32") == exactness(plan, "fp64", "fp32") == label
    assert exactness(plan, "bf16-mixed", "fp32") == exactness(plan, "fp32", "int8") == "changes"


def corpus_of_one_split() -> Corpus:
    return Corpus({"train": [whole(Path(__file__))], "valid": [whole(Path(__file__))]})


def corpus_of_this_file() -> Corpus:
    return Corpus({split: [whole(Path(__file__))] for split in ("train", "validation")})


def test_a_data_set_of_ones_own_needs_its_function_only() -> None:
    config = composed("model.width=32", "model.heads=2")
    config.data = {"_target_": f"{__name__}.corpus_of_this_file"}
    assert check(config).config.data == {**config.data, "tokenizer": "byte", "vocabulary": 8192, "ignore": []}
    config.data = {"_target_": f"{__name__}.corpus_of_one_split"}
    with pytest.raises(UserError, match="the corpus has train, valid, but no split validation"):
        check(config)


def test_latest_is_the_newest_run_that_has_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("first", "second", "crashed")):
        (tmp_path / "runs" / name / "checkpoints" / ("step-1" if name != "crashed" else "")).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
        os.utime(tmp_path / "runs" / name / "config.yaml", (number, number))
    assert Run.find("latest").path == Path("runs/second")


def test_a_resumed_run_has_the_devices_of_its_plan(tmp_path: Path) -> None:
    Run(tmp_path).create(composed("strategy=ddp", "devices=2"))
    for given, devices in (
        ([], 2),
        (["strategy=single"], None),
        (["strategy=single", "devices=1"], 1),
        (["strategy.zero1=true"], 2),
    ):
        assert composed(f"resume={tmp_path}", *given).devices == devices
