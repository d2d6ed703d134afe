"""A camera of a site behind a real RTSP server: frames with their time, and every way in which they stop."""

import random
import threading
import time

import pytest
from conftest import walk, write_video
from psdiff.runtime.camera_feed import CameraFeed, FeedSettings
from psdiff.runtime.connection import HostLimit
from psdiff.runtime.frame_queues import FrameQueues, QueuePolicy
from psdiff.runtime.soak.clips import is_in_place, person_in, write_clip
from psdiff.runtime.soak.rtp_faults import FlippedBytes
from psdiff.runtime.soak.tcp_proxy import TcpProxy
from triton_server import free_ports

FPS = 30


@pytest.fixture(scope="module")
def camera_file(tmp_path_factory):
    """Twenty seconds; the server plays it from its start to everyone who comes."""
    path = tmp_path_factory.mktemp("camera") / "gate.mp4"
    return write_video(path, walk(20 * FPS, start=-1000), fps=FPS, options={"crf": "30", "g": "5", "bf": "0"})


@pytest.fixture
def follow():
    """Start feeds that are stopped at the end; gives the feed and the queues that it fills."""
    feeds = []

    def start(url, **options):
        queues = FrameQueues(8, 0.0)
        queues.add("gate", QueuePolicy(depth=1000, max_staleness_s=1000), time.monotonic())
        # So much time is promised that nothing is ever too late.
        options = {"latency_s": 1000.0} | options

        def offer(frame, now_s, deadline_s):
            taken = queues.offer("gate", frame, now_s=now_s, deadline_s=deadline_s)
            return None if taken else "removed"

        feed = CameraFeed(FeedSettings("gate", url, **options), offer, HostLimit())
        feed.start()
        feeds.append(feed)
        return feed, queues

    yield start
    for feed in feeds:
        feed.stop()
    for feed in feeds:
        assert feed.join(10), "the thread of a camera did not end"


