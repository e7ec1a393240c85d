"""Generation with a state or a cache against reading everything anew; and a sentence's probability by the chain rule."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import composed
from hydra.utils import instantiate

from leanlm.common.errors import UserError
from leanlm.common.run_folder import Run
from leanlm.config.checks import check
from leanlm.inference.evaluation import Evaluate, evaluate
from leanlm.inference.restoring import restore
from leanlm.models.contract import Model, initialize
from leanlm.models.generation import LogitsAfter, generate, pick
from leanlm.training import build as builders
from leanlm.training.fit import fit

MODELS = {
    "lstm": ["model=lstm", "model.width=12", "model.depth=2"],
    "gru": ["model=gru", "model.width=12"],
    "elman": ["model=elman", "model.width=12"],
    "gpt2": ["model=gpt2", "model.width=16", "model.depth=2", "model.heads=2", "model.init=0.3"],
    "llama": ["model=llama", "model.width=16", "model.depth=2", "model.heads=4", "model.kv_heads=2", "model.init=0.3"],
    "modern": [
        "model=transformer",
        "model.width=16",
        "model.depth=2",
        "model.heads=2",
        "model.zero_init=false",
        "model.init=0.3",
    ],
}


def build(model: str, sequence: int) -> Model:
    net = instantiate(composed(*MODELS[model]).model, vocabulary=29, sequence=sequence)
    initialize(net, 5)
    return net.eval().double()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_cached_equals_from_scratch(model: str, temperature: float) -> None:
    """Also beyond the context, where the newer half is read again."""
    net = build(model, 16)
    prompt = [3, 1, 4, 1, 5]
    cached = list(generate(net, prompt, 60, temperature, seed=2))
    assert cached == list(generate(LogitsAfter(net, cached=False), prompt, 60, temperature, seed=2))
    assert len(cached) == 60


@pytest.mark.parametrize("model", ["gpt2", "modern"])
def test_greedy_equals_a_plain_loop(model: str) -> None:
    net = build(model, 64)
    tokens = [3, 1, 4]
    for _ in range(40):
        tokens.append(int(net(torch.tensor([tokens]))[0][0, -1].argmax()))
    assert list(generate(net, [3, 1, 4], 40, temperature=0)) == tokens[3:]


def test_a_prompt_longer_than_the_context() -> None:
    assert len(list(generate(build("gpt2", 8), list(range(20)), 5))) == 5


@pytest.mark.parametrize("model", ["lstm", "modern"])
def test_work_is_linear_in_length(model: str) -> None:
    """Tokens that pass through the embedding."""
    net, read = build(model, 32), []
    net.embed.register_forward_hook(lambda module, args, out: read.append(args[0].numel()))
    list(generate(net, [1], 300))
    assert sum(read) <= 2 * 300


def test_top_k_and_top_p_draw_from_the_likeliest_only() -> None:
    logits = torch.log(torch.tensor([0.05, 0.4, 0.3, 0.15, 0.1]))
    draw = torch.Generator().manual_seed(0)

    def drawn(**options: float) -> set[int]:
        return {
            pick(logits, options.get("temperature", 1.0), int(options.get("top_k", 0)), options.get("top_p", 1.0), draw)
            for _ in range(400)
        }

    assert drawn() == {0, 1, 2, 3, 4}
    assert drawn(top_k=2) == {1, 2}
    assert drawn(top_p=0.5) == {1, 2}
    assert drawn(top_p=0.39) == {1}
    assert drawn(top_p=0.71) == {1, 2, 3}
    assert drawn(temperature=0) == {1}
    counts = torch.bincount(torch.tensor([pick(logits, 1.0, 0, 1.0, draw) for _ in range(4000)]), minlength=5) / 4000
    assert (counts - logits.exp()).abs().max() < 0.04


@pytest.fixture(scope="module", params=["lstm", "modern"])
def run(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("scored") / request.param
    config = composed(
        *MODELS[request.param], "data=text", f"data.path={text}", "data.tokenizer=char", "global_batch=4", "sequence=16",
        "max_steps=30", "device=cpu", "logger=csv", "precision=fp64", "val_lanes=3", "optim.lr=0.01",
    )  # fmt: skip
    fit(check(config), path)
    return Run(path)


def test_a_sentence_by_the_chain_rule(run: Run) -> None:
    sentence = "the cat in it."[:14].replace(".", "").replace("c", "h")
    found = evaluate(Evaluate(run=str(run.path), text=sentence, strategy=check(run.config()).plan))
    settings = check(run.config())
    tokenizer, parallel, _ = restore(settings.config, settings.plan, run)
    net = parallel.net
    numbers = [tokenizer.start, *tokenizer.encode(sentence.encode()).tolist()]
    total = 0.0
    with torch.no_grad():
        for i in range(1, len(numbers)):
            total += float(net.eval()(torch.tensor([numbers[:i]]))[0][0, -1].log_softmax(-1)[numbers[i]])
    assert found["log_probability"] == pytest.approx(total, abs=1e-9)
    assert found["tokens"] == len(sentence)


def test_a_run_is_scored_with_its_own_tokenizer_from_anywhere(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Training text with a new character would give all others another number; and a sentence needs no text at all."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(text.read_text())
    config = composed(*MODELS["modern"], "data=text", "data.path=text.txt", "data.tokenizer=char", "global_batch=4",
                      "sequence=16", "max_steps=3", "device=cpu", "logger=csv", "precision=fp64")  # fmt: skip
    loss = fit(check(config), tmp_path / "run")["loss"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    asked = Evaluate(run=str(tmp_path / "run"))
    assert evaluate(asked)["loss"] == pytest.approx(loss, abs=1e-12)
    assert "not the one" not in capsys.readouterr().out
    written = text.read_text()
    (tmp_path / "text.txt").write_text("!" + written[1:])  # as many bytes, so that validation begins at the same
    assert evaluate(asked)["loss"] == pytest.approx(loss, abs=1e-12)
    assert "the text is not the one that the run was trained on" in capsys.readouterr().out
    (tmp_path / "text.txt").write_text(written[:-3] + "!!\n")
    with pytest.raises(UserError, match="'!' is not among the 20"):
        evaluate(asked)
    (tmp_path / "text.txt").write_text(written)
    described = tmp_path / "run" / "config.yaml"
    described.write_text(described.read_text().replace("tokenizer: char", "tokenizer: gone.json"))
    assert evaluate(asked)["loss"] == pytest.approx(loss, abs=1e-12)
    assert "data.tokenizer=gone.json is gone" in capsys.readouterr().out
    (tmp_path / "text.txt").unlink()
    assert evaluate(replace(asked, text="the cat"))["tokens"] == 7


def test_a_sample_comes_last_and_may_fail(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    there: list[str] = []

    def fails(*arguments: object, **settings: object) -> Iterator[int]:
        there.extend(path.name for path in tmp_path.iterdir())
        yield 1
        raise RuntimeError("no memory\nfor this")

    monkeypatch.setattr("leanlm.training.fit.generate", fails)
    config = composed(*MODELS["lstm"], "data=text", f"data.path={text}", "data.tokenizer=char", "global_batch=4", "sequence=16",
                      "max_steps=2", "device=cpu", "logger=csv")  # fmt: skip
    result = fit(check(config), tmp_path)
    assert {"metrics.csv", "loss.png", "result.json"} <= {*there}
    assert Run(tmp_path).results()["loss"] == result["loss"]
    said = capsys.readouterr().out
    assert "the sample failed: RuntimeError: no memory\n" in said
    assert "for this" not in said


@pytest.mark.parametrize("model", ["lstm", "gpt2"])
def test_weights_are_where_the_cut_says(model: str, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, restored or in the end sampled from: from the beginning, and after Lightning has let go of its module."""
    monkeypatch.setattr(builders, "device", lambda config: torch.device("meta"))  # as a GPU, another than the CPU
    settings = check(composed(*MODELS[model], "data=text", f"data.path={text}", "data.tokenizer=char", "model.tied=true"))
    parallel = builders.parallel_model(settings.config, settings.plan, 29)
    module = builders.module(settings, parallel)
    tensors = {*parallel.net.parameters(), *parallel.net.buffers(), module.split_loss.nats}
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert parallel.net.head.projection.weight is parallel.net.embed.get_parameter(
        next(n for n, _ in parallel.net.embed.named_parameters())
    )
    module.cpu()  # which Lightning calls in the end
    assert {tensor.device.type for tensor in module.parameters()} == {"meta"}


