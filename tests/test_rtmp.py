"""Addresses, messages and chunks; no network."""

from __future__ import annotations

import pickle
import random
import struct

import pytest

from voipavatar.errors import ConfigError, TransportError
from voipavatar.rtmp import (
    CHUNK_SIZE,
    ChunkReader,
    Packet,
    StreamUrl,
    amf_decode,
    amf_encode,
    avc_configuration,
    chunked,
    nal_units,
    video_tag,
)

KEY = "s3cr-et55-key0"


@pytest.mark.parametrize(
    ("text", "shown", "app", "key", "port"),
    [
        (f"rtmp://h.test/live/{KEY}", "rtmp://h.test:1935/live/****", "live", KEY, 1935),
        (f"rtmp://h.test:99/a/b/{KEY}", "rtmp://h.test:99/a/b/****", "a/b", KEY, 99),
        (f"rtmps://h.test/app/{KEY}", "rtmps://h.test:443/app/****", "app", KEY, 443),
        (
            f"rtmp://h.test/app/{KEY}?token=abcdefgh",
            "rtmp://h.test:1935/app/****",
            "app",
            f"{KEY}?token=abcdefgh",
            1935,
        ),
        (
            f"youtube://{KEY}",
            "rtmps://a.rtmps.youtube.com:443/live2/****",
            "live2",
            KEY,
            443,
        ),
    ],
)
def test_an_address_is_read_and_never_shows_its_key(
    text: str, shown: str, app: str, key: str, port: int
) -> None:
    url = StreamUrl.parse(text)
    assert (str(url), url.app, url.key, url.port) == (shown, app, key, port)
    for view in (repr(url), str(url), f"{url}", repr([url]), repr({"url": url})):
        assert KEY not in view and "abcdefgh" not in view
    said = url.scrub(f"stream {key} and {KEY} are already publishing")
    assert KEY not in said and "abcdefgh" not in said
    assert pickle.loads(pickle.dumps(url)) == url


def test_a_short_key_is_masked_as_a_word() -> None:
    url = StreamUrl.parse("rtmp://h.test/live/one")
    said = url.scrub("rtmp://h.test/live/one is gone: one, 'one' and one?x")
    assert said == "rtmp://h.test/live/**** is gone: ****, '****' and ****?x"


def test_srt_and_files() -> None:
    url = StreamUrl.parse(f"srt://h.test:9000?streamid={KEY}&mode=caller&passphrase=abcdefghij")
    assert (url.kind, url.host, url.port) == ("srt", "h.test", 9000)
    assert KEY not in repr(url) + str(url) and KEY not in url.scrub(url.reveal())
    assert StreamUrl.parse("file:/tmp/a.mkv").path == StreamUrl.parse("/tmp/a.mkv").path


@pytest.mark.parametrize(
    "text",
    [
        f"rtmp://h.test/{KEY}",
        f"rtmp:///live/{KEY}",
        f"http://h.test/live/{KEY}",
        f"rtmp://h.test:notaport/live/{KEY}",
        f"srt://h.test?streamid={KEY}",
        "clip.webm",
        "",
    ],
)
def test_a_bad_address_is_refused_without_repeating_its_key(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        StreamUrl.parse(text)
    assert KEY not in str(caught.value)


def test_amf_there_and_back() -> None:
    values = ["connect", 1.0, {"app": "live", "ok": True, "deep": {"x": None}}, None, "größe"]
    assert amf_decode(amf_encode(*values)) == values


@pytest.mark.parametrize(
    "data", [b"\x02\x00\x09ab", b"\x00\x01", b"\x42", b"\x03\x00\x01a", b"\x03" * 99]
)
def test_what_is_not_amf_is_a_transport_error(data: bytes) -> None:
    with pytest.raises(TransportError, match="not RTMP"):
        amf_decode(data)


@pytest.mark.parametrize("timestamp", [0, 0xFFFFFE, 0xFFFFFF, 0x1000000, 0xFFFFFFFF, 1 << 32])
@pytest.mark.parametrize("size", [0, 1, CHUNK_SIZE, CHUNK_SIZE + 1, 3 * CHUNK_SIZE + 5])
def test_chunks_are_read_as_they_were_written(timestamp: int, size: int) -> None:
    body = random.Random(size).randbytes(size)
    reader = ChunkReader()
    data = chunked(2, 1, 0, 0, struct.pack(">I", CHUNK_SIZE)) + chunked(6, 9, timestamp, 1, body)
    data += chunked(4, 8, timestamp, 1, b"after")
    got, cut = [], random.Random(1)
    while data:
        take = cut.randint(1, 700)
        got += reader.feed(data[:take])
        data = data[take:]
    assert got == [(1, struct.pack(">I", CHUNK_SIZE)), (9, body), (8, b"after")]


def test_extended_timestamps_are_repeated_in_each_chunk() -> None:
    data = chunked(6, 9, 0x01020304, 1, bytes(CHUNK_SIZE + 10))
    assert data[1:4] == b"\xff\xff\xff" and data[12:16] == b"\x01\x02\x03\x04"
    second = data[16 + CHUNK_SIZE :]
    assert second[0] == 0xC6 and second[1:5] == b"\x01\x02\x03\x04" and len(second) == 15


def test_garbage_from_a_server_ends_in_an_error_or_in_nothing() -> None:
    for seed in range(300):
        reader = ChunkReader()
        noise = random.Random(seed).randbytes(2_000)
        try:
            for _, body in reader.feed(noise):
                assert len(body) <= ChunkReader.LIMIT
        except TransportError:
            pass


def test_annex_b_becomes_what_flv_holds() -> None:
    sps, pps, idr = b"\x67\x64\x00\x1f\xac", b"\x68\xef\x38", b"\x65" + bytes(range(1, 40))
    stream = b"\0\0\0\1" + sps + b"\0\0\0\1" + pps + b"\0\0\1" + idr
    assert nal_units(stream) == [sps, pps, idr]
    record = avc_configuration(stream)
    assert record[:6] == b"\x01\x64\x00\x1f\xff\xe1" and record.endswith(b"\xfd\xf8\xf8\x00")
    tag = video_tag(Packet("video", 0, 25, b"\0\0\1" + idr, True))
    assert tag == b"\x17\x01\0\0\0" + struct.pack(">I", len(idr)) + idr


def test_milliseconds_stay_on_the_grid_for_years() -> None:
    day = 24 * 3600
    for days in (1, 50, 400):
        video = Packet("video", days * day * 30, 30, b"")
        audio = Packet("audio", days * day * 48_000, 48_000, b"")
        assert video.milliseconds == audio.milliseconds == days * day * 1000
