"""Pictures out of the pieces of RTP: the same as the parser's, as soon as they are whole, and never half of one."""

import re
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import av
import numpy as np
import pytest
from conftest import RED, scene, write_video
from psdiff.runtime.access_units import PROOF_PICTURES, AccessUnits
from psdiff.runtime.soak.tcp_proxy import TcpProxy
from psdiff.runtime.source_address import parse_address
from psdiff.runtime.video import VideoSource

# Bytes of a NAL unit in one piece: less than a network's 1400, so that small pictures have several too.
PAYLOAD = 200
CLOCK_HZ, FPS, GOP = 90_000, 10, 10
TICKS = CLOCK_HZ // FPS

ONE_SLICE = {"crf": "24", "g": str(GOP), "bf": "0", "threads": "1"}
KINDS = {
    "one slice": ("libx264", ONE_SLICE),
    "four slices": ("libx264", ONE_SLICE | {"slices": "4"}),
    "slices by size": ("libx264", ONE_SLICE | {"x264-params": "slice-max-size=300"}),
    "b-frames": ("libx264", ONE_SLICE | {"bf": "2"}),
    "delimiters": ("libx264", ONE_SLICE | {"aud": "1"}),
    "repeated sets": ("libx264", ONE_SLICE | {"x264-params": "repeat-headers=1"}),
    "hevc": ("libx265", {"crf": "24", "x265-params": f"log-level=none:keyint={GOP}:bframes=0"}),
}


