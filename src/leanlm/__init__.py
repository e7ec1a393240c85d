"""leanlm: train language models on the devices you have. Same loss curve, any memory budget."""

import os
import time
from importlib.util import find_spec

__version__ = "0.1.0"
BEGAN = time.monotonic()

# On a CPU torch then asks Linux for pages of 2 MiB for large tensors, which come faster. torch reads this once.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# On a GPU, what was freed then makes room for tensors of any size. torch reads this once, too.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# A notebook hands its backend down, also to an environment that lacks it; matplotlib would then refuse to be imported.
_, _, _module = os.environ.get("MPLBACKEND", "").partition("module://")
if _module and find_spec(_module.partition(".")[0]) is None:
    del os.environ["MPLBACKEND"]
