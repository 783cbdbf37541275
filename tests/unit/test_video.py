"""Reading real files: the right frames by time, and a reason in words for every file that cannot be used."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
import pytest
import torch

from fvtitan.data.video import (
    MAX_READ_SECONDS,
    Isolated,
    VideoError,
    VideoLimits,
    probe_video,
    read_all_frames,
    read_first_frame,
    read_video,
    write_video,
)
from fvtitan.errors import UserError

SIZE = {"height": 32, "width": 32}


def ramp(count: int, height: int = 32, width: int = 32, step: int = 3) -> torch.Tensor:
    """Frame k is grey of level 10 + step k."""
    levels = 10 + step * torch.arange(count)
    return levels[:, None, None, None].expand(-1, height, width, 3).to(torch.uint8).contiguous()


def levels(frames: torch.Tensor, step: int = 3) -> list[int]:
    return [round((float(frame.float().mean()) - 10) / step) for frame in frames]


def write_vfr(path, times: list[float]) -> None:
    """Frame k is shown from times[k] on."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "10"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for time, image in zip(times, ramp(len(times)).numpy(), strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_write_and_read_back(tmp_path):
    write_video(tmp_path / "a.mp4", ramp(20), fps=16)
    frames = read_all_frames(tmp_path / "a.mp4")
    assert frames.shape == (20, 32, 32, 3) and frames.dtype == torch.uint8 and levels(frames) == list(range(20))
    info = probe_video(tmp_path / "a.mp4")
    assert (info.width, info.height, info.num_frames) == (32, 32, 20)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]  # no temporary file stays
    with pytest.raises(ValueError, match="even sizes"):
        write_video(tmp_path / "b.mp4", ramp(2, 31, 32), fps=16)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("source_fps", "expected"),
    [
        (16, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (32, [0, 2, 4, 6, 8, 10, 12, 14, 16]),
        (8, [0, 0, 1, 1, 2, 2, 3, 3, 4]),
        (24, [0, 1, 3, 4, 6, 7, 9, 10, 12]),  # the frame on screen at k / 16 s
    ],
)
def test_resampling_takes_the_frame_on_screen(tmp_path, source_fps, expected):
    """Fault 28."""
    write_video(tmp_path / "a.mp4", ramp(30), fps=source_fps)
    assert levels(read_video(tmp_path / "a.mp4", num_frames=9, fps=16, **SIZE)) == expected


def test_variable_frame_rate(tmp_path):
    times = [0.0, 0.05, 0.30, 0.31, 0.32, 0.50]
    write_vfr(tmp_path / "a.mp4", times)
    expected = [max(k for k, t in enumerate(times) if t <= i / 16 + 1e-3) for i in range(9)]
    assert levels(read_video(tmp_path / "a.mp4", num_frames=9, fps=16, **SIZE)) == expected


@pytest.mark.parametrize("fps", [16, 30])
@pytest.mark.parametrize("delay", [0.0, 0.0104])
def test_millisecond_time_stamps(tmp_path, fps, delay):
    # Matroska rounds to milliseconds, the start too: that must not make a frame late for its own slot.
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10000)
        for k, image in enumerate(ramp(33).numpy()):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(10000 * (delay + k / fps)), Fraction(1, 10000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert levels(read_video(tmp_path / "a.mkv", num_frames=33, fps=fps, **SIZE)) == list(range(33))


@pytest.mark.parametrize(("name", "codec"), [("a.avi", "mpeg4"), ("a.webm", "libvpx-vp9"), ("a.mov", "libx264")])
def test_other_containers(tmp_path, name, codec):
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=16)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for image in ramp(12, step=9).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    assert levels(read_video(tmp_path / name, num_frames=9, fps=16, **SIZE), step=9) == list(range(9))
    info = probe_video(tmp_path / name)
    assert info.num_frames == 12 and info.seconds == pytest.approx(0.75, abs=0.07)


