"""From one machine to many: two torchrun agents, and what SLURM would start, as far as one machine can play them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from runner import losses, run_all
from shell import start

from leanlm.common.files import CONF
from leanlm.launch.ranks import _tasks_of_node, adopt_slurm

SMALL = [
    "model=small", "model.width=16", "data=text", "data.tokenizer=char", "global_batch=8", "sequence=12", "max_steps=6",
    "log_every=1", "device=cpu", "logger=csv", "sample_tokens=8", "precision=fp64",
]  # fmt: skip


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def together(commands: list[list[str]], cwd: Path) -> None:
    processes = [
        subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    try:
        for process in processes:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("machines")
    run_all({path / "alone": [*SMALL, f"data.path={text}"]})
    return path / "alone"


def test_two_nodes_under_torchrun(text: Path, alone: Path, tmp_path: Path) -> None:
    port = free_port()
    commands = [
        [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1",
         "--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "leanlm.train", "strategy=fsdp", *SMALL,
         f"data.path={text}"]
        for node in range(2)
    ]  # fmt: skip
    together(commands, tmp_path)
    (path,) = (tmp_path / "runs").iterdir()  # one folder for both nodes
    assert max(abs(a - b) for a, b in zip(losses(path), losses(alone), strict=True)) < 1e-9


def slurm(task: int, tasks: int, node: int, per_node: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "4321", "SLURM_JOB_NAME": "leanlm", "SLURM_NTASKS": str(tasks), "SLURM_NTASKS_PER_NODE": str(per_node),
        "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task % per_node), "SLURM_NODEID": str(node),
        "SLURM_NODELIST": "127.0.0.1", "SLURM_NNODES": str(tasks // per_node), "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{tasks // per_node})",
    }  # fmt: skip


def test_tasks_of_srun_find_each_other(text: Path, alone: Path, tmp_path: Path) -> None:
    asked = ["strategy=fsdp", *SMALL, f"data.path={text}", "run_dir=run"]
    tasks = [start("leanlm.train", *asked, cwd=tmp_path, env=slurm(task, 2, task, 1)) for task in range(2)]
    for done in [task.wait(timeout=120) for task in tasks]:
        assert done.returncode == 0, done.stderr
    assert max(abs(a - b) for a, b in zip(losses(tmp_path / "run"), losses(alone), strict=True)) < 1e-9


def test_a_batch_script_waits_for_no_other_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What sbatch starts knows how many tasks were asked for, but srun has not started them."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for key, value in slurm(0, 8, 0, 4).items():
        if "STEP" not in key:
            monkeypatch.setenv(key, value)
    adopt_slurm()
    assert "LOCAL_RANK" not in os.environ
    assert [_tasks_of_node("2(x3),1", node) for node in range(4)] == [2, 2, 2, 1]


def test_lightning_reads_the_same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.fabric.plugins.environments import SLURMEnvironment

    names = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "GROUP_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for key in names:
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)
    for key, value in slurm(5, 8, 1, 4).items():
        monkeypatch.setenv(key, value)
    adopt_slurm()
    ours = {key: os.environ.pop(key) for key in names}
    assert SLURMEnvironment.detect()
    lightning = SLURMEnvironment()
    lightning.validate_settings(num_devices=4, num_nodes=2)
    assert (int(ours["WORLD_SIZE"]), int(ours["RANK"])) == (lightning.world_size(), lightning.global_rank()) == (8, 5)
    assert (int(ours["LOCAL_RANK"]), int(ours["GROUP_RANK"])) == (lightning.local_rank(), lightning.node_rank()) == (1, 1)
    assert (ours["MASTER_ADDR"], int(ours["MASTER_PORT"])) == (lightning.main_address, lightning.main_port)
    assert ours["LOCAL_WORLD_SIZE"] == "4"


def test_the_job_that_slurm_gets(tmp_path: Path) -> None:
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    overrides = ["hydra/launcher=slurm", "hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=4", "strategy=fsdp"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=[*overrides, "hydra.job.num=0", "hydra.job.id=0"], return_hydra_config=True)
    asked = OmegaConf.to_container(config.hydra.launcher, resolve=False)
    assert asked["_target_"].endswith("SlurmLauncher")
    given = {
        key: config.hydra.launcher[key] for key in ("nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "timeout_min")
    }
    names = SlurmExecutor._equivalence_dict()
    text = _make_sbatch_string("srun leanlm", tmp_path, **{names.get(key, key): value for key, value in given.items()})
    for line in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=8", "--time=1440"):
        assert f"#SBATCH {line}\n" in text


@pytest.mark.slow
def test_a_sweep_through_submitit(text: Path, tmp_path: Path) -> None:
    """Its local executor pickles and runs the jobs as its SLURM one does."""
    done = subprocess.run(
        [sys.executable, "-m", "leanlm.train", "-m", "hydra/launcher=submitit_local", "strategy=single,ddp", *SMALL,
         f"data.path={text}", "hydra.launcher.timeout_min=5"],
        cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "runs").iterdir()
    one, two = sorted(path for path in sweep.iterdir() if path.is_dir() and not path.name.startswith("."))
    assert (one.name, two.name) == ("0_strategy=single", "1_strategy=ddp")
    assert max(abs(a - b) for a, b in zip(losses(one), losses(two), strict=True)) < 1e-9
