"""Tracks of one camera: who is joined to whom, how a track moves, votes and ends."""

import numpy as np
import pytest
from psdiff.models.detections import Detections
from psdiff.runtime.tracks import CameraTracks

SIZE = (640, 384)
ANNA, BEN = np.eye(4, dtype=np.float32)[:2]


def people(*found):
    """Detections of (centre x, embedding) or (centre x, embedding, score), boxes 40 by 100 pixels."""
    rows = [(*each, 0.9)[:3] for each in found]
    boxes = np.array([[x - 20, 100, x + 20, 200] for x, _, _ in rows], np.float32).reshape(-1, 4)
    scores = np.array([score for _, _, score in rows], np.float32)
    return Detections(boxes, scores, np.array([who for _, who, _ in rows], np.float32).reshape(-1, 4))


def follow(frames, step_s=0.2, **options):
    """Numbers of the tracks of each frame, and the tracks object."""
    tracks = CameraTracks(**options)
    numbers = [
        [track.number for track in tracks.update(found, i * step_s, i, SIZE).tracks]
        for i, found in enumerate(frames)
    ]
    return numbers, tracks


def test_one_person_is_one_track_with_a_vote_a_frame():
    numbers, tracks = follow([people((100 + 15 * i, ANNA)) for i in range(10)])
    assert numbers == [[1]] * 10
    [track] = tracks.live
    assert track.votes == 10
    assert (track.first.seq, track.last.seq) == (0, 9)


def test_two_people_who_cross_keep_their_tracks():
    walks = [people((100 + 20 * i, ANNA), (300 - 20 * i, BEN)) for i in range(11)]
    # In the middle both stand in the same place.
    assert abs(walks[5].boxes_xyxy[0, 0] - walks[5].boxes_xyxy[1, 0]) < 1
    numbers, _ = follow(walks)
    assert numbers == [[1, 2]] * 11


def test_two_who_look_alike_keep_their_tracks_by_their_velocity():
    """Before and after the meeting; the boxes never lie on each other entirely."""
    walks = [people((100 + 24 * i, ANNA), (310 - 24 * i, ANNA)) for i in range(10)]
    numbers, _ = follow(walks)
    assert numbers == [[1, 2]] * 10


def test_another_look_in_the_same_place_is_another_person():
    numbers, _ = follow([people((100, ANNA)), people((100, BEN))])
    assert numbers == [[1], [2]]


def test_somebody_who_looks_the_same_is_followed_without_overlap_as_far_as_people_run():
    near, far = people((160, ANNA)), people((400, ANNA))
    assert follow([people((100, ANNA)), near], step_s=0.5)[0] == [[1], [1]]
    assert follow([people((100, ANNA)), far], step_s=0.5)[0] == [[1], [2]]


def test_a_short_gap_keeps_the_track_and_a_long_one_ends_it():
    def walk(gap):
        return [people((100, ANNA)), *[people()] * gap, people((100, ANNA))]

    assert follow(walk(8), gap_s=2.0)[0][-1] == [1]
    numbers, tracks = follow(walk(12), gap_s=2.0)
    assert numbers[-1] == [2]
    assert len(tracks.live) == 1


def test_who_ended_is_told_once():
    tracks = CameraTracks(gap_s=1.0)
    tracks.update(people((100, ANNA), (300, BEN)), 0.0, 0, SIZE)
    assert tracks.update(people((100, ANNA)), 0.9, 1, SIZE).ended == []
    ended = tracks.update(people((100, ANNA)), 1.8, 2, SIZE).ended
    assert [(track.number, track.last.seq) for track in ended] == [(2, 0)]
    assert [track.number for track in tracks.end()] == [1]
    assert tracks.end() == []


def test_another_size_of_the_picture_ends_all_tracks():
    tracks = CameraTracks()
    tracks.update(people((100, ANNA)), 0.0, 0, SIZE)
    found = tracks.update(people((100, ANNA)), 0.2, 1, (1280, 720))
    assert [track.number for track in found.ended] == [1]
    assert [track.number for track in found.tracks] == [2]


def test_memory_is_bounded_and_the_longest_unseen_go_first():
    tracks = CameraTracks(gap_s=1000, most=5)
    ended = []
    for i in range(50):
        ended += tracks.update(people((5000 * i, ANNA)), float(i), i, SIZE).ended
        assert len(tracks.live) <= 5
    assert sorted(track.number for track in (*ended, *tracks.live)) == list(range(1, 51))
    assert min(track.last.time_s for track in tracks.live) >= max(track.last.time_s for track in ended)


def test_the_box_moves_on_at_constant_velocity():
    _, tracks = follow([people((100 + 10 * i, ANNA)) for i in range(4)], step_s=0.25)
    [track] = tracks.live
    np.testing.assert_allclose(track.velocity, [40, 0], atol=1e-6)
    np.testing.assert_allclose(track.box_at(0.75 + 0.5), [130, 100, 170, 200], atol=1e-4)
    np.testing.assert_allclose(track.box_at(0.0), [110, 100, 150, 200])


def test_time_that_stands_still_gives_no_velocity():
    tracks = CameraTracks()
    tracks.update(people((100, ANNA)), 1.0, 0, SIZE)
    tracks.update(people((110, ANNA)), 1.0, 1, SIZE)
    [track] = tracks.live
    assert track.votes == 2
    assert np.array_equal(track.velocity, [0, 0])


def test_votes_count_by_score_and_area():
    tracks = CameraTracks()
    large = Detections(
        np.array([[80, 60, 140, 260]], np.float32), np.array([0.8], np.float32), ((ANNA + BEN) / 2**0.5)[None]
    )
    tracks.update(people((100, ANNA, 0.4)), 0.0, 0, SIZE)
    tracks.update(large, 0.2, 1, SIZE)
    tracks.update(people((100, ANNA, 0.5)), 0.4, 2, SIZE)
    [track] = tracks.live
    weights = np.array([0.4 * 4000, 0.8 * 12000, 0.5 * 4000])
    looks = np.stack([ANNA, (ANNA + BEN) / 2**0.5, ANNA])
    mean = weights @ looks
    np.testing.assert_allclose(track.embedding, mean / np.linalg.norm(mean), atol=1e-6)
    assert (track.best.seq, track.votes) == (1, 3)


@pytest.mark.parametrize(("gap_s", "most"), [(0, 8), (1, 0)])
def test_wrong_limits_are_refused(gap_s, most):
    with pytest.raises(ValueError, match=f"gap_s must be > 0 and most >= 1, got {gap_s:g} and {most}"):
        CameraTracks(gap_s, most)