# The 16.16 matrix of an mp4 track header: (a, b, c, d), as phones write it.
@pytest.mark.parametrize(
    ("matrix", "side"), [((0, 1, -1, 0), "top"), ((0, -1, 1, 0), "bottom"), ((-1, 0, 0, -1), "right")]
)
def test_rotation_metadata_is_honoured(tmp_path, matrix, side):
    frames = ramp(5, 32, 64, step=0)
    frames[:, :, :32] = 240  # bright on the left as stored
    write_video(tmp_path / "a.mp4", frames, fps=16)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    start = content.index(b"tkhd") + 4 + 4 + 20 + 16  # version and flags, times and ids, layer to volume
    identity = b"".join(v.to_bytes(4, "big", signed=True) for v in (0x10000, 0, 0, 0, 0x10000))
    assert content[start : start + 20] == identity
    a, b, c, d = (0x10000 * v for v in matrix)
    content[start : start + 20] = b"".join(v.to_bytes(4, "big", signed=True) for v in (a, b, 0, c, d))
    (tmp_path / "a.mp4").write_bytes(content)
    shape = (32, 64) if side == "right" else (64, 32)
    read = read_video(tmp_path / "a.mp4", num_frames=5, fps=16, height=shape[0], width=shape[1])
    assert read.shape == (5, *shape, 3)
    halves = {"top": read[:, :28], "bottom": read[:, -28:], "right": read[:, :, -28:]}
    assert float(halves[side].float().mean()) > 220 and float(read.float().mean()) < 140
    assert read_all_frames(tmp_path / "a.mp4").shape == (5, *shape, 3)


@pytest.mark.faults
def test_resize_covers_and_crops_the_centre(tmp_path):
    """Fault 28."""
    frames = ramp(5, 64, 128, step=0)
    frames[:, :, :32], frames[:, :, 96:] = 250, 250  # the sides, which a square crop leaves out
    write_video(tmp_path / "wide.mp4", frames, fps=16)
    read = read_video(tmp_path / "wide.mp4", num_frames=5, fps=16, **SIZE)
    assert read.shape == (5, 32, 32, 3) and float(read[:, :, 3:-3].float().max()) < 40
    write_video(tmp_path / "tall.mp4", frames.transpose(1, 2).contiguous(), fps=16)
    read = read_video(tmp_path / "tall.mp4", num_frames=5, fps=16, **SIZE)
    assert read.shape == (5, 32, 32, 3) and float(read[:, 3:-3].float().max()) < 40
    write_video(tmp_path / "odd.mp4", ramp(5, 50, 38), fps=16)
    assert read_video(tmp_path / "odd.mp4", num_frames=5, fps=16, **SIZE).shape == (5, 32, 32, 3)


def write_stream(
    path, codec: str, frames: torch.Tensor, fps: int = 16, *, aspect: int = 1, turn: int = 0, **options: str
) -> None:
    """Any container and codec; stored pixels `aspect` times as wide as high, shown turned by `turn` degrees."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        if turn:
            stream.set_display_rotation(turn)
        for image in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"bf": "3", "g": "12"}),
        ("a.mp4", "libx264", {"bf": "3", "g": "12", "b_strategy": "0", "x264-params": "open-gop=1"}),
        ("a.mkv", "libx264", {"bf": "3", "g": "7"}),
        ("a.avi", "libx264", {"bf": "3", "b_strategy": "0"}),  # its time stamps are not those of presentation
        ("a.ts", "libx264", {"bf": "3", "g": "12"}),
        ("a.mpg", "mpeg2video", {"bf": "2"}),
        ("a.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
        ("a.webm", "libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16"}),
        ("a.gif", "gif", {}),
    ],
)
def test_later_spans_are_those_of_a_whole_reading(tmp_path, name, codec, options):
    frames = ramp(80, step=1)
    frames[:, 8:24, 4:20] += 60
    frames = torch.stack([torch.roll(image, k, 1) for k, image in enumerate(frames)])  # B frames are for what moves
    if codec == "gif":
        write_gif(tmp_path / name, frames)
    else:
        write_stream(tmp_path / name, codec, frames, fps=25, **options)
    whole, info = read_all_frames(tmp_path / name), probe_video(tmp_path / name)
    on_screen = info.frames_at(16)
    assert info.num_frames == len(whole) == 80 and len(on_screen) >= 51 and on_screen[-1] >= 78
    for start in (0, 9, 23, len(on_screen) - 17):
        read = read_video(tmp_path / name, num_frames=17, fps=16, start=start, **SIZE)
        assert torch.equal(read, whole[on_screen[start : start + 17]])
    with pytest.raises(VideoError, match="too short: 16 frames at 16 fps, 17 are needed"):
        read_video(tmp_path / name, num_frames=17, fps=16, start=len(on_screen) - 16, **SIZE)


def write_gif(path, frames: torch.Tensor) -> None:
    """At 16.67 fps: its clock counts in hundredths."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames.numpy()]
    images[0].save(path, save_all=True, append_images=images[1:], duration=60)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_size_as_shown(tmp_path, name):
    frames = ramp(5, 32, 64, step=0)
    frames[:, :, :16], frames[:, :, 48:] = 250, 250
    write_stream(tmp_path / name, "libx264", frames, turn=90, crf="8")
    info = probe_video(tmp_path / name)
    assert (info.width, info.height, info.rotation) == (32, 64, 90)
    assert read_first_frame(tmp_path / name).shape == (64, 32, 3)
    write_stream(tmp_path / name, "libx264", frames, aspect=2, crf="8")
    info = probe_video(tmp_path / name)
    assert (info.width, info.height, info.pixel_aspect) == (128, 32, 2.0)
    # Shown 128 wide, the bright sides are 32 wide each: a crop of 64 leaves them out, one of 80 does not.
    for width, dark in ((64, True), (80, False)):
        read = read_video(tmp_path / name, num_frames=5, fps=16, height=32, width=width).float()
        assert read.shape == (5, 32, width, 3) and (float(read[:, :, 2:-2].max()) < 60) == dark
    write_stream(tmp_path / name, "libx264", frames, aspect=2, turn=270, crf="8")
    info = probe_video(tmp_path / name)
    assert (info.width, info.height, info.rotation) == (32, 128, 270)
    assert float(read_video(tmp_path / name, num_frames=5, fps=16, height=64, width=32)[:, 2:-2].float().max()) < 60