def wait_for(condition, seconds=15.0):
    """Seconds until the condition held."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not happen in time"
        time.sleep(0.01)
    return time.monotonic() - began


def is_streaming(feed):
    return lambda: feed.status()["state"] == "streaming"


def port_of(url):
    return int(url.rpartition(":")[2])


def test_frames_are_dated_by_the_camera_once_it_has_told_its_clock(serve, camera_file, follow):
    url, _ = serve(camera_file)
    feed, queues = follow(f"{url}/gate")
    frames = []

    def told():
        frames.extend(waiting.content for waiting in queues.take(time.monotonic()))
        return frames and frames[-1].time.source == "rtcp_sr"

    wait_for(told)
    assert frames[0].time.source == "arrival"
    assert [frame.seq for frame in frames] == list(range(len(frames)))
    times = [frame.time.utc_s for frame in frames]
    assert times == sorted(times)
    assert all(time.time() - 20 < utc_s < time.time() for utc_s in times)
    assert abs(feed.status()["clock_offset_s"]) < 0.5  # one clock on both sides
    assert frames[0].image.shape == (96, 160, 3)


def test_every_frame_is_accounted_for(serve, camera_file, follow):
    url, _ = serve(camera_file)
    feed, queues = follow(f"{url}/gate", sample_fps=5)
    wait_for(lambda: feed.status()["decoded"] >= 3 * FPS)
    feed.stop()
    assert feed.join(5)
    status, account = feed.status(), queues.account("gate")
    assert status["decoded"] == account.offered + sum(status["skipped"].values())
    assert 14 <= account.offered <= 18  # five a second, for three seconds and a bit
    assert status["state"] == "disabled"


def test_a_deadline_is_the_promise_after_the_capture_or_the_arrival(serve, camera_file, follow):
    url, _ = serve(camera_file)
    _, queues = follow(f"{url}/gate", latency_s=30.0)
    wait_for(lambda: queues.waiting("gate") > 5)
    for waiting in queues.take(time.monotonic()):
        # The camera has not told its clock yet: what it took to get here is not known.
        assert waiting.content.time.source == "arrival"
        assert waiting.deadline_s - waiting.since_s == pytest.approx(30.0)


def test_a_camera_that_is_not_there_at_the_start_is_waited_for(serve, camera_file, follow):
    [port] = free_ports(1)
    feed, _ = follow(f"rtsp://127.0.0.1:{port}/gate")
    wait_for(lambda: feed.status()["reason"] == "refused")
    assert feed.status()["state"] == "backoff"
    assert feed.status()["offline_s"] >= 0
    time.sleep(2)
    serve(camera_file, port=port)
    assert wait_for(is_streaming(feed)) < 10
    assert feed.status()["offline_s"] is None


def test_a_server_that_dies_and_comes_back_is_followed_again(serve, camera_file, follow):
    url, process = serve(camera_file)
    feed, queues = follow(f"{url}/gate")
    wait_for(is_streaming(feed))
    process.kill()
    wait_for(lambda: feed.status()["state"] == "backoff")
    assert feed.status()["offline_s"] >= 0
    time.sleep(2)
    before = queues.account("gate").offered
    serve(camera_file, port=port_of(url))
    assert wait_for(is_streaming(feed)) < 10
    wait_for(lambda: queues.account("gate").offered > before + 5)
    connections = {waiting.content.connection for waiting in drained(queues)}
    assert connections == {1, 2}


def drained(queues):
    frames = []
    while batch := queues.take(time.monotonic()):
        frames += batch
    return frames


def test_a_stall_is_seen_in_three_seconds_and_over_when_the_network_is_back(serve, camera_file, follow):
    url, _ = serve(camera_file)
    proxy = TcpProxy(port_of(url))
    feed, _ = follow(f"rtsp://127.0.0.1:{proxy.port}/gate")
    wait_for(is_streaming(feed))
    time.sleep(0.5)
    proxy.stall()
    assert wait_for(lambda: feed.status()["state"] == "stalled") < 3
    wait_for(lambda: feed.status()["reason"] == "timeout")
    proxy.flow()
    assert wait_for(is_streaming(feed), 20) < 15
    assert feed.status()["reconnects"]["timeout"] >= 1
    proxy.close()


def test_a_cut_connection_is_made_again(serve, camera_file, follow):
    url, _ = serve(camera_file)
    proxy = TcpProxy(port_of(url))
    feed, _ = follow(f"rtsp://127.0.0.1:{proxy.port}/gate")
    for _ in range(3):
        wait_for(is_streaming(feed))
        proxy.cut()
        wait_for(lambda: feed.status()["state"] != "streaming")
    assert wait_for(is_streaming(feed)) < 10
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("camera gate")]
    assert len(threads) == 1
    proxy.close()


def test_a_wrong_password_is_not_tried_again_and_again(serve, camera_file, follow, caplog):
    url, _ = serve(camera_file, options=["--login", "user:right"])
    feed, _ = follow(f"rtsp://user:topsecret@127.0.0.1:{port_of(url)}/gate")
    wait_for(lambda: feed.status()["state"] == "backoff")
    status = feed.status()
    assert status["reason"] == "auth_failed"
    assert status["retry_in_s"] > 200
    assert "topsecret" not in str(status) + caplog.text


def test_a_stream_that_the_camera_does_not_have_is_not_found(serve, camera_file, follow):
    url, _ = serve(camera_file)
    feed, _ = follow(f"{url}/attic")
    wait_for(lambda: feed.status()["state"] == "backoff")
    assert (feed.status()["reason"], feed.status()["retry_in_s"] > 200) == ("not_found", True)


def test_a_camera_that_is_stopped_while_it_waits_ends_at_once(follow):
    feed, _ = follow(f"rtsp://127.0.0.1:{free_ports(1)[0]}/gate")
    wait_for(lambda: feed.status()["state"] == "backoff")
    feed.stop()
    began = time.monotonic()
    assert feed.join(2)
    assert time.monotonic() - began < 1


def test_what_is_predicted_from_a_damaged_picture_is_not_looked_at(serve, tmp_path, follow):
    """Of the pictures that are offered, those without the person where it can be are smeared."""
    clip = write_clip(tmp_path / "gate.mp4", seconds=10)
    url, _ = serve(clip, options=["--in-band"])
    proxy = TcpProxy(port_of(url))
    proxy.fault = flips = FlippedBytes(random.Random(0), 0.05)
    feed, queues = follow(f"rtsp://127.0.0.1:{proxy.port}/gate")
    wait_for(lambda: feed.status()["skipped"].get("corrupt", 0) > 5 and flips.flipped > 5, 30)
    frames = [waiting.content for waiting in drained(queues)]
    smeared = [
        frame.seq
        for frame in frames
        if (box := person_in(frame.image)) is None or not is_in_place(box, 640, 360)
    ]
    assert len(smeared) <= 0.15 * len(frames), f"{smeared} of {len(frames)}"
    assert feed.status()["corrupt_packets"] > 0
    proxy.close()
