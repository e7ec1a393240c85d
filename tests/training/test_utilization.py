"""Model FLOPs utilization: operations per token in closed form, and its column."""

from pathlib import Path

import pytest
from conftest import composed

from leanlm.common.precision import automatic
from leanlm.common.run_folder import COLUMNS, Run, Table
from leanlm.config.checks import check
from leanlm.config.device_sheets import sheet as sheet_of
from leanlm.training.callbacks.record import Record
from leanlm.training.utilization import full_speed, instead_of_fp32, operations_per_token

CARD = "NVIDIA H100 80GB HBM3"


def test_operations_of_gpt2() -> None:
    """6 for each weight of a matrix, the tied table once (as head), and 12 L h T of attention."""
    asked = check(composed("model=gpt2", "sequence=1024", "device=cpu", "precision=bf16-mixed"))
    matrices = 12 * 12 * 768**2 + 50257 * 768
    expected = 6 * matrices + 12 * 12 * 768 * 1024
    assert operations_per_token(asked, 50257) == pytest.approx(expected, rel=1e-12)
    assert full_speed(asked, 50257, CARD) == pytest.approx(989e12 / expected)
    assert full_speed(asked, 50257, "NVIDIA Nothing 1") is None


def test_operations_of_an_lstm() -> None:
    asked = check(composed("model=lstm", "model.width=64", "model.depth=2", "model.tied=false", "device=cpu"))
    assert operations_per_token(asked, 100) == pytest.approx(6 * (2 * 4 * 64 * (64 + 64) + 100 * 64), rel=1e-12)


@pytest.mark.parametrize("speed", [None, 1000.0])
def test_the_column_is_there_where_the_speed_of_the_card_is_known(speed: float | None, tmp_path: Path) -> None:
    run = Run(tmp_path)
    table = Table(run, 0, Record(run, 1, speed).full_speed is not None)
    table.add(1, {"train_loss": 2.0, "mfu": 0.5} if speed else {"train_loss": 2.0})
    table.flush()
    header = run.metrics.read_text().splitlines()[0].split(",")
    assert header == [name for name in COLUMNS if speed or name != "mfu"]
    assert run.rows() == [{"step": 1, "train_loss": 2.0} | ({"mfu": 0.5} if speed else {})]


def test_what_fp32_gives_away() -> None:
    assert "up to 989 instead of 67 teraflop/s (TF32: about 494)" in instead_of_fp32(CARD)
    assert "several times as fast" in instead_of_fp32("NVIDIA Nothing 1")


def test_auto_is_bf16_where_a_card_has_it_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanlm.common.precision.gpu_has_bf16", lambda: True)
    sheets = {name: {"accelerator": "cuda", "flops": sheet_of(name)["flops"]} for name in (CARD, "NVIDIA T4")}
    assert automatic(sheets[CARD]) == "bf16-mixed"
    assert automatic(sheets["NVIDIA T4"]) == "fp32"  # it emulates bf16
    assert automatic({"accelerator": "auto"}) == "bf16-mixed"
    assert automatic({"accelerator": "cpu"}) == "fp32"