def test_what_an_edit_list_hides_is_not_there(tmp_path):
    """A phone's trimmed clip holds more packets than it shows, at both ends."""
    write_stream(tmp_path / "a.mp4", "libx264", ramp(40), g="40", bf="3", b_strategy="0")
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    entry = content.index(b"elst") + 12  # of the only edit: duration in ms, beginning in 1/16384 s
    duration, begin = (int.from_bytes(content[entry + i : entry + i + 4], "big") for i in (0, 4))
    content[entry : entry + 8] = (duration // 2).to_bytes(4, "big") + (begin + 10 * 1024).to_bytes(4, "big")
    (tmp_path / "a.mp4").write_bytes(content)
    assert levels(read_all_frames(tmp_path / "a.mp4")) == list(range(10, 30))
    assert probe_video(tmp_path / "a.mp4").num_frames == 20
    assert levels(read_video(tmp_path / "a.mp4", num_frames=9, fps=16, start=4, **SIZE)) == list(range(14, 23))


def test_a_picture_is_a_video_of_one_frame(tmp_path):
    write_video(tmp_path / "a.mp4", ramp(1), fps=16)
    assert read_video(tmp_path / "a.mp4", num_frames=1, fps=16, **SIZE).shape == (1, 32, 32, 3)
    with pytest.raises(VideoError, match="too short: 1 frames at 16 fps, 5 are needed"):
        read_video(tmp_path / "a.mp4", num_frames=5, fps=16, **SIZE)


@pytest.mark.faults
def test_too_short_says_both_counts(tmp_path):
    """Fault 28."""
    write_video(tmp_path / "a.mp4", ramp(20), fps=30)
    with pytest.raises(VideoError, match="too short: 11 frames at 16 fps, 33 are needed"):
        read_video(tmp_path / "a.mp4", num_frames=33, fps=16, **SIZE)
    write_video(tmp_path / "b.mp4", ramp(9), fps=16)
    assert len(read_video(tmp_path / "b.mp4", num_frames=9, fps=16, **SIZE)) == 9  # just long enough


@pytest.mark.faults
def test_unusable_files_have_a_reason(tmp_path):
    """Fault 28."""
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is not a video")
    write_video(
        tmp_path / "whole.mp4",
        torch.from_numpy(np.random.RandomState(0).randint(0, 255, (60, 32, 32, 3), np.uint8)),
        16,
    )
    content = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    reasons = {
        "missing.mp4": "no such file",
        "empty.mp4": "0 bytes",
        "text.mp4": "damaged or not a video",
        "cut.mp4": "damaged",
        "sound.mp4": "no video stream",
    }
    for name, reason in reasons.items():
        with pytest.raises(VideoError, match=reason):
            read_video(tmp_path / name, num_frames=9, fps=16, **SIZE)
    for name in ("http://localhost/a.mp4", f"concat:{tmp_path}/whole.mp4", f"file:{tmp_path}/whole.mp4"):
        with pytest.raises(VideoError, match="no such file"):
            read_video(name, num_frames=9, fps=16, **SIZE)


@pytest.mark.faults
def test_a_damaged_picture_is_not_taken_for_a_good_one(tmp_path):
    """Fault 28."""
    noise = torch.from_numpy(np.random.RandomState(0).randint(0, 255, (33, 64, 64, 3), np.uint8))
    write_video(tmp_path / "a.mp4", noise, 16)
    content, random = (tmp_path / "a.mp4").read_bytes(), np.random.RandomState(1)
    begin = content.index(b"mdat") + 1000
    found = 0
    for _ in range(20):
        damaged = bytearray(content)
        for position in random.randint(begin, len(content) // 2, 20):
            damaged[position] ^= 0x55
        (tmp_path / "b.mp4").write_bytes(damaged)
        try:
            read_video(tmp_path / "b.mp4", num_frames=33, fps=16, height=64, width=64)
        except VideoError as error:
            assert "damaged" in str(error)
            found += 1
    assert found >= 18  # a few bits can change a picture without breaking the syntax


@pytest.fixture
def server():
    """(address, the paths that were asked for) of a web server on this machine."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}", asked
        web.shutdown()


@pytest.mark.faults
def test_a_file_that_refers_to_others_is_no_video(tmp_path, server):
    """Fault 28. Playlists under a video's name, to another file and over the network: nothing is fetched."""
    address, asked = server
    write_video(tmp_path / "a.mp4", ramp(9), fps=16)
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
    playlists = {
        "concat": f"ffconcat version 1.0\nfile {tmp_path}/a.mp4\n",
        "relative": "ffconcat version 1.0\nfile a.mp4\n",
        "web": f"ffconcat version 1.0\nfile '{address}/a.mp4'\n",
        "hls": hls.format("a.mp4"),
        "hls-web": hls.format(f"{address}/a.ts"),
        "dash": f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><AdaptationSet mimeType="video/mp4">'
        f'<Representation id="1"><BaseURL>{address}/a.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>',
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    }
    for name, text in playlists.items():
        for suffix in (".mp4", ".m3u8", ".ffconcat"):
            path = tmp_path / f"{name}{suffix}"
            path.write_text(text)
            with pytest.raises(VideoError, match="damaged or not a video"):
                read_video(path, num_frames=9, fps=16, **SIZE)
    assert asked == []
    with pytest.raises(av.FFmpegError):  # what FFmpeg does when it may
        av.open(str(tmp_path / "hls-web.m3u8"), options={"protocol_whitelist": "file,http,tcp"})
    assert set(asked) == {"/a.ts"}


@pytest.mark.faults
@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (VideoLimits(max_bytes=100), r"bytes, more than the limit of 100 \(--max-bytes\)"),
        (VideoLimits(max_seconds=0.5), r"lasts 1\.\d s, more than the limit of 0.5 \(--max-seconds\)"),
        (VideoLimits(max_pixels=1000), r"1024 pixels, more than the limit of 1000 \(--max-pixels\)"),
        (VideoLimits(max_frames=5), r"more than the limit of 5 \(--max-frames\)"),
    ],
)
def test_limits(tmp_path, limits, reason):
    """Fault 28. What is too large says by how much, and which limit it is."""
    write_video(tmp_path / "a.mp4", ramp(20), fps=16)
    with pytest.raises(VideoError, match=reason):
        read_video(tmp_path / "a.mp4", num_frames=9, fps=16, limits=limits, **SIZE)
    with pytest.raises(VideoError, match=reason):
        with Isolated(read_video, limits) as read:
            read(tmp_path / "a.mp4", num_frames=9, fps=16, **SIZE)
    with pytest.raises(UserError, match=r"--max-pixels 0: must be > 0"):
        VideoLimits(max_pixels=0).check()
    for seconds in (1e7, float("inf")):
        with pytest.raises(UserError, match=r"--max-read-seconds (1e\+07|inf): must be <= 1000000"):
            VideoLimits(max_read_seconds=seconds).check()
    with Isolated(probe_video, VideoLimits(max_read_seconds=MAX_READ_SECONDS)) as probe:
        probe(tmp_path / "a.mp4")


