"""Decode a video with PyNvVideoCodec on whatever driver the loader finds, and tell what came as JSON.

python nvidia_on_stand_in.py door VIDEO    the decoder alone: per packet its frames, and whether they repeat its bytes
python nvidia_on_stand_in.py stream VIDEO  the decoder as a camera has it, with the CPU behind it
"""

import json
import logging
import sys

import av
import numpy as np
from psdiff.runtime.bit_stream import BitStream
from psdiff.runtime.decoders import StreamDecoder, probe_decoders
from psdiff.runtime.device_decoder import DeviceError
from psdiff.runtime.nvidia_decoder import NvidiaDecoder


def repeats(plane, width, payload, invert):
    """Whether a plane's pixels are the bytes of a packet, again and again, from the place on that invert tells."""
    pixels = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, :width].ravel()
    expected = np.resize(np.frombuffer(payload, np.uint8), invert + pixels.size)[invert:]
    return bool(np.array_equal(pixels, 255 - expected if invert else expected))


def door(stream):
    decoder, bits, payloads, packets = NvidiaDecoder(stream), BitStream(stream), {}, []
    for packet in stream.container.demux(stream):
        if packet.size:
            payloads |= {payload.time: payload.data for payload in bits.payloads(packet)}
        frames = []
        for frame in decoder.decode(packet if packet.size else None):
            luma, chroma = frame.planes
            size, payload = frame.width * frame.height, payloads[frame.pts]
            is_right = repeats(luma, frame.width, payload, 0) and repeats(chroma, frame.width, payload, size)
            frames.append([frame.pts, frame.key_frame, is_right])
        packets.append([packet.pts, frames])
    decoder.close()
    return packets


def camera(stream):
    decoder, times = StreamDecoder(stream, "pynvvideocodec"), []
    first = decoder.name
    for packet in stream.container.demux(stream):
        times += [frame.pts for frame in decoder.decode(packet if packet.size else None)]
    decoder.close()
    return {"first": first, "last": decoder.name, "times": times}


def main():
    logging.basicConfig(stream=sys.stderr)
    report = {"found": [probe_decoders()[0].is_usable, probe_decoders()[0].reason]}
    with av.open(sys.argv[2]) as container:
        try:
            report["decoded"] = {"door": door, "stream": camera}[sys.argv[1]](container.streams.video[0])
        except DeviceError as error:
            report["error"] = str(error)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
