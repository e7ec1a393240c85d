"""On a GPU: the curve and the weights of a plain loop on a CPU, under every technique of one device. Run where there is one."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import composed
from reference import MODELS, STEPS, overrides, plain_loop, settings
from runner import final_weights, losses, run_all
from test_memory import TECHNIQUES, fits

from leanlm.common.run_folder import Run
from leanlm.config.checks import check
from leanlm.inference.evaluation import Evaluate, evaluate
from leanlm.launch.processes import launch
from leanlm.launch.ranks import process_group
from leanlm.strategies.plan import Plan
from leanlm.training.fit import fit
from leanlm.training.lightning_module import LanguageModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
PAIRED = [names for names in combinations(TECHNIQUES, 2) if not {"step in backward", "ZeRO-1", "native"} & set(names)]
CASES = [(model, ()) for model in MODELS] + [
    (model, names)
    for model in ("gpt2", "lstm", "muon")
    for names in [(name,) for name in TECHNIQUES] + PAIRED[:: 1 if model == "gpt2" else 3]
    if fits("lstm" if model == "lstm" else "gpt2", "single", names) and "step in backward" not in names
]


@pytest.mark.parametrize("model", MODELS)
def test_same_curve_and_weights_as_on_a_cpu(model: str, text: Path, tmp_path: Path) -> None:
    curve, weights, _ = plain_loop(settings(model, text))
    cases = [names for its, names in CASES if its == model]
    plans = {tmp_path / f"{i}": {k: v for name in names for k, v in TECHNIQUES[name].items()} for i, names in enumerate(cases)}
    plans |= {tmp_path / "accumulated": {"accumulate_grad_batches": 4}}
    run_all({path: [*overrides(model, text, plan), "device=cuda"] for path, plan in plans.items()})
    most = {"muon": 1e-3, "lstm_muon": 1e-3, "adafactor": 1e-7}.get(model, 1e-9)  # Muon's products are bf16's
    for path, plan in plans.items():
        assert len(losses(path)) == STEPS, plan
        assert losses(path) == pytest.approx(curve, rel=0, abs=most), plan
        found = final_weights(path, settings(model, text))
        furthest = max(float((found[name] - weights[name]).abs().max()) for name in weights)
        assert furthest <= (0.1 if "muon" in model else most), plan


def run(arguments: list[str], path: Path) -> None:
    config = composed(*arguments)
    fit(check(config), path)


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
@pytest.mark.parametrize(
    ("model", "plan"),
    [
        ("gpt2", {}),
        ("lstm", {}),
        ("muon", {"accumulate_grad_batches": 2}),
        ("gpt2", {"compile": "true", "accumulate_grad_batches": 2}),
    ],
)
def test_a_step_waits_for_nothing(
    model: str, plan: dict, precision: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does what the thread of batches does meanwhile."""
    seen, step = set(), LanguageModel.training_step

    def training_step(self, batch, index):
        watched = 2 <= batch.step < STEPS - 1
        seen.update({batch.step} if watched else ())
        torch.cuda.set_sync_debug_mode("error" if watched else "default")
        return step(self, batch, index)

    monkeypatch.setattr(LanguageModel, "training_step", training_step)
    more = ["device=cuda", "log_every=100", f"precision={precision}"]
    try:
        run([*overrides(model, text, plan), *more], tmp_path)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen == {*range(2, STEPS - 1)}


@pytest.mark.parametrize("model", ["gpt2", "lstm"])
def test_samples_and_evaluation_are_made_on_the_gpu(
    model: str, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    run([*overrides(model, text), "device=cuda"], tmp_path)
    assert "no sample" not in capfd.readouterr().out
    assert (tmp_path / "samples.txt").is_file()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = evaluate(Evaluate(run=str(tmp_path), lanes=4, strategy=settings(model, text).plan))
    assert torch.cuda.max_memory_allocated() > before
    assert found["loss"] == pytest.approx(Run(tmp_path).results()["loss"], abs=1e-9)


def of_one(arguments: list[str], path: Path) -> None:
    """A rank of a group that NCCL makes of one, under what several would do: DDP, a mesh, sums over all."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "world", property(lambda self: 2))
        patch.setattr("leanlm.launch.ranks._patient", dist.new_group(backend="gloo"))
        run(arguments, path)
    dist.destroy_process_group()


def sharing(arguments: list[str], path: Path) -> None:
    """One of several ranks on the first GPU, whose tensors gloo sends."""
    from lightning.pytorch.accelerators import CUDAAccelerator

    torch.zeros((), device="cuda:0")  # a mesh would else choose a GPU for each
    with process_group("cpu"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(CUDAAccelerator, "parse_devices", staticmethod(lambda devices: [0] * devices))
        patch.setattr("leanlm.training.build.device", lambda config: torch.device("cuda", 0))
        patch.setattr("leanlm.config.checks.on_gpus", lambda *_: [])
        run(arguments, path)


@pytest.mark.parametrize("model", ["gpt2", "lstm"])
@pytest.mark.parametrize(
    ("worker", "processes", "plan"),
    [(of_one, 1, {"accumulate_grad_batches": 2}), (sharing, 2, {"replicate": 2, "accumulate_grad_batches": 2})],
)
def test_several_ranks(worker, processes: int, plan: dict, model: str, text: Path, tmp_path: Path) -> None:
    curve, _, _ = plain_loop(settings(model, text))
    launch(worker, ([*overrides(model, text, plan), "device=cuda"], tmp_path), processes, isolate=True)
    assert losses(tmp_path) == pytest.approx(curve, rel=0, abs=1e-9)
    assert (tmp_path / "samples.txt").is_file()