@pytest.mark.faults
def test_a_stream_that_grows_is_refused_before_its_frames_are_decoded(tmp_path):
    """Fault 28. 12 small frames, then large ones: what the header says is no proof."""
    parts = []
    for size in (32, 256):
        path = tmp_path / f"{size}.ts"
        with av.open(str(path), "w", format="mpegts") as container:
            stream = container.add_stream("libx264", rate=16)
            stream.width = stream.height = size
            stream.pix_fmt = "yuv420p"
            for image in ramp(12, size, size).numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        parts.append(path.read_bytes())
    (tmp_path / "grows.mp4").write_bytes(b"".join(parts))
    assert read_all_frames_sizes(tmp_path / "grows.mp4") == {32, 256}
    with pytest.raises(VideoError, match=r"damaged after \d+ frames, or .* more than 2000 pixels \(--max-pixels\)"):
        read_video(tmp_path / "grows.mp4", num_frames=21, fps=16, limits=VideoLimits(max_pixels=2000), **SIZE)


def read_all_frames_sizes(path) -> set[int]:
    with av.open(str(path)) as container:
        return {frame.width for frame in container.decode(video=0)}


def test_isolated_gives_the_same(tmp_path):
    path, request = tmp_path / "a ü \udcff.mp4", {"num_frames": 9, "fps": 16, **SIZE}
    write_video(tmp_path / "a.mp4", ramp(20), fps=16)
    (tmp_path / "a.mp4").rename(path)
    with Isolated(read_video, VideoLimits()) as read:
        (tmp_path / "empty.mp4").touch()
        for _ in range(2):
            assert torch.equal(read(path, **request), read_video(path, **request))
            (process,) = multiprocessing.active_children()
            with pytest.raises(VideoError, match=r"the file is empty \(0 bytes\)"):
                read(tmp_path / "empty.mp4", **request)
            assert multiprocessing.active_children() == [process]  # a bad file costs nothing
    with Isolated(read_all_frames, VideoLimits()) as read, Isolated(probe_video, VideoLimits()) as probe:
        assert torch.equal(read(path), read_all_frames(path)) and probe(path) == probe_video(path)
    assert multiprocessing.active_children() == []


