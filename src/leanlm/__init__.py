"""leanlm: train language models on the devices you have. Same loss curve, any memory budget."""

from leanlm.dynamo import put_off_import

__version__ = "0.1.0"

put_off_import()
