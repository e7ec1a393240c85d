"""Tasks of lm_eval: its `hf` backend gives an export of a run the same answers, and the same log-likelihoods."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import WORDS, composed, make_text

from leanlm import harness as command
from leanlm.common.errors import UserError
from leanlm.common.run_folder import Run
from leanlm.config.checks import check
from leanlm.data.tokenizer import Bytes, Subwords
from leanlm.inference.export import Export, export
from leanlm.inference.harness import Harness, results_of
from leanlm.inference.restoring import restore
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

    lines = [
        {
            "question": some(150 if i % 4 == 0 else 12) + " " * (i % 3),
            "choices": [f" {some(3)}" for _ in range(3)] + ["é", "e"],
            "answer": i % 5,
        }
        for i in range(9)
    ]
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
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parallel.net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.5)
    optimizer = torch.optim.SGD(parallel.net.parameters())
    checkpoint.save(run.checkpoints, list(parallel.net.named_parameters()), optimizer, {}, {"step": 1, "text": ""}, 1)
    return run


def answers(sample: dict[str, Any]) -> list[Any]:
    """Numbers and texts that a model gave for a document."""
    flat = (each for several in sample["resps"] for each in several)
    return [part for each in flat for part in (each if isinstance(each, list | tuple) else [each])]


def same(found: dict[str, Any], folder: Path, tasks: Path, **more: Any) -> None:
    """What was found is what the `hf` backend finds with a folder."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    class Reference(HFLM):
        eot_token_id = HFLM.prefix_token_id  # a tokenizer of bytes has no mark of an end, without which HFLM writes nothing

    theirs = Reference(pretrained=str(folder), device="cpu", batch_size=1, trust_remote_code=True, **more)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    expected = simple_evaluate(theirs, tasks=[*TASKS], task_manager=manager)
    for task in TASKS:
        for own, other in zip(found["samples"][task], expected["samples"][task], strict=True):
            assert own["arguments"] == other["arguments"]
            assert answers(own) == pytest.approx(answers(other), abs=1e-4)
        numbers = {name: value for name, value in expected["results"][task].items() if not isinstance(value, str)}
        assert len(numbers) >= 2
        assert {name: found["results"][task][name] for name in numbers} == pytest.approx(numbers, rel=1e-4)


@pytest.mark.usefixtures("own_modules")
@pytest.mark.parametrize("kind", MODELS)
def test_the_hf_backend_says_the_same_of_an_export(kind: str, tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    run = run_of(tmp_path / "run", kind)
    asked = Harness(run=str(run.path), tasks=",".join(TASKS), include=str(tasks), samples=True, rows=4, device=CPU)
    found, file = results_of(asked)
    assert file == run.path / "harness-pick-read-write.json"
    assert json.loads(file.read_text())["results"] == found["results"]
    assert len({*map(str, map(answers, found["samples"]["write"]))}) > 3, "the model writes something"
    folder, _ = export(Export(run=str(run.path), to=str(tmp_path / "out")))
    same(found, folder, tasks, prefix_token_id=10 if kind == "byte" else None)


def test_a_folder_whose_tokenizer_begins_each_text_with_a_mark(tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    run = run_of(tmp_path / "run", "bpe")
    folder, _ = export(Export(run=str(run.path), to=str(tmp_path / "out")))
    mark = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    before = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": mark["id"], "type_id": 0}},
              {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence":
              {"id": "B", "type_id": 0}}], "special_tokens": {mark["id"]: mark}}  # fmt: skip
    model = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": before}
    (folder / "tokenizer.json").write_text(json.dumps(model))
    found, file = results_of(Harness(run=str(folder), tasks=",".join(TASKS), include=str(tasks), samples=True, device=CPU))
    assert file is None
    same(found, folder, tasks)


def test_what_is_asked_of_a_model_and_cannot_be_had(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from leanlm.inference.harness_model import HarnessModel

    run = run_of(tmp_path / "run", "byte")
    config = check(run.config(), needs_text=False).config
    tokenizer, parallel, _ = restore(config, Plan(), run)
    model = HarnessModel(parallel.net.eval(), tokenizer)

    def asks(*arguments: Any) -> list[Any]:
        return [SimpleNamespace(args=arguments)]

    with pytest.raises(UserError, match="asks for 96 tokens, but sequence=96 leaves no room"):
        model.generate_until(asks("x", {"max_gen_toks": 96}))
    with pytest.raises(UserError, match="generation_kwargs have num_beams, unknown here"):
        model.generate_until(asks("x", {"num_beams": 4}))
    with pytest.raises(UserError, match="an answer to score has 97 tokens, sequence=96 has no room"):
        model.loglikelihood(asks("x", "y" * 97))
    drawn = model.generate_until(2 * asks("x", {"max_gen_toks": 20, "do_sample": True, "temperature": 1.5, "top_k": 50}))
    assert len({*drawn}) == 2, "each request is drawn anew"


def test_the_chat_template_of_a_tokenizer() -> None:
    pytest.importorskip("lm_eval")
    from leanlm.inference.harness_model import HarnessModel

    each = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
    template = each + "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer = Subwords(Subwords.train([WORDS.encode()], 280).model.to_str(), {"chat": template})
    config = check(composed(*MODELS["lstm"], "device=cpu"), needs_text=False).config
    model = HarnessModel(build.model(config, Plan(), tokenizer.vocabulary), tokenizer)
    said = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "as "}]
    assert model.apply_chat_template(said[:1]) == "<user>the<|endoftext|><assistant>"
    assert model.apply_chat_template(said, add_generation_prompt=False) == "<user>the<|endoftext|><assistant>as"


def test_what_is_wrong_is_said_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanlm.inference.harness.find_spec", lambda _: None)
    with pytest.raises(UserError) as raised:
        command.job(
            Harness(run="nowhere", rows=0, limit=0, fewshot=-1, include="no", to="no/where.json", device={"memory": "1GiB"})
        )
    assert raised.value.problems == (
        "the harness needs the package lm_eval, which is not installed: pip install -e '.[harness]'",
        "tasks=null: name tasks, such as tasks=hellaswag,arc_easy",
        "include=no: there is no such folder",
        "to=no/where.json: the folder for this file is not there: make it first",
        "rows=0: it must be at least 1",
        "fewshot=-1: it must not be negative",
        "limit=0: a number of documents, a share below 1, or null for all",
        "device.memory: the harness keeps to no budget: leave it out; rows=1 takes least",
    )


def test_the_command_says_what_it_found(tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("lm_eval")
    run = run_of(tmp_path / "run", "bpe")
    asked = Harness(run=str(run.path), tasks="pick", include=str(tasks), limit=2, to=str(tmp_path / "found.json"), device=CPU)
    command.job(asked)
    assert "|pick |" in (said := capsys.readouterr().out)
    assert f"results: {tmp_path / 'found.json'}" in said
    assert json.loads((tmp_path / "found.json").read_text())["n-samples"]["pick"] == {"original": 9, "effective": 2}
    with pytest.raises(UserError, match="has no chat template"):
        results_of(replace(asked, chat=True))
    broken = json.loads((tasks / "read.yaml").read_text()) | {"dataset_kwargs": {"data_files": str(tmp_path / "gone.jsonl")}}
    (tmp_path / "read.yaml").write_text(json.dumps(broken))
    with pytest.raises(UserError, match="tasks=read: FileNotFoundError: "):
        results_of(replace(asked, tasks="read", include=str(tmp_path)))
