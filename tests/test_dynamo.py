"""torch's compiler is not imported before it is needed, and whole when it is."""

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
assert "torch._dynamo.eval_frame" not in sys.modules
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
assert torch._dynamo.config.suppress_errors is False
assert type(sys.modules["torch._dynamo"]).__name__ == "module"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
