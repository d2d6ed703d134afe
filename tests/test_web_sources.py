"""Cameras and recordings over HTTP, from a real web server; what a playlist may not reach."""

import time

import av
import pytest
from conftest import walk, write_video
from psdiff.runtime.camera_feed import CameraFeed, FeedSettings
from psdiff.runtime.connection import HostLimit
from psdiff.runtime.containers import CameraError
from psdiff.runtime.frame_queues import FrameQueues, QueuePolicy
from psdiff.runtime.frames import SourceError
from psdiff.runtime.live_source import LiveSource
from psdiff.runtime.soak.tcp_proxy import TcpProxy
from psdiff.runtime.source_address import parse_address
from psdiff.runtime.sources import open_source
from psdiff.runtime.video import VideoSource
from web_server import WebServer

PLAYLIST = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\n{segment}\n#EXT-X-ENDLIST\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """clip.mp4 of three seconds, the same as HLS in three segments, and playlists that reach for other things."""
    folder = tmp_path_factory.mktemp("web")
    write_video(folder / "clip.mp4", walk(30), fps=10)
    options = {"hls_time": "1", "hls_list_size": "0"}
    with av.open(str(folder / "vod.m3u8"), "w", format="hls", options=options) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "10", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for image in walk(30):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    text = (folder / "vod.m3u8").read_text()
    assert text.endswith("#EXT-X-ENDLIST\n")
    (folder / "live.m3u8").write_text(text.removesuffix("#EXT-X-ENDLIST\n"))
    (folder / "file.m3u8").write_text(PLAYLIST.format(segment=f"file://{folder}/vod0.ts"))
    (folder / "concat.m3u8").write_text(PLAYLIST.format(segment=f"concat:file:{folder}/vod0.ts"))
    (folder / "udp.m3u8").write_text(PLAYLIST.format(segment="udp://127.0.0.1:9/a.ts"))
    # The text of a script that names another video, served as a video.
    (folder / "script.mp4").write_text("ffconcat version 1.0\nfile clip.mp4\n")
    return folder


@pytest.fixture
def web(folder):
    servers = []

    def start(frames=(), port=0):
        servers.append(WebServer(folder, frames, port))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def opened(url):
    return VideoSource(parse_address(url), "web", open_timeout_s=5, read_timeout_s=3)


@pytest.mark.parametrize("name", ["clip.mp4", "vod.m3u8"])
def test_a_recording_is_read_to_its_last_frame(web, name):
    with open_source(f"{web().url}/{name}") as source:
        assert isinstance(source, VideoSource), "a recording waits for its reader"
        frames = list(source)
    assert [frame.seq for frame in frames] == list(range(30))
    assert frames[-1].pts_s == pytest.approx(2.9)
    assert frames[-1].image[40, 76].max() > 170, "the person at the end of the walk"


def test_a_playlist_without_an_end_is_live(web):
    server = web()
    source = opened(f"{server.url}/live.m3u8")
    assert source.is_live
    assert source.comes_in_segments
    source.close()


def test_jpegs_over_http_are_live_and_have_no_timestamps(web):
    with open_source(f"{web(walk(8)).url}/mjpeg", read_timeout_s=3) as source:
        assert isinstance(source, LiveSource)
        frames = []
        with pytest.raises(SourceError, match="source must stay readable to its end"):
            frames.extend(iter(source))
    assert source.frames_decoded == 8
    with open_source(f"{web(walk(8)).url}/mjpeg", read_timeout_s=3) as source:
        first = next(iter(source))
    assert (first.pts_s, first.time_source) == (None, "arrival")


@pytest.mark.parametrize("name", ["file.m3u8", "concat.m3u8", "udp.m3u8"])
def test_a_playlist_reaches_nothing_but_http(web, name):
    with pytest.raises(CameraError, match="source must be a camera that answers, got 'invalid data"):
        opened(f"{web().url}/{name}")


