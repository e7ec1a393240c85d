"""torch's compiler is not imported before it is needed, and whole when it is."""

import os
import subprocess
import sys


def test_is_imported_when_needed() -> None:
    code = """
import sys
import leanlm.fit, leanlm.train
assert "sympy" not in sys.modules, "a run on one device needs neither the compiler nor DTensor"
import torch
from torch._dynamo import OptimizedModule as early
optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
optimizer.step()
from leanlm.memory.recompute import again
from leanlm.models.contract import without_storage
with without_storage():
    assert torch.nn.Embedding(3, 2).weight.is_meta
    assert torch.nn.LSTM(2, 2).weight_hh_l0.is_meta
block = torch.nn.Linear(2, 2)
again(block, torch.ones(1, 2)).sum().backward()
assert block.weight.grad.equal(torch.ones(2, 2))
assert "torch._dynamo.eval_frame" not in sys.modules
assert "sympy" not in sys.modules
import torch._dynamo.utils
assert torch._dynamo.utils is sys.modules["torch._dynamo.utils"]
from torch._dynamo import OptimizedModule
from torch._dynamo.eval_frame import OptimizedModule as real
assert OptimizedModule is real and real is not early
assert type(torch.compile(torch.nn.Linear(2, 2))) is real
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_an_attribute_brings_the_compiler() -> None:
    code = """
import leanlm, torch, sys
early = torch._dynamo.config
early.suppress_errors = True
assert torch._dynamo.config.suppress_errors is early.suppress_errors is True
assert torch._dynamo.config.error_on_nested_fx_trace is early.error_on_nested_fx_trace
assert type(sys.modules["torch._dynamo"]).__name__ == "module"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_a_function_that_was_marked_early_is_not_compiled_later() -> None:
    code = """
import leanlm, torch
number = 0

@torch.compiler.disable
def marked(x):
    return inner(x)

def inner(x):
    return x * number

def block(x):
    return (marked(x + 1) + 1).relu()

assert "torch._dynamo.eval_frame" not in sys.modules
assert marked(torch.ones(1)).item() == 0
compiled = torch.compile(block, backend="eager")
for number in range(12):
    assert compiled(torch.ones(1)).item() == 2 * number + 1
counted = torch._dynamo.utils.counters
assert counted["stats"]["unique_graphs"] == 2, counted["stats"]  # before the call and after it
assert not counted["recompiles"], counted
"""
    done = subprocess.run([sys.executable, "-c", "import sys" + code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_torchmetrics_brings_what_it_draws_with_when_it_draws() -> None:
    code = """
import sys
import leanlm, torch, torchmetrics
assert not {"matplotlib", "matplotlib.axes", "matplotlib.pyplot", "transformers"} & set(sys.modules)
metric = torchmetrics.MeanMetric()
metric.update(torch.tensor(1.0))
metric.update(torch.tensor(3.0))
figure, axes = metric.plot()
import matplotlib.axes, matplotlib.figure, matplotlib.pyplot as plt
assert type(figure) is plt.Figure is matplotlib.figure.Figure and isinstance(axes, matplotlib.axes.Axes)
assert axes.lines[0].get_ydata().tolist() == [2.0]
from torchmetrics.utilities.plot import _AX_TYPE
assert isinstance(axes, _AX_TYPE) and not isinstance(figure, _AX_TYPE)
class Own(_AX_TYPE): pass
assert issubclass(Own, matplotlib.axes.Axes)
"""
    env = {**os.environ, "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 0, done.stderr
