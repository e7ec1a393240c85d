"""Small texts, and runs composed exactly as the command line composes them."""

import os
import random
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from leanlm.common.files import CONF
from leanlm.config.resume import effective

WORDS = [
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "is",
    "was",
    "he",
    "for",
    "it",
    "with",
    "as",
    "his",
    "on",
    "be",
    "at",
    "by",
    "had",
    "not",
    "are",
    "but",
    "from",
    "or",
    "have",
    "an",
    "they",
    "which",
    "you",
]


def make_text(path: Path, words: int = 6000, seed: int = 0) -> Path:
    """Random words in lines."""
    draw = random.Random(seed)
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(3, 12))) for _ in range(words // 8)]
    path.write_text("\n".join(lines) + "\n")
    return path


def composed(*overrides: str) -> DictConfig:
    """`conf/train.yaml` with the given overrides."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return effective(compose("train", overrides=list(overrides)), list(overrides))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Nothing that a user has prepared is used or changed, and no test needs the network or data outside."""
    base = tmp_path_factory.getbasetemp()
    several = "PYTEST_XDIST_WORKER" in os.environ  # they share one, so that the machine is measured once
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEANLM_CACHE", str((base.parent if several else base) / "cache"))
        patch.delenv("LEANLM_DATA", raising=False)
        patch.setattr("leanlm.config.checks.on_gpus", lambda *_: [])  # of a machine's GPUs only the tests of that ask
        yield
