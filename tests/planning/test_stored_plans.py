"""What the planner says of plans of every kind, against what it said before: `stored_plans.json`.

PYTHONPATH=tests python tests/planning/test_stored_plans.py --write stores anew what a change to the planner was meant to change
"""

import json
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import composed, make_text

from leanlm.common.files import defaults
from leanlm.config.checks import check
from leanlm.config.schema import Settings
from leanlm.planning import inference
from leanlm.planning.hardware import devices
from leanlm.planning.predict import predict

STORED = Path(__file__).with_name("stored_plans.json")
TORCH = "2.13"  # whose operations were counted; another release may take others
MIB, GIB = 1 << 20, 1 << 30
CORES = 2  # of MACHINE; where more processes run, several share one
MACHINE: dict[str, Any] = {  # in place of what would be measured where the test runs
    "name": "two cores",
    "accelerator": "cpu",
    "memory": 8 * GIB,
    "flops": {"float32": 1e11, "bfloat16": 6e10, "float64": 5e10},
    "bandwidth": 1e10,
    "link": 1e9,
    "links": {"send": 1e9, "all-reduce": 8e8, "all-gather": 9e8, "reduce-scatter": 7e8},
    "latency": 2e-4,
    "overhead": 5e-6,
    "process": (300 * MIB, 320 * MIB, 250 * MIB),
    "common": 120 * MIB,
    "paging": 4e9,
    "small_paging": 1.5e9,
    "shared": True,
    "pair": {
        "flops": {"float32": 6e10, "bfloat16": 4e10, "float64": 3e10},
        "bandwidth": 6e9,
        "paging": 2.5e9,
        "small_paging": 1e9,
        "overhead": 7e-6,
    },
}
SMALL = "model=small model.depth=2 sequence=64 global_batch=8"
DEEP = "model=small model.depth=8 model.width=64 sequence=32 global_batch=16"
GPT2 = "model=gpt2 model.depth=2 sequence=64 global_batch=8"
LLAMA = "model=llama model.depth=2 sequence=64 global_batch=8"
LSTM = "model=lstm model.depth=2 sequence=48 global_batch=8"
TYPES = 256  # of tokens
TRAINING = [  # device, overrides
    ("cpu", f"{SMALL} optim=muon"),
    ("cpu", f"{GPT2} optim=adamw strategy=accumulate strategy.recompute=blocks optim.state=int8"),
    ("cpu", f"{LLAMA} optim=adafactor strategy=ddp devices=2"),
    ("cpu", f"{GPT2} optim=adamw strategy=ddp devices=2 strategy.zero1=true precision=bf16-mixed"),
    ("cpu", f"{DEEP} optim=adamw strategy=fsdp devices=2 strategy.recompute=operators"),
    ("cpu", f"{SMALL} optim=muon strategy=hsdp devices=4"),
    ("cpu", f"{LLAMA} optim=adamw strategy=tensor devices=2"),
    ("cpu", f"{DEEP} optim=adamw strategy=pipeline devices=2"),
    ("cpu", f"{DEEP} optim=muon strategy=interleaved devices=2"),
    ("cpu", f"{DEEP} optim=sgd strategy=zero_bubble devices=2"),
    ("cpu", f"{SMALL} optim=adamw strategy=fsdp_tensor devices=4"),
    ("cpu", f"{LSTM} optim=adamw strategy.recompute_window=8 strategy.rnn_kernel=native"),
    ("cpu", f"{LSTM} optim=adamw strategy=ddp devices=2 model.dropout=0.2"),
    ("cpu", f"{GPT2} optim=adamw strategy.offload=all"),
    ("cpu", f"{GPT2} optim=adafactor strategy.step_in_backward=true clip=0"),
    ("h100", f"{GPT2} optim=adamw precision=bf16-mixed strategy.compile=true"),
    ("h100", f"{LLAMA} optim=muon precision=bf16-mixed strategy=fsdp devices=4 strategy.reshard_after_forward=false"),
    ("h100", f"{DEEP} optim=adamw strategy=pipeline_tensor devices=4 strategy.recompute=blocks"),
    ("rtx4090", f"{LSTM} optim=adamw optim.state=int8 strategy.offload=optimizer"),
    ("rtx4090", f"{GPT2} optim=adafactor precision=bf16 strategy.recompute=0.5 strategy=accumulate"),
]
READING = [  # device, what is read, overrides, memory that is allowed
    ("cpu", "evaluate", f"{GPT2}", 452 * MIB),
    ("rtx4090", "evaluate", f"{LSTM} strategy=accumulate", 8 << 30),
    ("cpu", "generate", f"{LLAMA}", 8 << 30),
    ("h100", "generate", f"{SMALL}", 8 << 30),
]


def sheet(name: str) -> dict[str, Any]:
    """A device as its config group has it."""
    node: Any = MACHINE if name == "cpu" else defaults(f"device/{name}.yaml")
    return node


def settings(text: Path, overrides: str) -> Settings:
    common = ["data=text", f"data.path={text}", "data.tokenizer=byte", "device=cpu"]
    given = overrides.split()
    return check(composed(*common, *["precision=fp32"] * ("precision=" not in overrides), *given))


def training(text: Path, device: str, overrides: str) -> dict[str, Any]:
    """Bytes of each kind of rank, by part, and seconds of a step."""
    found = predict(settings(text, overrides), TYPES, devices.of_config(sheet(device)))
    return {"seconds": found.seconds, "ranks": {str(need.rank): {"peak": need.peak, **need.parts} for need in found.needs}}


def read(text: Path, device: str, what: str, overrides: str, memory: int) -> dict[str, Any]:
    """Bytes of each try within so much memory, and the rows of a batch that remain of an evaluation."""
    asked, needs, total = settings(text, overrides), [], inference._total
    asked = replace(asked, config=replace(asked.config, device={**sheet(device), "memory": memory}))

    def noted(*given: Any) -> int:
        needs.append(total(*given))
        return needs[-1]

    with mock.patch.object(inference, "_total", noted):
        if what == "evaluate":
            return {"rows": inference.rows_that_fit(asked, TYPES).config.global_batch, "bytes": needs}
        inference.check_generation(asked.config, asked.plan, TYPES, prompt=20, tokens=30)
        return {"bytes": needs}


PLANS = {" ".join(map(str, plan)): partial(training, device=plan[0], overrides=plan[1]) for plan in TRAINING} | {
    " ".join(map(str, plan)): partial(read, **dict(zip(("device", "what", "overrides", "memory"), plan, strict=True)))
    for plan in READING
}


def predicted(name: str, text: Path) -> dict[str, Any]:
    with mock.patch.object(devices, "cores", return_value=CORES):
        return PLANS[name](text)


@pytest.mark.skipif(not torch.__version__.startswith(TORCH), reason=f"predictions were stored with torch {TORCH}")
@pytest.mark.parametrize("name", PLANS)
def test_a_prediction_is_as_stored(name: str, text: Path) -> None:
    found, stored = predicted(name, text), json.loads(STORED.read_text())[name]
    assert found.pop("seconds", 0.0) == pytest.approx(stored.pop("seconds", 0.0), rel=1e-9, abs=0)
    assert found == stored


def test_what_is_stored_are_these_plans() -> None:
    assert len(PLANS) == 24
    assert [*json.loads(STORED.read_text())] == [*PLANS]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = make_text(Path(folder, "text.txt"))
        lines = [f"{json.dumps(name)}: {json.dumps(predicted(name, text))}" for name in PLANS]
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    main()
