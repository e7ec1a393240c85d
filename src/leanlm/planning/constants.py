"""Every constant of the planner that was measured or fitted, with its unit and what it was fitted to.

Where nothing else is said: on a CPU two cores (AMD EPYC with AVX-512) under Linux with glibc and gloo, torch 2.13,
scripts/plan_accuracy.py for bytes and scripts/plan_times.py for seconds; on a GPU one H200, torch 2.11, CUDA 13,
scripts/plan_gpu.py. These scripts print predicted and measured figures beside each other: run them where other machines or
releases of torch may need other constants.
"""

import torch

# Bytes that a CPU's process has of its libraries as it trains, beyond those before it has built anything. ----------------
ONE_PROCESS, SEVERAL, DTENSOR, FSDP, PIPELINE, STAGES, BF16 = (size << 20 for size in (86, 20, 13, 8, 13, 22, 20))
# Of the bytes of small tensors, the share that glibc's heap holds beyond them in holes. A recurrence fills holes with tensors
# of the same few sizes.
HEAP, HEAP_RECURRENT = 0.35, 0.12

# Time on a CPU
# Of the time to move the operands of a product, what laying them out anew takes; with few rows it takes most of the product's
# time (weights of 384 x 1,536 to 768 x 3,072: 0.5 to 0.7 with one row, 0 to 1.2 with 64).
LAYOUT = 0.5
# Times as long as by itself an operation takes to start where checkpointing, or selective checkpointing, keeps track of it
# (blocks of width 16, GPT-2's, the default Transformer's: 4.7 and 3.7; 13.5 and 12).
CHECKPOINTED, SELECTIVE = 4, 13
# Times as long as an addition without work takes to start, an operation or view in a model takes.
STARTING = 2.4
# Seconds that processes, two of which share a core, reach a collective operation apart (1.5 to 4.7 ms).
SLICE = 2.5e-3
# Share of the computation beside which gradients and weights can be sent.
OVERLAP = 0.7

# oneDNN's LSTM: of its workspace, the shares whose pages are there after forward, and that backward writes (mincore). ------
TOUCHED = {torch.float32: (0.34, 0.63), torch.bfloat16: (0.26, 0.66)}

# A GPU
KERNEL = 4e-6  # seconds of the shortest kernel
REACHED = 0.75  # of a data sheet's rates (0.75 by products in float32, 0.79 in bf16, 0.87 by copies)
STARTING_ON_GPU = 3.2  # as STARTING, of an addition on a GPU
ASKING = 0.67  # of a GPU's context, what the process has that asks for its free memory (527 of 785 MiB)
CUDNN = 8 << 20  # bytes of a recurrence's workspace beside its numbers and weights
KEPT = {0: 1, 1: 1, 2: 5, 3: 6}  # cuDNN's mode of a recurrence -> numbers that it keeps for each token and unit
TOKEN_KERNELS = 5, 8  # kernels of a recurrence for each token, forward and backward (20 and 32 us)
# torch's own figures: bytes to whose multiples its caching allocator rounds, of the largest tensor of its pool of small ones,
# and by which its two pools grow (c10/cuda/CUDACachingAllocator.cpp).
ROUNDING, SMALL, PAGES = 512, 1 << 20, (2 << 20, 20 << 20)
# Numbers that one block of threads goes through, blocks of one kernel, and tensors of each list that one kernel takes, by how
# many lists there are (ATen/native/cuda/MultiTensorApply.cuh).
CHUNK, CHUNKS, TENSORS = 1 << 16, 320, {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}

# Torch's compiler (its code generation, read in torch 2.11).
MANY = 8  # results that a kernel reads, above which some are made first
DEAR = 1.25  # times the bytes of a result that several need: where making it again reads more, it is stored
SHARED = 4  # times the bytes of what two results read: where they are smaller, reading it once is worth a common kernel

# The rough order of plans, before any is simulated (candidates.py): no figure that is shown depends on it. -----------------
KEPT_WIDTHS = 16  # times the width, the numbers that a block keeps for a token; as of GPT-2's
OPERATORS_KEEP = 0.7  # of these, under strategy.recompute=operators
WINDOWS_KEEP = 1 / 8  # of these, under strategy.recompute_window
TENSOR_DIVIDES = 0.8  # power of the tensor axis by which activations get fewer
IN_FLIGHT = {"1f1b": 1.0, "interleaved": 1.3, "others": 1.5}  # schedule -> micro-batches that a stage keeps, over its pipeline
IDLE = {"interleaved": 0.5, "zero-bubble": 0.3}  # schedule -> of 1F1B's waiting time, what is left
RECOMPUTING = {"operators": 1.08, "blocks": 4 / 3}  # recomputation -> times as much arithmetic
OPERATIONS = {"none": 200, "operators": 1100, "blocks": 500, "others": 350}  # the same -> times STARTING, to start a block
OFFLOADING = 1.5  # times as long as a step takes with anything offloaded
ZERO1_SENDS = 1.5  # times what DDP sends
UPDATE = 40  # times the bytes of weights that an optimizer moves

# The search
LATER = {"interleaved": 1.06, "zero-bubble": 1.1}  # times by which these seem slower: to simulate one takes as long as several
WORKER = 256 << 20  # bytes that a process which simulates takes (150 to 280 MiB)
