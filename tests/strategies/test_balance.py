"""Stages by cost, against brute force; the bubble, against its closed forms."""

from itertools import combinations

import pytest
import torch
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from leanlm.models.contract import without_storage
from leanlm.models.rnn import RNN
from leanlm.models.transformer import Transformer
from leanlm.strategies.balance import bubble, costs, order_of, split
from leanlm.strategies.plan import Plan
from leanlm.strategies.schedules import SCHEDULES


def test_costs_are_the_products_of_the_model() -> None:
    with without_storage():
        net = Transformer(1000, 32, width=64, depth=2, heads=4)
    found = costs(net)
    tokens, width = 32, 64
    assert found["head"] == 2 * tokens * width * 1000
    assert found["0"] == 2 * tokens * (4 * width**2 + 8 * width**2) + 2 * 2 * tokens * tokens * width
    assert found["embed"] == 0
    with without_storage():
        net = RNN(1000, 32, width=64, depth=2)
    assert costs(net)["0"] == 2 * tokens * (8 * width**2)


def test_blocks_of_the_same_shapes_may_cost_more_or_less() -> None:
    with without_storage():
        net = Transformer(1000, 32, width=64, depth=3, heads=4)
    plain = costs(net)
    once, block = net.blocks["1"].forward, net.blocks["1"]
    block.times = 2
    block.forward = lambda hidden, state: once(once(hidden, state)[0], state)
    assert costs(net) == plain | {"1": 2 * plain["1"]}


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("head", [0.0, 3.0, 40.0])
def test_the_costliest_stage_costs_least(stages: int, head: float) -> None:
    torch.manual_seed(stages)
    cost = {"embed": 1.5} | {str(i): float(c) for i, c in enumerate(torch.rand(9) * 5)} | {"head": head}
    names = [str(i) for i in range(9)]

    def worst(parts: list[list[str]]) -> float:
        sums = [sum(cost[name] for name in part) for part in parts]
        sums[0] += cost["embed"]
        sums[-1] += cost["head"]
        return max(sums)

    best = min(
        worst([names[a:b] for a, b in zip([0, *model_problems], [*model_problems, 9], strict=True)])
        for model_problems in combinations(range(1, 9), stages - 1)
    )
    found = split(cost, Plan(pipeline=stages, accumulate_grad_batches=8))
    assert [name for part in found for name in part] == names
    assert all(found)
    assert worst(found) == pytest.approx(best)


@pytest.mark.parametrize("schedule", ["interleaved", "zero-bubble"])
@pytest.mark.parametrize("head", [0.0, 1.0, 6.0])
def test_where_devices_have_several_stages_the_costliest_device_costs_least(schedule: str, head: float) -> None:
    """Against all ways to cut 6 equal blocks into 4 stages."""
    cost = {"embed": 0.0} | {str(i): 2.0 for i in range(6)} | {"head": head}
    held = [[0, 3], [1, 2]] if schedule == "zero-bubble" else [[0, 2], [1, 3]]

    def worst(parts: list[int]) -> float:
        each = [2.0 * part for part in parts]
        each[-1] += head
        return max(sum(each[stage] for stage in stages) for stages in held)

    best = min(
        worst([b - a for a, b in zip([0, *model_problems], [*model_problems, 6], strict=True)])
        for model_problems in combinations(range(1, 6), 3)
    )
    found = split(cost, Plan(pipeline=2, schedule=schedule, accumulate_grad_batches=4))
    assert worst([len(part) for part in found]) == best


def test_a_large_vocabulary_moves_blocks_away_from_the_head() -> None:
    with without_storage():
        small, large = (Transformer(vocabulary, 64, width=64, depth=12, heads=4) for vocabulary in (256, 50257))
    sizes = [[len(part) for part in split(costs(net), Plan(pipeline=3, accumulate_grad_batches=4))] for net in (small, large)]
    assert sizes == [[4, 4, 4], [5, 6, 1]]
    assert split(costs(small), Plan(pipeline=2, stage_blocks=[10, 2])) == [[str(i) for i in range(10)], ["10", "11"]]


@pytest.fixture(scope="module")
def _one_process_as_many():
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def played(name: str, devices: int, micros: int, stages: int, cost: list[float] | None = None) -> float:
    from torch.distributed import new_group

    group = new_group(list(range(devices)))
    kind, per = get_schedule_class(SCHEDULES[name].torch), stages // devices
    mine = [0] if per == 1 else [0, 2 * devices - 1] if SCHEDULES[name].v_shape else [i * devices for i in range(per)]
    parts = [PipelineStage(torch.nn.Identity(), n, stages, torch.device("cpu"), group=group) for n in mine]
    schedule = kind(
        parts[0] if per == 1 and name in ("gpipe", "1f1b") else parts, micros, loss_fn=lambda x, y: x, scale_grads=False
    )
    return bubble(order_of(schedule), cost or [1.0] * stages)


@pytest.mark.usefixtures("_one_process_as_many")
@pytest.mark.parametrize(("devices", "micros"), [(2, 2), (2, 8), (4, 4), (4, 16)])
def test_bubble_is_the_closed_form(devices: int, micros: int) -> None:
    """(p - 1) / (m + p - 1), and with v stages on a device (p - 1) / (v m + p - 1): Narayanan et al. 2021, section 2.2."""
    for name in ("gpipe", "1f1b"):
        assert played(name, devices, micros, devices) == pytest.approx((devices - 1) / (micros + devices - 1))
    assert played("interleaved", devices, micros, 2 * devices) == pytest.approx((devices - 1) / (2 * micros + devices - 1))
    if micros >= 2 * devices:
        assert played("zero-bubble", devices, micros, 2 * devices) < 0.2 * (devices - 1) / (micros + devices - 1) + 0.03
    assert played("1f1b", devices, micros, devices, [1.0] * (devices - 1) + [2.0]) > (devices - 1) / (micros + devices - 1)
