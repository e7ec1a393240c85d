"""Devices that a plan is made for: sizes, limits, unequal ones."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import composed

from leanlm.common.errors import UserError
from leanlm.common.machine import memory_limit
from leanlm.config.checks import check
from leanlm.config.device_sheets import sheet, size
from leanlm.config.schema import Settings
from leanlm.planning.candidates import families
from leanlm.planning.constants import ASKING, REACHED, SLICE
from leanlm.planning.hardware import gpus
from leanlm.planning.hardware.devices import Device, count, of_config
from leanlm.planning.hardware.probe import without
from leanlm.planning.hardware.roofline import seconds
from leanlm.planning.predict import predict
from leanlm.planning.search import search
from leanlm.planning.simulation.step import stages
from leanlm.planning.simulation.trace import Work
from leanlm.strategies import balance
from leanlm.strategies.plan import Plan

CARD = {"accelerator": "cuda", "name": "a card", "memory": "8GB", "flops": {"float32": 1e13}, "bandwidth": 1e11,
        "link": 1e10, "latency": 1e-5, "overhead": 1e-5}  # fmt: skip


def _cost(kind: Work, device: Device) -> float:
    """Seconds of one operation."""
    return seconds({"step 1, optimizer": Counter({kind: 1})}, 1, Plan(), device)


def settings(text: Path, *overrides: str) -> Settings:
    model = ["model=gpt2", "model.width=64", "model.heads=2", "model.depth=12", "data.tokenizer=byte", "optim=adamw"]
    return check(composed("data=text", f"data.path={text}", *model, "global_batch=8", "sequence=32", "clip=1.0", *overrides))


def test_sizes_and_limits() -> None:
    assert (size("6GiB"), size("500 MB"), size(1024)) == (6 << 30, 500_000_000, 1024)
    with pytest.raises(UserError, match="6GiB"):
        size("much")
    assert 0 < memory_limit() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    card = of_config(CARD)
    assert card.share(4).memory == 8_000_000_000  # each has its own
    machine = replace(card, shared=True, process=(1, 2, 1000))
    assert machine.share(4).memory == (8_000_000_000 - 1000) // 4
    assert replace(machine, common=400).share(4).memory == (8_000_000_000 - 1000 + 3 * 400) // 4


def test_links_differ_by_kind_and_processes_share_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanlm.planning.hardware.devices.cores", lambda: 2)
    card = replace(of_config(CARD), links={"all-gather": 1e9})
    gather, reduce = (Work(collective=kind, size=8_000_000, ranks=2) for kind in ("all-gather", "all-reduce"))
    assert _cost(gather, card) == pytest.approx(1e-5 + 4_000_000 / 1e9)  # each of two sends half
    assert _cost(reduce, card) == pytest.approx(1e-5 + 8_000_000 / 1e10)  # half twice, over the link of all other kinds
    machine = replace(card, shared=True)
    assert (machine.crowd(1), machine.crowd(4), card.crowd(4)) == (1, 2, 1)
    assert _cost(gather, machine.share(2)) == pytest.approx(1e-5 + 4_000_000 / 0.5e9)
    assert _cost(gather, machine.share(4)) == pytest.approx(2e-5 + SLICE + 4_000_000 / 0.25e9)  # they arrive one after another


def test_several_processes_get_what_two_were_measured_to_have() -> None:
    machine = replace(of_config(CARD), accelerator="cpu", shared=True, paging=6e9, small_paging=2e9)
    assert machine.share(1) == machine
    half = machine.share(2)  # where two were not measured
    assert (half.flops["float32"], half.bandwidth, half.paging, half.small_paging) == (5e12, 5e10, 3e9, 1e9)
    pair = {"flops": {"float32": 6e12}, "bandwidth": 7e10, "paging": 6e9, "small_paging": 2e9, "overhead": 2e-5}
    machine = replace(machine, pair=pair)
    two, four = machine.share(2), machine.share(4)
    assert {name: getattr(two, name) for name in pair if name != "overhead"} | {"overhead": 2e-5} == pair
    assert (four.flops["float32"], four.bandwidth, four.paging, four.small_paging) == (3e12, 3.5e10, 3e9, 1e9)


def test_a_processor_moves_operands_before_it_multiplies_and_a_card_meanwhile() -> None:
    card = replace(of_config(CARD), overhead=0.0)
    product = Work(flops=2 * 10**10, moved=10**8, dtype="float32")  # 2 ms, 1 ms (0.5 to lay it out)
    assert _cost(product, card) == pytest.approx(2e-3 / REACHED)
    processor = replace(card, accelerator="cpu", paging=1e9, small_paging=1e8)
    assert _cost(product, processor) == pytest.approx(2.5e-3)
    pages = product._replace(fresh=10**6, small=10**5)  # 1 ms each
    assert _cost(pages, processor) == pytest.approx(4.5e-3)


def test_the_probe_measures_two_processes_and_weighs_nothing_of_its_caller(tmp_path: Path) -> None:
    """A script, without a guard, that has more in memory than a run: processes that it starts would run it again."""
    script = tmp_path / "script.py"
    script.write_text("import json\nfrom leanlm.planning.hardware.probe import measured\nweight = b'x' * 200_000_000\n"
                      "print(json.dumps(measured(rounds=1)))")  # fmt: skip
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100, check=True)
    found = json.loads(done.stdout)
    assert set(found["alone"]) == set(found["pair"]) == {"flops", "bandwidth", "paging", "small_paging", "overhead"}
    assert min(*found["alone"]["flops"].values(), *found["pair"]["flops"].values()) > 1e8  # others may be at work here too
    assert min(found["links"].values()) > 0
    one, several, launcher = found["process"]
    code = "import leanlm.training.fit\nfrom leanlm.common.machine import memory_now\nprint(memory_now())"
    plain = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert one == pytest.approx(plain, rel=0.15)
    assert launcher < one < several
    assert found["common"] < one


def test_what_was_measured_by_itself_leaves_something_of_the_whole() -> None:
    assert without(1.0, 3.0) == 2.0
    assert without(5.0, 2.0) == 0.5  # a machine that was busy meanwhile: no rate is negative, or without bounds


def test_unequal_devices_are_as_many_as_their_list() -> None:
    node = CARD | {"memory": ["8GB", "4GB", "2GB"], "speed": [1, 0.5, 2]}
    assert count(node, None) == 3
    card = of_config(node)
    assert card.memories == (8_000_000_000, 4_000_000_000, 2_000_000_000)
    two = card.least(range(2))  # work that these share evenly
    assert (two.memory, two.flops["float32"], two.bandwidth) == (4_000_000_000, 0.5e13, 0.5e11)
    assert card.scaled(0.5).memories == (4_000_000_000, 2_000_000_000, 1_000_000_000)
    with pytest.raises(UserError, match="3 values for 4 devices") as caught:
        of_config(node | {"speed": [1, -1, 1]}, 4)
    assert "positive numbers" in str(caught.value)  # with it, in one message
    with pytest.raises(UserError, match="a list of positive numbers"):
        of_config(CARD | {"speed": 0.5})
    with pytest.raises(UserError, match="one machine share"):
        of_config({"accelerator": "cpu", "memory": ["8GB", "4GB"]})


def test_blocks_go_by_weight() -> None:
    even = {"embed": 0.0, **{str(i): 1.0 for i in range(12)}, "head": 0.0}
    assert balance.by_weight(even, [2.0, 1.0]) == [8, 4]
    assert balance.by_weight(even | {"head": 3.0}, [2.0, 1.0]) == [10, 2]


def test_equal_lists_change_nothing(text: Path) -> None:
    asked = settings(text, "strategy=pipeline", "devices=2", "strategy.accumulate_grad_batches=4", "model.depth=4")
    one, listed = of_config(CARD), of_config(CARD | {"memory": ["8GB", "8GB"], "speed": [1, 1]})
    plain, other = (predict(asked, 256, device) for device in (one, listed))
    assert [need.parts for need in plain.needs] == [need.parts for need in other.needs]
    assert plain.seconds == other.seconds
    assert plain.fullest.memory == other.fullest.memory


def test_a_pipeline_waits_for_the_slower_device_unless_it_has_fewer_blocks(text: Path) -> None:
    device = of_config(CARD | {"speed": [1, 0.5]})
    base = settings(text, "strategy=pipeline", "devices=2", "strategy.accumulate_grad_batches=8", "model.width=1024")

    def seconds(blocks: list[int], device: Device) -> float:
        plan = replace(base.plan, stage_blocks=blocks)
        return predict(replace(base, plan=plan), 256, replace(device, overhead=0.0, latency=0.0, link=1e30)).seconds

    even, uneven, alike = seconds([6, 6], device), seconds([8, 4], device), seconds([6, 6], of_config(CARD))
    assert alike < uneven < even
    assert uneven / alike == pytest.approx(8 / 6, rel=0.024)  # embedding and head are beside the blocks
    assert 1.7 < even / alike < 2  # the slower one takes twice as long; updates and the pipeline's ends are less


def test_what_fits_unequal_devices_fits_each(text: Path) -> None:
    """A pipeline whose larger device holds more blocks needs less than two of the smaller devices would have to have."""
    asked = settings(text, "model.width=256")
    whole = stages(asked.config, Plan(), 256)
    device = replace(of_config(CARD), memory=60 << 20, memories=(180 << 20, 60 << 20))
    plans = [plan for family in families(asked, 2, whole, device, ()) for plan in family]
    assert any(plan.stage_blocks and plan.stage_blocks[0] > plan.stage_blocks[1] for plan in plans)
    assert not any(plan.stage_blocks for family in families(asked, 2, whole, of_config(CARD), ()) for plan in family)
    plan = next(
        plan for plan in plans
        if plan.stage_blocks and plan.accumulate_grad_batches == 8 and (plan.recompute, plan.offload) == ("none", "none")
        and plan.stage_blocks[0] > plan.stage_blocks[1]
    )  # fmt: skip
    found = predict(replace(asked, plan=plan), 256, device)
    assert [need.memory for need in found.needs] == [180 << 20, 60 << 20]
    assert found.fits == all(need.peak <= 0.95 * need.memory for need in found.needs)
    assert found.fits
    turned = predict(replace(asked, plan=plan), 256, replace(device, memories=device.memories[::-1]))
    assert not turned.fits
    assert turned.fullest.rank == 0


def test_a_search_over_unequal_devices(text: Path) -> None:
    asked = settings(text, "model.width=256")
    device = of_config(CARD | {"memory": ["150MiB", "75MiB"]})
    answer = search(asked, 256, device, 2, wanted=2)
    assert answer.fitting
    assert all(need.peak <= 0.95 * need.memory for found in answer.fitting for need in found.needs)
    assert {need.memory for found in answer.fitting if found.plan.pipeline == 1 for need in found.needs} <= {75 << 20}


def test_gpus_of_this_machine_by_their_data_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "NVIDIA A100 80GB PCIe", "NVIDIA GeForce RTX 4090", "Tesla T4",
             "NVIDIA L4", "NVIDIA H200")  # fmt: skip
    found = [sheet(name)["name"] for name in names]
    assert found == ["NVIDIA H100 SXM", "NVIDIA A100 40GB", "NVIDIA A100 80GB", "NVIDIA GeForce RTX 4090", "NVIDIA T4",
                     "NVIDIA L4", "NVIDIA H200 SXM"]  # fmt: skip
    with pytest.raises(UserError, match="no data sheet"):
        sheet("NVIDIA L40S")

    auto = {"accelerator": "auto", "memory": None}
    asking = round(ASKING * (600 << 20))  # is given back by the process that has asked
    monkeypatch.setattr(gpus, "here", lambda: (("NVIDIA L4", 23_000_000_000), ("NVIDIA L4", 22_900_000_000)))
    assert count(auto, None) == 2
    two = of_config(auto)
    assert (two.memory, two.memories, two.speeds, two.bandwidth) == (22_900_000_000 + asking, (), (), 300e9)
    assert of_config(auto | {"memory": "8GiB"}, 1).memory == 8 << 30
    with pytest.raises(UserError, match="has 2 GPUs"):
        of_config(auto, 4)
    monkeypatch.setattr(gpus, "here", lambda: (("NVIDIA GeForce RTX 4090", 24 << 30), ("Tesla T4", 15 << 30)))
    mixed = of_config(auto)
    assert mixed.memories == ((24 << 30) + asking, (15 << 30) + asking)
    assert mixed.speeds == pytest.approx((1.0, 320 / 1008), rel=0.01)