def pictures(count, start=0):
    """Somebody walks past a wall that moves too, so that pictures fill several pieces."""
    noise = np.random.default_rng(0).integers(0, 160, (12, 60, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    frames = []
    for i in range(start, start + count):
        frame = scene([((10 + 2 * i, 20, 26 + 2 * i, 60), RED)])
        frame[frame[..., 0] == 30] = noise[:, 2 * i : 2 * i + 160][frame[..., 0] == 30]
        frames.append(frame)
    return frames


def encoded(path, kind="one slice", count=50, fps=FPS):
    """[(Annex B, PTS)] in the order of sending, and the file."""
    codec, options = KINDS[kind]
    write_video(path, pictures(count), fps=fps, codec=codec, options=options)
    name = "hevc" if codec == "libx265" else "h264"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        to_annex_b = av.bitstream.BitStreamFilterContext(f"{name}_mp4toannexb", stream)
        packets = [
            each
            for packet in container.demux(stream)
            for each in to_annex_b.filter(packet if packet.size else None)
        ]
        return name, [
            (bytes(each), round(each.pts * each.time_base * CLOCK_HZ)) for each in packets if each.size
        ]


def nals_of(unit):
    return [nal.rstrip(b"\x00") for nal in re.split(b"\x00\x00\x01", unit)[1:]]


def pieces_of(nal, payload=PAYLOAD, head=1):
    """As FFmpeg gives what RTP carries: a small NAL unit as one piece, a large one as several of one size."""
    if len(nal) <= payload:
        return [b"\x00\x00\x00\x01" + nal]
    # A fragment's own head takes the room of the NAL unit's and one byte.
    size, body = payload - head - 1, nal[head:]
    cut = [body[i : i + size] for i in range(0, len(body), size)]
    return [b"\x00\x00\x00\x01" + nal[:head] + cut[0], *cut[1:]]


def sent(units, name="h264", payload=PAYLOAD):
    """[[(piece, PTS), ...] for each picture]."""
    head = 2 if name == "hevc" else 1
    return [
        [(piece, pts) for nal in nals_of(unit) for piece in pieces_of(nal, payload, head)]
        for unit, pts in units
    ]


def packet(data, pts):
    made = av.Packet(data)
    made.pts = pts
    return made


class Reader:
    """AccessUnits and the decoder behind it, fed piece by piece."""

    def __init__(self, name="h264"):
        self.given, self.frames = [], []
        self.units = AccessUnits(name, Fraction(1, CLOCK_HZ))
        self.lost = self.units.lost
        self._decoder = av.CodecContext.create(name, "r")
        self._decoder.thread_type = "NONE"

    def feed(self, pieces):
        """Returns how many pictures came out."""
        given = [each for data, pts in pieces for each in self.units.add(packet(data, pts))]
        self._decode(given)
        return len(given)

    def end(self):
        self._decode(self.units.rest())
        self.frames += self._decoder.decode(None)

    def _decode(self, packets):
        self.given += packets
        for each in packets:
            self.frames += self._decoder.decode(each)


def shown(frames):
    return [(frame.pts, frame.to_ndarray(format="gray").tobytes()) for frame in frames]


def expected(path):
    with av.open(str(path)) as container:
        return [
            (round(frame.pts * frame.time_base * CLOCK_HZ), frame.to_ndarray(format="gray").tobytes())
            for frame in container.decode(video=0)
        ]


@pytest.mark.parametrize("kind", list(KINDS))
def test_pictures_are_the_same_as_those_of_the_file(tmp_path, kind):
    name, units = encoded(tmp_path / "walk.mp4", kind)
    reader = Reader(name)
    for pieces in sent(units, name):
        reader.feed(pieces)
    reader.end()
    assert [(nals_of(bytes(each)), each.pts) for each in reader.given] == [
        (nals_of(unit), pts) for unit, pts in units
    ]
    assert reader.lost == []
    assert shown(reader.frames) == expected(tmp_path / "walk.mp4")


@pytest.mark.parametrize("kind", ["one slice", "four slices", "b-frames", "delimiters", "repeated sets"])
def test_a_picture_comes_with_its_last_piece_once_that_is_proven(tmp_path, kind):
    _, units = encoded(tmp_path / "walk.mp4", kind)
    reader = Reader()
    came = [reader.feed(pieces) for pieces in sent(units)]
    # Picture 30 is the last that is believed only when the next one begins; that one comes at once.
    assert came == [0] + [1] * (PROOF_PICTURES - 1) + [2] + [1] * (len(units) - PROOF_PICTURES - 1)
    assert reader.units.is_proven


def test_no_picture_comes_before_its_last_piece(tmp_path):
    _, units = encoded(tmp_path / "walk.mp4", "four slices")
    reader = Reader()
    for pieces in sent(units):
        for piece in pieces[:-1]:
            given = [each.pts for each in reader.units.add(packet(*piece))]
            assert piece[1] not in given
        reader.feed(pieces[-1:])


@pytest.mark.parametrize("kind", ["slices by size", "hevc"])
def test_where_the_end_is_not_certain_the_next_picture_is_waited_for(tmp_path, kind):
    name, units = encoded(tmp_path / "walk.mp4", kind)
    reader = Reader(name)
    came = [reader.feed(pieces) for pieces in sent(units, name)]
    assert came == [0] + [1] * (len(units) - 1)


def test_without_a_key_frame_nothing_is_proven(tmp_path):
    """Key frames are the largest: they have more slices first."""
    _, units = encoded(tmp_path / "walk.mp4")
    reader = Reader()
    later = [pieces for i, pieces in enumerate(sent(units)) if i % GOP]
    assert len(later) > PROOF_PICTURES
    came = [len(reader.units.add(packet(*each))) for pieces in later for each in pieces]
    assert sum(came) == len(later) - 1
    assert not reader.units.is_proven


def proven(tmp_path, kind="one slice"):
    """A reader past its proof, and the pieces of the pictures that follow, from a key frame on."""
    _, units = encoded(tmp_path / "walk.mp4", kind)
    reader = Reader()
    pictures = sent(units)
    for pieces in pictures[:40]:
        reader.feed(pieces)
    assert reader.units.is_proven
    return reader, pictures[40:]


def test_one_more_slice_tears_the_picture_and_ends_the_haste(tmp_path):
    reader, _ = proven(tmp_path)
    _, units = encoded(tmp_path / "more.mp4", "four slices")
    changed = [[(data, pts + 40 * TICKS) for data, pts in pieces] for pieces in sent(units)]
    assert [reader.feed(pieces) for pieces in changed] == [1, 0] + [1] * (len(units) - 2)
    assert reader.lost == [40 * TICKS]
    reader.end()
    # The decoder marks the torn one; nobody gives the rest of it as another picture.
    assert next(frame.pts for frame in reader.frames if frame.is_corrupt) == 40 * TICKS
    assert len(reader.frames) == 40 + len(units)


def cut_in_two(pieces):
    """A sender that makes two pieces of the second one of a picture."""
    if len(pieces) < 2:
        return pieces
    (first, _), (second, pts), *rest = pieces
    half = len(second) // 2
    return [(first, pts), (second[:half], pts), (second[half:], pts), *rest]


def test_a_sender_with_other_pieces_is_never_believed(tmp_path):
    _, units = encoded(tmp_path / "walk.mp4")
    reader = Reader()
    pictures = [cut_in_two(pieces) if i == 5 else pieces for i, pieces in enumerate(sent(units))]
    came = [reader.feed(pieces) for pieces in pictures]
    assert came == [0] + [1] * (len(units) - 1)
    reader.end()
    assert shown(reader.frames) == expected(tmp_path / "walk.mp4")


def test_a_sender_that_changes_its_pieces_tears_one_picture(tmp_path):
    reader, rest = proven(tmp_path)
    reader.feed(rest[0])
    for pieces in rest[1:]:
        reader.feed(cut_in_two(pieces))
    reader.end()
    torn = rest[1][0][1]
    assert reader.lost == [torn]
    assert not reader.units.is_proven
    assert next(frame for frame in reader.frames if frame.pts == torn).is_corrupt
    assert len(reader.frames) == 50


def test_a_new_setting_of_the_encoder_is_proven_anew(tmp_path):
    reader, rest = proven(tmp_path)
    reader.feed(rest[0])
    assert reader.units.is_proven
    reader.feed([(b"\x00\x00\x00\x01\x67\x42\x00\x0a", rest[1][0][1])])
    assert not reader.units.is_proven


def test_a_lost_end_is_waited_for(tmp_path):
    reader, rest = proven(tmp_path)
    assert reader.feed(rest[0][:-1]) == 0
    assert reader.feed(rest[1]) == 2
    reader.end()
    assert reader.lost == []
    assert next(frame for frame in reader.frames if frame.pts == rest[0][0][1]).is_corrupt


def test_a_lost_beginning_is_told_and_its_rest_left_out(tmp_path):
    reader, rest = proven(tmp_path)
    reader.feed(rest[0])
    reader.feed(rest[1][1:])
    for pieces in rest[2:]:
        reader.feed(pieces)
    reader.end()
    assert reader.lost == [rest[1][0][1]]
    assert [frame.pts for frame in reader.frames] == [i * TICKS for i in range(50) if i != 41]


def test_what_follows_a_picture_goes_with_the_next(tmp_path):
    """Filler data, or the end of a sequence: after the slices, with their time."""
    filler = b"\x00\x00\x00\x01\x0c\xff\xff\x80"
    _, units = encoded(tmp_path / "walk.mp4")
    reader = Reader()
    came = [reader.feed([*pieces, (filler, pieces[0][1])]) for pieces in sent(units)]
    assert came[PROOF_PICTURES + 1 :] == [1] * (len(units) - PROOF_PICTURES - 1)
    reader.end()
    assert reader.lost == []
    assert shown(reader.frames) == expected(tmp_path / "walk.mp4")


def is_head(piece):
    return piece.startswith(b"\x00\x00\x00\x01") and piece[4] & 0x1F in (6, 7, 8)


def test_parameter_sets_with_a_time_of_their_own_belong_to_the_next_picture(tmp_path):
    _, units = encoded(tmp_path / "walk.mp4", "repeated sets")
    reader = Reader()
    for pieces in sent(units):
        reader.feed(
            [
                (data, pts - 7 if data[4] & 0x1F in (6, 7, 8) and data[:3] == b"\0\0\0" else pts)
                for data, pts in pieces
            ]
        )
    reader.end()
    assert shown(reader.frames) == expected(tmp_path / "walk.mp4")


def test_a_clock_that_stands_still_parts_pictures_all_the_same(tmp_path):
    _, units = encoded(tmp_path / "walk.mp4")
    reader = Reader()
    for pieces in sent(units):
        reader.feed([(data, 0) for data, _ in pieces])
    reader.end()
    assert reader.lost == []
    assert [picture for _, picture in shown(reader.frames)] == [
        picture for _, picture in expected(tmp_path / "walk.mp4")
    ]


def test_a_stream_without_pictures_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr("psdiff.runtime.access_units.LONGEST_UNIT", 1000)
    reader = Reader()
    for _ in range(50):
        reader.feed([(b"\x00\x00\x00\x01\x0c" + b"\xff" * 95, 0)])
    pieces = [(b"\x00\x00\x00\x01\x65\x88", TICKS)]
    [unit] = [*reader.units.add(packet(*pieces[0])), *reader.units.rest()]
    assert unit.size < 1200


# Through a real server and FFmpeg's real client ---------------------------------------------------------


class Watcher:
    """Counts the pictures that have begun to pass."""

    def __init__(self):
        self.times = set()

    def __call__(self, channel, data):
        if channel % 2 == 0:
            self.times.add(data[4:8])
        return [(channel, data)]


@pytest.fixture
def camera(serve):
    """Start a camera over a file; gives its address behind a proxy, and the proxy."""
    proxies = []

    def start(path):
        url, _ = serve(path)
        proxies.append(TcpProxy(int(url.rsplit(":", 1)[1])))
        return parse_address(f"rtsp://127.0.0.1:{proxies[-1].port}/{path.stem}"), proxies[-1]

    yield start
    for proxy in proxies:
        proxy.close()


@pytest.mark.parametrize(("decoder", "later"), [("cpu", 0), ("vaapi", 1)])
def test_a_camera_is_seen_before_its_next_picture_is_sent(camera, tmp_path, decoder, later):
    """Not where a device was asked for, even if the CPU takes its place: it might not notice half a picture."""
    encoded(tmp_path / "walk.mp4", count=45)
    address, proxy = camera(tmp_path / "walk.mp4")
    proxy.fault = watcher = Watcher()
    begun = []
    with VideoSource(address, "gate", decoder=decoder) as source:
        for _ in source.decoded():
            begun.append(len(watcher.times) - len(begun) - 1)
    assert len(begun) == 45
    # So many pictures had begun after the one that came.
    assert min(begun[: PROOF_PICTURES - 1]) == 1
    assert np.median(begun[PROOF_PICTURES + 1 :]) == later


def parsed(url):
    """What FFmpeg shows of a camera with its parser."""
    with av.open(url, options={"rtsp_transport": "tcp"}, timeout=(10, 5)) as container:
        container.streams.video[0].thread_type = "NONE"
        return shown(container.decode(video=0))


def seen(url):
    with VideoSource(parse_address(url), "gate") as source:
        return shown(each.frame for each in source.decoded())


def assert_same(urls):
    with ThreadPoolExecutor(2 * len(urls)) as threads:
        ours, theirs = threads.map(seen, urls), threads.map(parsed, urls)
        for url, got, expected in zip(urls, ours, theirs, strict=True):
            assert len(got) == 50, url
            assert got[1:] == expected[1:], url
            # The parser does not know the time of the first.
            assert got[0][1] == expected[0][1], url


def test_cameras_show_the_same_pictures_as_with_the_parser(serve, tmp_path):
    kinds = [kind for kind in KINDS if kind != "hevc"]
    for kind in kinds:
        encoded(tmp_path / f"{kind}.mp4", kind)
    url, _ = serve(*(f"camera{i}={tmp_path / kind}.mp4" for i, kind in enumerate(kinds)))
    assert_same([f"{url}/camera{i}" for i in range(len(kinds))])


@pytest.mark.parametrize(
    ("codec", "tag", "payloader"),
    [("libx265", "hvc1", "rtph265pay"), ("mpeg4", "mp4v", "rtpmp4vpay"), ("mjpeg", "mjpa", "rtpjpegpay")],
)
def test_cameras_of_other_codecs_show_the_same_pictures_as_with_the_parser(
    serve, tmp_path, codec, tag, payloader
):
    path = tmp_path / "walk.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"x265-params": "log-level=none:bframes=0"})
        stream.width, stream.height = 160, 96
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.codec_tag = tag
        for image in pictures(50):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    url, _ = serve(path, options=["--payloader", payloader])
    assert_same([f"{url}/walk"])


def test_a_camera_that_begins_to_send_more_slices_shows_no_torn_picture(camera, tmp_path):
    """The parameter sets do not tell."""
    for kind in ("one slice", "four slices"):
        encoded(tmp_path / f"{kind}.mp4", kind, count=40, fps=25)
    with av.open(str(tmp_path / "both.mp4"), "w") as container:
        stream = None
        for i, kind in enumerate(("one slice", "four slices")):
            with av.open(str(tmp_path / f"{kind}.mp4")) as part:
                source = part.streams.video[0]
                stream = stream or container.add_stream_from_template(source)
                for each in part.demux(source):
                    if each.size:
                        each.pts = each.dts = round(
                            (each.pts * each.time_base + i * 40 / 25) / each.time_base
                        )
                        each.stream = stream
                        container.mux(each)
    clean = {
        picture for kind in ("one slice", "four slices") for _, picture in expected(tmp_path / f"{kind}.mp4")
    }
    address, _ = camera(tmp_path / "both.mp4")
    with VideoSource(address, "gate") as source:
        decoded = list(source.decoded())
        assert source.corrupt_packets >= 1
    whole = [each for each in decoded if not each.is_damaged]
    assert {picture for _, picture in shown(each.frame for each in whole)} <= clean
    # From the torn key frame to the next.
    assert len(decoded) - len(whole) == GOP
