"""The names of torch's pipeline schedules, and what each needs. Imports no torch.

Memory and bubble of each: Narayanan et al. 2021 (arXiv 2104.04473) for 1F1B and interleaving, Qi et al. 2023 (arXiv
2401.10241) for zero bubble, DeepSeek-AI 2024 (arXiv 2412.19437) for DualPipe.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """What a schedule needs."""

    torch: str  # name of the class in torch.distributed.pipelining
    stages_per_device: int = 1  # by default, and if `fixed`, always
    fixed: bool = True
    v_shape: bool = False  # stages go down the devices and up again, so the first and the last are on one device
    rounds: bool = False  # micro-batches must fill whole rounds over the devices
    fill_stages: bool = False  # at least as many micro-batches as stages, not only as devices
    splits_backward: bool = False  # the gradients of inputs and of weights are made at different times


SCHEDULES = {
    "gpipe": Schedule("GPipe"),
    "1f1b": Schedule("1F1B"),
    "interleaved": Schedule("Interleaved1F1B", 2, fixed=False, rounds=True),
    "zero-bubble": Schedule("ZBVZeroBubble", 2, v_shape=True, splits_backward=True),
    "LoopedBFS": Schedule("LoopedBFS", 2, fixed=False),
    "InterleavedZeroBubble": Schedule("InterleavedZeroBubble", 2, fixed=False, rounds=True, splits_backward=True),
    "DualPipeV": Schedule("DualPipeV", 2, v_shape=True, fill_stages=True, splits_backward=True),
}
