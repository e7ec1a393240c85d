"""Small texts, and runs composed exactly as the command line composes them."""

import copy
import multiprocessing.forkserver
import os
import random
import signal
import sys
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from leanlm.common.files import CONF
from leanlm.config.resume import effective

WORDS = "the of and a to in is was he for it with as his on be at by had not are but from or have an they which you"


def make_text(path: Path, words: int = 6000, seed: int = 0) -> Path:
    """Random words in lines."""
    draw = random.Random(seed)
    lines = [" ".join(draw.choices(WORDS.split(), k=draw.randint(3, 12))) for _ in range(words // 8)]
    path.write_text("\n".join(lines) + "\n")
    return path


def composed(*overrides: str) -> DictConfig:
    """`conf/train.yaml` with the given overrides. Hydra takes 0.15 s to read the files of the groups, so it does that once for
    each choice of them; the values are then set by the function with which it sets them itself."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    choices = [each for each in parsed if (CONF / each.key_or_group).is_dir() or each.key_or_group.startswith("hydra.")]
    config = copy.deepcopy(_chosen(tuple(str(each.input_line) for each in choices)))
    ConfigLoaderImpl._apply_overrides_to_config([each for each in parsed if each not in choices], config)
    return effective(config, list(overrides))


@cache
def _chosen(groups: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=list(groups))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text") / "text.txt")


RATES = {"flops": {"float32": 1e11, "bfloat16": 6e10, "float64": 5e10}, "bandwidth": 1e10, "paging": 4e9,
         "small_paging": 1.5e9, "overhead": 5e-6}  # fmt: skip
MEASURED = {
    "alone": RATES,
    "pair": RATES | {"flops": {"float32": 6e10, "bfloat16": 4e10, "float64": 3e10}, "bandwidth": 6e9},
    "links": {"send": 1e9, "all-reduce": 8e8, "all-gather": 9e8, "reduce-scatter": 7e8},
    "latency": 2e-4,
    "common": 120 << 20,
    "process": [300 << 20, 320 << 20, 250 << 20],
}


def _know_this_machine() -> None:
    """Store what a probe of 24 seconds would find; test_devices.py has one made."""
    from leanlm.planning.hardware import devices

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "measured", lambda: MEASURED)
        devices.this_machine()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Nothing that a user has prepared is used or changed, and no test needs the network or data outside."""
    base = tmp_path_factory.getbasetemp()
    several = "PYTEST_XDIST_WORKER" in os.environ  # they share one, so that the machine is measured once
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as shells start what is in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEANLM_CACHE", str((base.parent if several else base) / "cache"))
        patch.delenv("LEANLM_DATA", raising=False)
        patch.setattr("leanlm.config.checks.on_gpus", lambda *_: [])  # of a machine's GPUs only the tests of that ask
        # processes that a test starts are forked from a server that has imported everything and done nothing
        patch.setattr("leanlm.launch.processes.START_METHOD", "forkserver")
        multiprocessing.set_forkserver_preload(["warm"])
        with pytest.MonkeyPatch.context() as at_its_start:
            at_its_start.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            multiprocessing.forkserver.ensure_running()
        _know_this_machine()
        yield


@pytest.fixture(scope="session")
def own_modules(tmp_path_factory: pytest.TempPathFactory):
    """Where transformers copies the code of exports that it runs: it imports that from one place in a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield
