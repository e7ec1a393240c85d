"""The planner knows what an adapter spares: gradients and state of the weights that stay as they are."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import composed

from leanlm.config.checks import check
from leanlm.config.resume import effective
from leanlm.data.tokenizer import Subwords
from leanlm.planning.candidates import Estimate
from leanlm.planning.choice import Choice
from leanlm.planning.hardware.devices import Device
from leanlm.planning.predict import predict

HERE = Device("a test", "cpu", 1 << 30, {"float32": 1e11}, 1e10, 1e9, 1e-4, 1e-6)
LLAMA = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4,
    "vocab_size": 300, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
RANK = 4
PLANS = {"single": 1, "fsdp": 2, "pipeline": 2, "tensor": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """Of a model whose weights nobody has loaded down yet."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "tokenizer.json").write_text(Subwords.train([text.read_bytes()], 300).state()["model"])
    return folder


@pytest.mark.parametrize("plan", PLANS)
def test_bytes_of_weights_gradients_and_state(plan: str, folder: Path, text: Path) -> None:
    asked = [f"init_from={folder}", "data=text", f"data.path={text}", "optim=adamw", "global_batch=8", "sequence=16",
             f"strategy={plan}", "adapter=lora", f"adapter.rank={RANK}", "device=cpu"]  # fmt: skip
    settings = check(effective(composed(*asked), asked), needs_weights=False)
    width, inner, depth = 256, 512, 8
    trained = depth * RANK * (4 * 2 * width + 3 * (width + inner))
    whole = trained + depth * (4 * width**2 + 3 * width * inner + 2 * width) + 2 * 300 * width + width
    found = predict(settings, 300, HERE)
    weights, state = (sum(need.parts[part] for need in found.needs) for part in ("weights", "state"))
    held = {"single": (whole, trained), "fsdp": (whole / 2, trained / 2), "pipeline": (whole, trained)}.get(plan)
    if held is None:  # a tensor axis splits one of both matrices of a correction, and no norms
        norms, split = depth * 2 * width + width, depth * RANK * (4 * width + 3 * inner)
        held = (whole - trained - norms) / 2 + norms + trained - split / 2, trained - split / 2
    assert weights == pytest.approx(4 * held[0], rel=0.01)
    assert state == pytest.approx(8 * held[1], rel=0.01)
    assert max(need.parts["gradients"] for need in found.needs) <= 4 * held[1] * 1.01


def test_the_rough_order_knows_it_too(folder: Path, text: Path) -> None:
    asked = [
        f"init_from={folder}",
        "data=text",
        f"data.path={text}",
        "optim=adamw",
        "global_batch=8",
        "sequence=16",
        "device=cpu",
    ]
    rough = []
    for adapter in ([], ["adapter=lora"]):
        settings = check(effective(composed(*asked, *adapter), asked), needs_weights=False)
        rough.append(Estimate(settings, 300, replace(HERE, bandwidth=1e15))(Choice.of(settings)))
    assert rough[1].seconds == pytest.approx(rough[0].seconds * 2 / 3, rel=0.2)
    assert rough[1].bytes < 0.5 * rough[0].bytes
