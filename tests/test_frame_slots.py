"""Pictures in shared memory: what is written is what is seen, and a slot is free when nobody looks at it any more."""

import gc
import os
import subprocess
import sys

import numpy as np
import pytest
from psdiff.runtime.frame_slots import FrameSlots

HEIGHT, WIDTH = 9, 13


@pytest.fixture
def slots():
    made = FrameSlots.create(HEIGHT * WIDTH * 3, 3)
    yield made
    os.close(made.fd)


def image(seed):
    return np.random.default_rng(seed).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)


def test_pictures_come_out_as_they_went_in(slots):
    written = [slots.write(image(seed)) for seed in range(3)]
    assert written == [0, 1, 2]
    pictures = [slots.picture(slot, HEIGHT, WIDTH) for slot in written]
    for seed, picture in enumerate(pictures):
        np.testing.assert_array_equal(picture, image(seed))
        assert picture.ctypes.data % 64 == pictures[0].ctypes.data % 64


def test_a_slot_is_free_when_the_last_view_is_gone(slots):
    picture = slots.picture(slots.write(image(0)), HEIGHT, WIDTH)
    part = picture[2:5][:, ::2]
    del picture
    gc.collect()
    assert slots.num_free() == 2
    np.testing.assert_array_equal(part, image(0)[2:5][:, ::2])
    del part
    assert slots.num_free() == 3


def test_none_where_all_are_in_use_and_the_lowest_free_one_is_taken(slots):
    kept = [slots.picture(slots.write(image(seed)), HEIGHT, WIDTH) for seed in range(3)]
    assert slots.write(image(3)) is None
    kept[1] = None
    assert slots.write(image(3)) == 1
    np.testing.assert_array_equal(kept[2], image(2))


def test_smaller_pictures_fit_and_larger_ones_are_refused(slots):
    slot = slots.write(image(0)[:4, :5])
    np.testing.assert_array_equal(slots.picture(slot, 4, 5), image(0)[:4, :5])
    with pytest.raises(ValueError, match=r"image must have at most 351 bytes, got 378"):
        slots.write(np.zeros((9, 14, 3), np.uint8))
    assert slots.num_free() == 3


def test_a_picture_cannot_be_written(slots):
    picture = slots.picture(slots.write(image(0)), HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="read-only"):
        picture[0] = 0


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="slot_bytes and count must be >= 1, got 0 and 3"):
        FrameSlots.create(0, 3)


def test_two_processes_share_them(slots):
    """What another process writes is seen here, and what is let go here is free there."""
    program = (
        "import sys, numpy as np; from psdiff.runtime.frame_slots import FrameSlots\n"
        "slots = FrameSlots(int(sys.argv[1]), int(sys.argv[2]), 3)\n"
        "for line in sys.stdin: print(slots.write(np.full((9, 13, 3), int(line), np.uint8)), flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(slots.fd), str(slots.slot_bytes)]
    with subprocess.Popen(
        command, pass_fds=[slots.fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:

        def write(value):
            writer.stdin.write(f"{value}\n")
            writer.stdin.flush()
            return writer.stdout.readline().strip()

        pictures = []
        for value in (11, 22, 33):
            pictures.append(slots.picture(int(write(value)), HEIGHT, WIDTH))
            assert (pictures[-1] == value).all()
        assert write(44) == "None"
        pictures.clear()
        assert write(55) == "0"
        writer.stdin.close()
