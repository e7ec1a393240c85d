"""leanlm: train language models on the devices you have. Same loss curve, any memory budget."""

from leanlm.lazy import put_off_imports

__version__ = "0.1.0"

put_off_imports()
