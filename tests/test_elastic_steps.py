"""How many steps a batch gets: as many as fit, fewer at once, more with patience, by what steps take now."""

import pytest
from psdiff.bundle import Latency
from psdiff.runtime.elastic_steps import CostTable, StepChooser, StepRange

# 40 ms and 10 ms a step for one image, 100 and 40 for four.
TABLE = CostTable({(1, 1): 0.05, (2, 1): 0.06, (4, 1): 0.08, (1, 4): 0.14, (4, 4): 0.26})


def chooser(least=1, most=4, hold=3, reserve=0.1):
    return StepChooser(TABLE, StepRange(least, most, hold, reserve))


@pytest.mark.parametrize(
    ("steps", "batch", "seconds"),
    [(1, 1, 0.05), (3, 1, 0.07), (8, 1, 0.12), (2, 4, 0.18), (2, 2, 0.06 + 0.04), (1, 8, 0.28)],
)
def test_the_table_is_linear_between_and_beyond(steps, batch, seconds):
    assert TABLE.seconds(steps, batch) == pytest.approx(seconds)


def test_the_table_of_a_manifest_is_that_of_backend_and_machine():
    def row(steps, ms, backend="onnxruntime 1", machine="here"):
        return Latency(
            steps=steps, batch=1, backend=backend, machine=machine, p50_ms=ms, p95_ms=ms, p99_ms=ms
        )

    rows = [row(1, 50), row(2, 60), row(1, 7, backend="openvino 2"), row(2, 9, machine="there")]
    assert CostTable.of(rows, "onnxruntime 1", "here").seconds(4, 1) == pytest.approx(0.08)
    with pytest.raises(
        ValueError, match=r"two numbers of steps of one batch size, got \[\]; run psdiff bench"
    ):
        CostTable.of(rows, "onnxruntime 1", "nowhere")
    with pytest.raises(ValueError, match=r"got \[\(1, 1\)\]"):
        CostTable.of(rows, "openvino 2", "here")


def test_noise_in_the_table_makes_no_step_free_or_refunded():
    table = CostTable({(1, 1): 0.06, (2, 1): 0.05})
    assert table.seconds(8, 1) == pytest.approx(0.055)


def test_more_steps_come_one_by_one_and_only_with_patience():
    each = chooser()
    assert [each.choose(1.0, 1) for _ in range(10)] == [1, 1, 2, 2, 2, 3, 3, 3, 4, 4]


def test_fewer_steps_come_at_once():
    each = chooser()
    for _ in range(10):
        each.choose(1.0, 1)
    assert each.choose(0.065, 1) == 2
    assert each.choose(0.055, 1) == 1


def test_a_camera_that_is_served_too_rarely_costs_steps():
    each = chooser()
    for _ in range(10):
        each.choose(1.0, 1)
    assert [each.choose(1.0, 1, is_behind=True) for _ in range(5)] == [3, 2, 1, 1, 1]
    assert each.choose(0.01, 1, is_behind=True) is None
    assert [each.choose(1.0, 1) for _ in range(10)] == [1, 1, 2, 2, 2, 3, 3, 3, 4, 4]
    assert each.choose(0.065, 1, is_behind=True) == 2, "time goes first"


def test_a_single_batch_with_room_changes_nothing():
    each = chooser()
    chosen = [each.choose(slack_s, 1) for slack_s in (1.0, 0.055) * 10]
    assert set(chosen) == {1}


def test_steps_do_not_swing_at_the_edge():
    """Room for two steps without reserve: at one it stays."""
    each = chooser(reserve=0.15)
    assert {each.choose(0.062, 1) for _ in range(50)} == {1}


def test_too_late_is_none_and_the_range_is_kept():
    each = chooser(least=2, most=3)
    assert each.choose(0.055, 1) is None
    assert each.choose(-1.0, 1) is None
    assert {each.choose(9.0, 1) for _ in range(50)} == {2, 3}


def test_what_steps_take_now_counts():
    each = chooser()
    for _ in range(10):
        each.choose(0.1, 1)
    assert each.choose(0.1, 1) == 4
    for _ in range(30):  # another program takes half the machine
        each.observe(4, 1, 2 * TABLE.seconds(4, 1))
    assert each.correction == pytest.approx(2, rel=0.01)
    assert each.choose(0.125, 1) == 2
    for _ in range(30):
        each.observe(2, 1, TABLE.seconds(2, 1))
    assert [each.choose(0.1, 1) for _ in range(10)][-1] == 4


def test_one_stall_does_not_count_for_more_than_a_few_measurements():
    each = chooser()
    each.observe(1, 1, 60.0)
    assert each.correction <= 1.61


def test_after_a_time_in_which_nothing_fits_it_tries_again():
    each = chooser()
    for _ in range(20):
        each.observe(1, 1, 60.0)
    skipped = 0
    while each.choose(0.2, 1) is None:
        each.skip()
        skipped += 1
    assert 10 < skipped < 1000


def test_batches_of_more_images_take_longer():
    each = chooser(hold=1)
    assert [each.choose(0.2, 1) for _ in range(5)][-1] == 4
    assert each.choose(0.2, 4) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "steps must be 1 <= least <= most, got 0 and 4"),
        ((3, 2), "steps must be 1 <= least <= most, got 3 and 2"),
        ((1, 2, 0), "hold must be >= 1 and reserve >= 0, got 0"),
    ],
)
def test_a_range_without_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StepRange(*arguments)
