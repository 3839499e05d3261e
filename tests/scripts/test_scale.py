"""``scripts/scale.py``: volumes and waiting against values worked out by hand."""

from pathlib import Path

import pytest

from scripts import scale


def test_a_ring_sends_nearly_twice_the_gradients_through_every_link() -> None:
    work = scale.Work(forward=10e9, parameters=1_000_000)
    assert work.exchange(2, 4e6) == pytest.approx(1.0)  # each half is sent back and forth
    assert work.exchange(8, 4e6) == pytest.approx(1.75)
    assert work.step(4, 120e9) == pytest.approx(1.0)  # three times 40 G


def test_devices_wait_for_as_long_as_loading_exceeds_computing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scale, "SPREAD", 0.0)
    # A worker loads a batch of 4 in 4 s; a step takes 1 s.
    assert scale.waiting(1.0, 1.0, 1, 4, 1, steps=400) == pytest.approx(3 / 4, abs=0.01)
    assert scale.waiting(1.0, 1.0, 1, 4, 2, steps=400) == pytest.approx(1 / 2, abs=0.01)
    assert scale.waiting(1.0, 1.0, 3, 4, 4, steps=400) == pytest.approx(0, abs=0.01)
    assert scale.waiting(5.0, 1.0, 1, 4, 1, steps=400) == 0


def test_devices_wait_for_the_slowest() -> None:
    alone, together = (scale.waiting(1.0, 1.0, devices, 1, 1, steps=400) for devices in (1, 8))
    assert 0 < alone < together < 1


def test_the_page_says_what_was_measured_and_what_was_assumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speed = tmp_path / "speed.csv"
    speed.write_text('candidate,value\n"whole sample, collated",0.02\n')
    scale.main([str(speed)])
    page = " ".join(capsys.readouterr().out.split())
    assert "No GPU was measured" in page
    assert "20.0 ms per core" in page
    assert "146.8 M parameters" in page
    speed.write_text("candidate,value\n")
    with pytest.raises(SystemExit, match="no line 'whole sample"):
        scale.main([str(speed)])


def test_a_second_machine_is_worth_it_above_the_bandwidth_at_which_both_take_as_long() -> None:
    work = scale.Work(forward=70e9, parameters=146_800_000)
    for rate in scale.DEVICES.values():
        before = work.total(8, rate, 200e9)
        bandwidth = work.worth(16, rate, before)
        assert work.total(16, rate, bandwidth) == pytest.approx(before)
        assert work.total(16, rate, 1.1 * bandwidth) < before
