"""mIoU, oIoU, Pr@X and the ceiling, compared with values computed by hand."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from crislit.training.metrics import (
    METRICS,
    PRECISION_AT,
    SegmentationMetric,
    intersection_and_union,
    iou,
    reachable_iou,
)

# The same examples in every run, without time limits.
relaxed = settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)

Sample = tuple[int, int, bool]
"""Intersection, union, whether the target is empty."""


def metric_of(samples: list[Sample], *ends: int) -> SegmentationMetric:
    """Update a metric with samples, in batches with these ends."""
    metric = SegmentationMetric()
    for start, end in zip([0, *ends], [*ends, len(samples)], strict=True):
        batch = samples[start:end]
        metric.update(
            [intersection for intersection, _, _ in batch],
            [union for _, union, _ in batch],
            [is_empty for _, _, is_empty in batch],
        )
    return metric


def values_of(metric: SegmentationMetric) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


# -- One sample


def test_intersection_and_union_count_pixels_of_any_kind_of_mask() -> None:
    prediction = np.array([[1, 1, 0], [0, 1, 0]], dtype=np.uint8)
    target = np.array([[0, 1, 1], [0, 1, 0]], dtype=np.uint8)
    assert intersection_and_union(prediction, target) == (2, 4)
    assert intersection_and_union(prediction > 0, 255 * target) == (2, 4)
    assert intersection_and_union(0 * prediction, target) == (0, 3)
    assert intersection_and_union(0 * prediction, 0 * target) == (0, 0)


def test_iou_adds_a_millionth_to_the_union() -> None:
    assert iou(3, 4) == 3 / 4.000001
    assert iou(4, 4) == pytest.approx(1, abs=1e-6)
    assert iou(4, 4) < 1
    assert iou(0, 0) == 0


# -- Many samples


def test_every_metric_equals_the_value_computed_by_hand() -> None:
    # IoU 0.95, 0.75, 0.55 and 1/3, with different sizes.
    samples = [(95, 100, False), (30, 40, False), (11, 20, False), (20, 60, False)]
    values = values_of(metric_of(samples))
    assert set(values) == {*METRICS, "samples", "empty"}
    assert values["mIoU"] == pytest.approx((0.95 + 0.75 + 0.55 + 1 / 3) / 4, abs=1e-6)
    assert values["oIoU"] == pytest.approx((95 + 30 + 11 + 20) / (100 + 40 + 20 + 60), abs=1e-6)
    assert [values[f"Pr@{at}"] for at in (50, 60, 70, 80, 90)] == [0.75, 0.5, 0.5, 0.25, 0.25]
    assert (values["samples"], values["empty"]) == (4, 0)


def test_the_names_are_those_of_the_papers_tables() -> None:
    assert METRICS == ("mIoU", "oIoU", "Pr@50", "Pr@60", "Pr@70", "Pr@80", "Pr@90")


def test_precision_counts_only_ious_strictly_above_the_threshold() -> None:
    # For large unions, 1e-6 is lost to rounding: the IoU is exactly the threshold.
    union = 10 * 2**40
    for at, name in zip(PRECISION_AT, METRICS[2:], strict=True):
        exact = round(10 * at) * 2**40
        assert iou(exact, union) == at
        intersections = (exact - 2**20, exact, exact + 2**20)
        hits = [values_of(metric_of([(i, union, False)]))[name] for i in intersections]
        assert hits == [0, 0, 1], at


def test_half_of_a_small_union_is_below_one_half() -> None:
    assert values_of(metric_of([(1, 2, False)]))["Pr@50"] == 0
    assert values_of(metric_of([(2, 3, False)]))["Pr@50"] == 1


def test_an_empty_target_has_iou_zero_and_is_counted() -> None:
    values = values_of(metric_of([(0, 0, True), (0, 7, True), (10, 10, False)]))
    assert values["mIoU"] == pytest.approx(1 / 3, abs=1e-6)
    assert values["oIoU"] == pytest.approx(10 / 17, abs=1e-6)
    assert values["Pr@50"] == pytest.approx(1 / 3)
    assert (values["samples"], values["empty"]) == (3, 2)


@pytest.mark.parametrize("updates", [0, 1])
@pytest.mark.filterwarnings(
    "ignore:The ``compute`` method of metric SegmentationMetric was called before:UserWarning"
)
def test_metrics_without_samples_are_a_value_error(updates: int) -> None:
    metric = SegmentationMetric()
    for _ in range(updates):
        metric.update([], [], [])
    with pytest.raises(ValueError, match="no sample was evaluated"):
        metric.compute()


def test_batches_of_different_lengths_are_a_value_error() -> None:
    with pytest.raises(ValueError, match="argument"):
        SegmentationMetric().update([1, 2], [3], [False])


def test_reset_removes_all_samples() -> None:
    metric = metric_of([(1, 2, True), (5, 5, False)])
    metric.reset()
    metric.update([3], [4], [False])
    assert values_of(metric) == values_of(metric_of([(3, 4, False)]))


sample_counts = st.integers(0, 10**7).flatmap(
    lambda union: st.tuples(st.integers(0, union), st.just(union), st.booleans())
)
masks = npst.arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12)))


@given(prediction=masks, data=st.data())
@settings(relaxed, max_examples=80)
def test_any_two_masks_have_the_intersection_and_union_of_their_sets_of_pixels(
    prediction: npt.NDArray[np.bool_], data: st.DataObject
) -> None:
    target = data.draw(npst.arrays(np.bool_, st.just(prediction.shape)))
    predicted, expected = (set(map(tuple, np.argwhere(m).tolist())) for m in (prediction, target))
    intersection, union = intersection_and_union(prediction, target.astype(np.uint8))
    assert (intersection, union) == (len(predicted & expected), len(predicted | expected))
    assert 0 <= iou(intersection, union) < 1
    values = values_of(metric_of([(intersection, union, not target.any())]))
    assert values["mIoU"] == pytest.approx(iou(intersection, union), abs=1e-6)
    assert all(0 <= values[name] <= 1 for name in METRICS)
    precisions = [values[f"Pr@{round(100 * at)}"] for at in PRECISION_AT]
    assert precisions == sorted(precisions, reverse=True)


@given(samples=st.lists(sample_counts, min_size=1, max_size=40), data=st.data())
@settings(relaxed, max_examples=60)
def test_order_and_batches_do_not_change_the_result_by_a_bit(
    samples: list[Sample], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(samples))
    ends = sorted(data.draw(st.lists(st.integers(0, len(samples)), max_size=5)))
    assert values_of(metric_of(shuffled, *ends)) == values_of(metric_of(samples))


@given(samples=st.lists(sample_counts, min_size=1, max_size=40), processes=st.integers(1, 5))
@settings(relaxed, max_examples=40)
def test_merged_states_of_several_processes_give_the_result_of_one(
    samples: list[Sample], processes: int
) -> None:
    # Some processes may have no samples.
    merged, *others = [metric_of(samples[rank::processes]) for rank in range(processes)]
    for other in others:
        merged.merge_state(other)
    assert values_of(merged) == values_of(metric_of(samples))


def test_every_state_is_an_integer_that_processes_sum() -> None:
    metric = metric_of([(1, 3, False)])
    states = {name: getattr(metric, name) for name in metric._reductions}
    assert set(states) == {"iou_sum", "intersection", "union", "hits", "samples", "empty"}
    assert {state.dtype for state in states.values()} == {torch.long}
    for reduce in metric._reductions.values():
        assert callable(reduce)
        assert reduce(torch.tensor([1, 2])) == 3


def test_a_full_test_split_of_large_images_does_not_overflow() -> None:
    pixels = 640 * 640
    metric = SegmentationMetric()
    for _ in range(3):
        metric.update([pixels] * 2000, [pixels] * 2000, [False] * 2000)
    values = values_of(metric)
    assert values["mIoU"] == pytest.approx(1, abs=1e-6)
    assert values["oIoU"] == pytest.approx(1, abs=1e-6)
    assert values["samples"] == 6000


# -- The ceiling


def rectangle(
    height: int, width: int, top: int, left: int, tall: int, wide: int
) -> npt.NDArray[np.uint8]:
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[top : top + tall, left : left + wide] = 1
    return mask


def test_the_ceiling_of_a_large_rectangle_at_a_large_input_size_is_nearly_one() -> None:
    ceiling = reachable_iou(rectangle(480, 640, 60, 80, 320, 400), image_size=640, threshold=0.35)
    assert 0.97 < ceiling < 1


def test_the_ceiling_of_a_small_object_rises_with_the_input_size_and_stays_below_one() -> None:
    small = rectangle(240, 320, 101, 143, 33, 41)
    ceilings = [
        reachable_iou(small, image_size=size, threshold=0.35) for size in (64, 128, 256, 512)
    ]
    assert ceilings == sorted(ceilings)
    assert 0.2 < ceilings[0] < 0.6
    assert 0.5 < ceilings[1] < 0.75
    assert 0.85 < ceilings[3] < 0.97


def test_the_ceiling_of_a_small_object_is_below_that_of_a_large_one() -> None:
    small, large = rectangle(240, 320, 101, 143, 33, 41), rectangle(240, 320, 30, 40, 170, 220)
    assert reachable_iou(small, 128, 0.35) < reachable_iou(large, 128, 0.35) - 0.1


def test_the_ceiling_is_zero_for_an_empty_target_and_one_for_a_full_one() -> None:
    assert reachable_iou(np.zeros((60, 80), dtype=np.uint8), 64, 0.35) == 0
    assert reachable_iou(np.ones((64, 64), dtype=np.uint8), 64, 0.35) == pytest.approx(1, abs=1e-6)
