"""What is replaced in Lightning and torch is still what they call, and is still worth replacing.

Where one of these fails, read that function of the installed version anew: the patch may be changed, or left out.
"""

import inspect
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.pipelining import PipelineStage, schedules

from leanlm.strategies.lightning import PlacedStrategy, strategy
from leanlm.strategies.patches import BucketedDDP, without_asking_for_sigterm, without_warm_up
from leanlm.strategies.plan import Plan


def calls(function: object) -> set[str]:
    """Names that a function uses."""
    return set(inspect.unwrap(function).__code__.co_names)  # type: ignore[arg-type]


def test_lightning_asks_for_a_sigterm_before_each_batch() -> None:
    """By the name that is replaced, with a broadcast and a wait for its result."""
    assert "_broadcast_sigterm_tensor" in calls(_TrainingEpochLoop.advance)
    assert {"broadcast", "item"} <= calls(_TrainingEpochLoop._broadcast_sigterm_tensor)
    trainer = SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=object.__new__(_TrainingEpochLoop)))
    without_asking_for_sigterm(trainer)
    assert trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor() is None


def test_lightning_blocks_the_sum_and_gives_ddp_a_number_by_these_names() -> None:
    assert "block_backward_sync" in calls(_block_parallel_sync_behavior)
    assert "no_sync" in calls(DDPStrategy.block_backward_sync)
    assert "determine_ddp_device_ids" in calls(DDPStrategy._setup_model)
    assert "model_to_device" in calls(DDPStrategy.setup), "which a model that has been placed must not meet"


def test_only_a_step_without_gradients_is_summed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = []

    class Model(torch.nn.Linear):
        def no_sync(self):
            blocked.append(True)
            return torch.no_grad()

    monkeypatch.setattr("lightning.pytorch.utilities.types.DistributedDataParallel", Model)
    ddp = BucketedDDP()
    ddp.model = Model(2, 2)
    with ddp.block_backward_sync():
        assert not blocked
    for parameter in ddp.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with ddp.block_backward_sync():
        assert blocked
    assert ddp.determine_ddp_device_ids() is None


def test_torch_warms_a_stage_up_by_this_name_before_2_13() -> None:
    stage = object.__new__(PipelineStage)
    if torch.__version__ < "2.13":
        assert "_get_init_p2p_neighbors_ops" in calls(schedules.PipelineScheduleMulti._initialize_stages)
        assert without_warm_up(stage)._get_init_p2p_neighbors_ops() == []
    else:  # a vote, which the stages of a V can take, is asked of them
        assert "_warmup_forward_vote" in calls(schedules._PipelineSchedule._warmup_p2p)
        assert "_get_init_p2p_neighbors_ops" not in vars(without_warm_up(stage))


@pytest.mark.parametrize(
    ("plan", "kind"), [(Plan(replicate=2), BucketedDDP), (Plan(shard=2), PlacedStrategy), (Plan(pipeline=2), PlacedStrategy)]
)
def test_what_lightning_is_told(plan: Plan, kind: type) -> None:
    assert type(strategy(plan)) is kind
    assert strategy(Plan(accumulate_grad_batches=2)) == "auto"
