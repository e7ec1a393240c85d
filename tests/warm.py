"""What every process that tests start would do first. The server that forks them imports this, so that it is done once."""

import runner  # noqa: F401
import torch._dynamo  # the optimizers import it
import torch.distributed.checkpoint
import torch.distributed.elastic.multiprocessing.errors
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor.parallel  # noqa: F401
from conftest import composed

composed()  # Hydra looks for its plugins and makes its grammar
