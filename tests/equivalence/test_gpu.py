"""On a GPU: the curve and the weights of a plain loop on a CPU, under every technique of one device. Run where there is one."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from reference import MODELS, STEPS, overrides, plain_loop, settings
from runner import final_weights, losses, run_all
from test_memory import TECHNIQUES, fits

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
