import av
import numpy as np
import pytest
from psdiff.training.synthetic.clips import read_truth, truth_path, write_clip
from psdiff.training.synthetic.street import Street
from pydantic import ValidationError


@pytest.fixture(scope="module")
def street():
    return Street(3, num_people=4, width=192, height=128, duration_s=4)


def test_a_clip_decodes_and_its_truth_matches_the_frames(street, tmp_path):
    path = tmp_path / "east.mp4"
    calls = []
    write_clip(street, 1, path, fps=10, duration_s=1.2, on_frame=lambda: calls.append(1))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["east.mp4", "east.truth.json"]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 10)
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    truth = read_truth(truth_path(path))
    assert len(pictures) == len(truth.frames) == len(calls) == 12
    assert (truth.seed, truth.camera, truth.fps, truth.width, truth.height) == (3, 1, 10, 192, 128)
    assert np.allclose(truth.codes, street.codes, atol=1e-4)
    for number, (picture, told) in enumerate(zip(pictures, truth.frames, strict=True)):
        labelled = street.frame(1, number / 10)
        assert np.abs(picture.astype(int) - labelled.image).mean() < 12
        assert told.pids == labelled.pids.tolist()
        assert np.allclose(np.reshape(told.boxes_xyxy, (-1, 4)), labelled.boxes_xyxy, atol=0.051)
        assert np.allclose(told.visibility, labelled.visibility, atol=0.0051)


def test_nothing_stays_behind_when_writing_is_interrupted(street, tmp_path):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_clip(street, 0, tmp_path / "west.mp4", duration_s=1, on_frame=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_clip_needs_a_frame_and_even_sides(street, tmp_path):
    with pytest.raises(ValueError, match="at least one frame"):
        write_clip(street, 0, tmp_path / "a.mp4", duration_s=0)
    odd = Street(3, num_people=1, width=191, height=128, duration_s=1)
    with pytest.raises(ValueError, match="must be even, got 191 x 128"):
        write_clip(odd, 0, tmp_path / "a.mp4")


def test_a_file_that_is_no_truth_is_refused(tmp_path):
    path = tmp_path / "x.truth.json"
    path.write_text('{"fps": 10}')
    with pytest.raises(ValidationError):
        read_truth(path)