def test_a_script_in_the_place_of_a_video_is_refused(web, folder):
    server = web()
    with pytest.raises(CameraError, match="a format that is not allowed") as caught:
        opened(f"{server.url}/script.mp4")
    assert caught.value.reason == "unsupported"
    assert "/clip.mp4" not in server.asked
    for path in (folder / "script.mp4", folder / "vod.m3u8"):
        with pytest.raises(SourceError, match="source must be a video, got a format that is not allowed"):
            open_source(str(path))


def test_a_redirect_is_not_followed(web):
    server = web()
    with pytest.raises(CameraError, match="source must be a camera that answers"):
        opened(f"{server.url}/moved")
    assert "/clip.mp4" not in server.asked


@pytest.mark.parametrize(("path", "reason"), [("locked", "auth_failed"), ("none.mp4", "not_found")])
def test_refusals_of_the_server_are_told_apart(web, path, reason):
    with pytest.raises(CameraError) as caught:
        opened(web().url.replace("//", "//u:topsecret@") + f"/{path}")
    assert caught.value.reason == reason
    assert "topsecret" not in str(caught.value)


# As a camera of a site -----------------------------------------------------------------------------------


@pytest.fixture
def follow():
    feeds = []

    def start(url):
        queues = FrameQueues(8, 0.0)
        queues.add("web", QueuePolicy(depth=1000, max_staleness_s=1000), time.monotonic())

        def offer(frame, now_s, deadline_s):
            taken = queues.offer("web", frame, now_s=now_s, deadline_s=deadline_s)
            return None if taken else "removed"

        feed = CameraFeed(FeedSettings("web", url, latency_s=1000.0), offer, HostLimit())
        feed.start()
        feeds.append(feed)
        return feed, queues

    yield start
    for feed in feeds:
        feed.stop()
    for feed in feeds:
        assert feed.join(10)


def wait_for(condition, seconds=20.0):
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.02)


def test_a_camera_over_http_is_connected_again(web, follow):
    server = web(walk(3000))
    feed, queues = follow(f"{server.url}/mjpeg")
    wait_for(lambda: feed.status()["decoded"] >= 3)
    server.close()
    wait_for(lambda: feed.status()["state"] == "backoff")
    before = feed.status()["decoded"]
    web(walk(3000), port=server.port)
    wait_for(lambda: feed.status()["state"] == "streaming" and feed.status()["decoded"] >= before + 3)
    assert {waiting.content.connection for waiting in queues.take(time.monotonic())} >= {1}


def test_a_recording_over_http_is_played_once_in_its_own_time(web, follow):
    began = time.monotonic()
    feed, queues = follow(f"{web().url}/vod.m3u8")
    wait_for(lambda: feed.status()["state"] == "ended")
    assert time.monotonic() - began > 2.5
    assert queues.account("web").offered == feed.status()["decoded"] == 30
    assert feed.status()["reconnects"] == {}


def test_a_live_playlist_is_spread_over_its_time_and_says_that_it_is_late(web, follow):
    feed, queues = follow(f"{web().url}/live.m3u8")
    wait_for(lambda: feed.status()["decoded"] >= 10)
    frames = [waiting.content for waiting in queues.take(time.monotonic())]
    assert all(frame.time.uncertainty_s > 30 for frame in frames)
    # Its last frame lies 0.7 s after the first: in a burst they would all arrive at once.
    times = [frame.time.utc_s for frame in frames]
    assert times[-1] - times[0] > 0.5


def test_a_camera_over_http_that_falls_silent_is_a_timeout(web, follow):
    proxy = TcpProxy(web(walk(3000)).port)
    feed, _ = follow(f"http://127.0.0.1:{proxy.port}/mjpeg")
    wait_for(lambda: feed.status()["decoded"] >= 3)
    proxy.stall()
    wait_for(lambda: feed.status()["state"] in ("stalled", "backoff"))
    wait_for(lambda: feed.status()["reason"] == "timeout")
    proxy.flow()
    wait_for(lambda: feed.status()["state"] == "streaming")
    proxy.close()