@pytest.mark.parametrize("lanes", [1, 5])
def test_the_whole_split_against_a_plain_loop(run: Run, lanes: int) -> None:
    """A recurrent model reads the split as one stream, or in lanes that first read a sequence; a Transformer in windows."""
    settings = check(run.config())
    tokenizer, parallel, _ = restore(settings.config, settings.plan, run)
    net = parallel.net
    found = evaluate(Evaluate(run=str(run.path), lanes=lanes, strategy=settings.plan, rows=3))
    from leanlm.training.data import tokens

    numbers = torch.from_numpy(tokens(settings).splits["validation"].astype("int64"))
    read = torch.cat((torch.tensor([tokenizer.start]), numbers[:-1]))
    nats = 0.0
    with torch.no_grad():
        if net.carries_state:
            stride = -(-(len(numbers) + (lanes - 1) * 16) // lanes) - (16 if lanes > 1 else 0)
            for lane in range(lanes):
                begin, end = lane * stride, min(len(numbers), (lane + 1) * stride + (16 if lanes > 1 else 0))
                logits = net.eval()(read[None, begin:end])[0][0]
                each = torch.nn.functional.cross_entropy(logits, numbers[begin:end], reduction="none")
                nats += float(each[16 if lane else 0 :].sum())
        else:
            for begin in range(0, len(numbers), 16):
                logits = net.eval()(read[None, begin : begin + 16])[0][0]
                nats += float(torch.nn.functional.cross_entropy(logits, numbers[begin : begin + 16], reduction="sum"))
    assert found["tokens"] == len(numbers)
    assert found["loss"] == pytest.approx(nats / len(numbers), abs=1e-9)
    assert found["perplexity"] == pytest.approx(torch.tensor(nats / len(numbers)).exp().item(), rel=1e-6)


@pytest.mark.parametrize("model", ["gpt2", "modern"])
def test_a_full_context_keeps_its_newer_half(model: str) -> None:
    net, context, expected = build(model, 16), [3, 1, 4], []
    for _ in range(50):
        if len(context) > 16:
            context = context[-8:]
        context.append(int(net(torch.tensor([context]))[0][0, -1].argmax()))
        expected.append(context[-1])
    assert list(generate(net, [3, 1, 4], 50, temperature=0)) == expected
