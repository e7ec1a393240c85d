"""Tasks of lm_eval: its `hf` backend gives an export of a run the same answers, and the same log-likelihoods."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, composed, make_text
from shell import command

from leanlm.common.errors import UserError
from leanlm.common.run_folder import Run
from leanlm.config.checks import check
from leanlm.data.tokenizer import Bytes, Subwords
from leanlm.inference.export import Export, export
from leanlm.inference.harness import Harness, results_of
from leanlm.strategies.plan import Plan
from leanlm.training import build, checkpoint

CPU: dict[str, Any] = {"accelerator": "cpu"}
SMALL = ["model.width=16", "model.depth=2", "model.init=0.3"]
MODELS = {"byte": ["model=llama", *SMALL, "model.heads=4"], "bpe": ["model=gpt2", *SMALL, "model.heads=4"],
          "lstm": ["model=lstm", *SMALL]}  # fmt: skip
TASKS = {
    "pick": ("multiple_choice", {
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "num_fewshot": 1,
        "fewshot_split": "validation", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }),
    "read": ("loglikelihood_rolling", {
        "doc_to_text": "", "doc_to_target": "{{question}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    }),
    "write": ("generate_until", {
        "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["\n", " a"], "max_gen_toks": 12, "do_sample": False},
    }),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is fetched, and what libraries keep is kept here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        for name in ("HF_HOME", "HF_DATASETS_CACHE"):
            patch.setenv(name, str(tmp_path_factory.mktemp("kept")))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of each kind. Questions are shorter and longer than the context of 96 tokens."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(3)

    def some(most: int) -> str:
        return " ".join(draw.choices(WORDS.split(), k=draw.randint(1, most)))

    lines = [{"question": some(150 if i % 4 == 0 else 12) + " " * (i % 3), "choices": [f" {some(3)}" for _ in range(3)] + ["é", "e"],
              "answer": i % 5} for i in range(9)]  # fmt: skip
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, (kind, task) in TASKS.items():
        data = {"data_files": {"validation": str(folder / "lines.jsonl")}}
        whole = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "output_type": kind,
                 "validation_split": "validation", **task}  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(whole))
    return folder


def run_of(path: Path, kind: str) -> Run:
    """A run's folder with one checkpoint."""
    settings = check(composed(*MODELS[kind], "sequence=96", "device=cpu"), needs_text=False)
    run = Run(path)
    run.create(settings.as_run())
    tokenizer = Bytes() if kind == "byte" else Subwords.train([make_text(path / "text.txt").read_bytes()], 290)
    (path / "tokenizer.json").write_text(json.dumps(tokenizer.state()))
    parallel = build.parallel_model(settings.config, Plan(), tokenizer.vocabulary)
    optimizer = torch.optim.SGD(parallel.net.parameters())
    checkpoint.save(run.checkpoints, list(parallel.net.named_parameters()), optimizer, {}, {"step": 1, "text": ""}, 1)
    return run


@pytest.mark.parametrize("kind", MODELS)
def test_the_hf_backend_says_the_same_of_an_export(kind: str, tasks: Path, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    class Reference(HFLM):
        eot_token_id = HFLM.prefix_token_id  # a tokenizer of bytes has no mark of an end, without which HFLM writes nothing

    run = run_of(tmp_path / "run", kind)
    asked = Harness(run=str(run.path), tasks=",".join(TASKS), include=str(tasks), samples=True, rows=4, device=CPU)
    found, file = results_of(asked)
    folder, _ = export(Export(run=str(run.path), to=str(tmp_path / "out")))
    theirs = Reference(pretrained=str(folder), device="cpu", batch_size=1, trust_remote_code=True,
                       prefix_token_id=10 if kind == "byte" else None)  # fmt: skip
    expected = lm_eval.simple_evaluate(
        theirs, tasks=[*TASKS], task_manager=TaskManager(include_path=str(tasks), include_defaults=False))
    for task in TASKS:
        for own, other in zip(found["samples"][task], expected["samples"][task], strict=True):
            assert own["arguments"] == other["arguments"]
            assert own["filtered_resps"] == pytest.approx(other["filtered_resps"], abs=1e-4) if task == "read" else True
            print(task, own["filtered_resps"], other["filtered_resps"])
        assert found["results"][task].keys() == expected["results"][task].keys()
        print(found["results"][task], expected["results"][task])
    assert file is not None
    print(file, json.loads(file.read_text()).keys())