def misbehaves(path, limits: VideoLimits) -> torch.Tensor:
    """As the file's name says."""
    path.write_text(str(os.getpid()))
    while path.name == "hangs":
        time.sleep(1)
    if path.name == "crashes":
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # pytest would write where it happened
        os.kill(os.getpid(), signal.SIGSEGV)
    return torch.tensor([7], dtype=torch.uint8)


@pytest.mark.faults
def test_a_decoder_that_hangs_or_crashes_costs_the_file_only(tmp_path):
    """Fault 28. Its process is killed; the error has the limit and its flag, or how it ended; the next file is read."""
    with Isolated(misbehaves, VideoLimits(max_read_seconds=1)) as read:
        for name, message in (
            ("hangs", r"not read within the limit of 1 s \(--max-read-seconds\)"),
            ("crashes", r"the decoder crashed \(status -11\)"),
        ):
            with pytest.raises(VideoError, match=message):
                read(tmp_path / name)
            with pytest.raises(ProcessLookupError):
                os.kill(int((tmp_path / name).read_text()), 0)
            assert read(tmp_path / "good").tolist() == [7]
        (process,) = multiprocessing.active_children()
        process.kill()  # while it has nothing to do
        process.join()
        assert read(tmp_path / "good").tolist() == [7]
    assert multiprocessing.active_children() == []


def test_a_stream_that_does_not_say_how_long_it_is(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w", options={"live": "1"}) as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for image in ramp(40).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "a.mkv")) as container:
        assert container.duration is None
    assert probe_video(tmp_path / "a.mkv").num_frames == 40
    with pytest.raises(VideoError, match=r"lasts 2.4 s, more than the limit of 0.5"):
        probe_video(tmp_path / "a.mkv", VideoLimits(max_seconds=0.5))
