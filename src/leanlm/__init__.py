"""leanlm: train language models on the devices you have. Same loss curve, any memory budget."""

__version__ = "0.1.0"
