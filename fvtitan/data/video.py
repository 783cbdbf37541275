"""Real video files in and out, by PyAV: frames chosen by presentation time, sizes by resize and centre crop.

Files from outside are read `Isolated`: in a process that ends when the decoder hangs or crashes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fvtitan.components.files import fsync_path
from fvtitan.errors import UserError

# Containers that are read; playlists and the like could point to other files.
FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif"
# Seconds. Matroska rounds time stamps to milliseconds, that of the first frame too.
TIME_TOLERANCE = 1.1e-3
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class VideoError(Exception):
    """Why a file cannot be used, in words."""


@dataclass(frozen=True)
class VideoLimits:
    """What is refused, most of it before it is decoded: guards against damaged headers, decompression bombs and decoders that
    hang. Of a file: its bytes, the seconds it plays, the pixels of a frame, the frames that are decoded, and the seconds that
    reading it may take."""

    max_bytes: int = 4 * 2**30
    max_seconds: float = 3600.0
    max_pixels: int = 8192 * 8192
    max_frames: int = 2**18
    max_read_seconds: float = 300.0

    def check(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not value > 0:
                raise UserError(f"{_flag(name)} {value}: must be > 0")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _over(limit: str, limits: VideoLimits, what: str) -> VideoError:
    return VideoError(f"{what}, more than the limit of {getattr(limits, limit):g} ({_flag(limit)})")


@dataclass(frozen=True)
class VideoInfo:
    """What a container says about its first video stream: the size as stored (before a rotation that its metadata may ask
    for) and the exact number of frames, counted by demuxing without decoding."""

    width: int
    height: int
    num_frames: int
    seconds: float


class VideoWriter:
    """Writes uint8 frames `[T, H, W, 3]` (even sizes) as H.264 mp4, in as many parts as come.

    The file has its name when it is complete, and a temporary one before: with `live` that is `<stem>.part.mp4`, which plays up
    to the last part that was appended. Use as a context manager.
    """

    def __init__(self, path: str | Path, fps: int | Fraction, *, crf: int = 12, live: bool = False):
        self.path, self.fps, self.crf, self.live = Path(path), fps, crf, live
        hidden = f".{self.path.stem}.{os.getpid()}.tmp.mp4"
        self._temporary = self.path.with_name(f"{self.path.stem}.part.mp4" if live else hidden)
        self._container = self._stream = None

    def __enter__(self) -> VideoWriter:
        import av

        # Fragments of their own index make a file that is played while it grows.
        fragments = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}
        options = fragments if self.live else {}
        self._container = av.open(str(self._temporary), "w", format="mp4", options=options)
        return self

    def append(self, frames: Tensor | np.ndarray) -> None:
        """The next frames."""
        import av

        video = frames.cpu().numpy() if isinstance(frames, Tensor) else np.asarray(frames)
        if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
            raise ValueError(f"frames must be uint8 [T, H, W, 3], got {video.dtype} {list(video.shape)}")
        if video.shape[1] % 2 or video.shape[2] % 2:
            raise ValueError(f"H.264 needs even sizes, got {video.shape[1]} x {video.shape[2]}")
        if self._stream is None:
            # x264's macroblock tree now and then gives other bytes, and pixels, for the same frames.
            options = {"crf": str(self.crf), "preset": "veryfast", "x264-params": "mbtree=0"}
            options |= {"tune": "zerolatency"} if self.live else {}  # no frame is held back
            self._stream = self._container.add_stream("libx264", rate=self.fps, options=options)
            self._stream.height, self._stream.width = video.shape[1:3]
            self._stream.pix_fmt = "yuv420p"
            self._stream.thread_count = 1  # several encoder threads cost more than they bring at these sizes
        for number, image in enumerate(video):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if self.live and not number:
                frame.pict_type = av.video.frame.PictureType.I  # a fragment begins with each part
            self._container.mux(self._stream.encode(frame))

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None and self._stream is not None:
                self._container.mux(self._stream.encode())
            self._container.close()
            if kind is None:
                fsync_path(self._temporary)
                os.replace(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)


def write_video(path: str | Path, frames: Tensor | np.ndarray, fps: int | Fraction, *, crf: int = 12) -> None:
    """Write uint8 `[T, H, W, 3]` (even sizes) as H.264 mp4, under a temporary name first."""
    with VideoWriter(path, fps, crf=crf) as writer:
        writer.append(frames)


def _open(path: Path, limits: VideoLimits):
    """The container and its first video stream, after the checks that need no decoding. Local files only."""
    import av

    if not path.is_file():
        raise VideoError("no such file")
    size = path.stat().st_size
    if size == 0:
        raise VideoError("the file is empty (0 bytes)")
    if size > limits.max_bytes:
        raise _over("max_bytes", limits, f"the file has {size} bytes")
    try:
        container = av.open(str(path.resolve()), options={"protocol_whitelist": "file", "format_whitelist": FORMATS})
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"damaged or not a video: {error}") from None
    if not container.streams.video:
        container.close()
        raise VideoError("the file has no video stream")
    stream = container.streams.video[0]
    pixels = stream.codec_context.width * stream.codec_context.height
    seconds = float(container.duration / av.time_base) if container.duration else 0.0
    problem = None
    if pixels > limits.max_pixels:
        problem = _over("max_pixels", limits, f"frames have {pixels} pixels")
    elif seconds > limits.max_seconds:
        problem = _over("max_seconds", limits, f"the video lasts {seconds:.1f} s")
    if problem is not None:
        container.close()
        raise problem
    stream.thread_type = "AUTO"
    # A stream may change its size on the way: FFmpeg itself refuses a larger frame before it allocates it.
    stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}
    return container, stream


def probe_video(path: str | Path, limits: VideoLimits = VideoLimits()) -> VideoInfo:  # noqa: B008 (frozen)
    """Size, exact frame count and duration, without decoding. Raises `VideoError`."""
    import av

    container, stream = _open(Path(path), limits)
    with container:
        try:
            packets = [packet for packet in container.demux(stream) if packet.size]
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"damaged: {error}") from None
        shown = [(p.pts if p.pts is not None else p.dts, p.duration or 0) for p in packets]  # some streams have no pts
        spans = [(start, start + length) for start, length in shown if start is not None]
        ticks = max(end for _, end in spans) - min(start for start, _ in spans) if spans else 0
        seconds = float(ticks * (stream.time_base or Fraction(0)))
        return VideoInfo(stream.codec_context.width, stream.codec_context.height, len(packets), seconds)


def read_all_frames(path: str | Path, limits: VideoLimits = VideoLimits()) -> Tensor:  # noqa: B008 (frozen)
    """Every frame of a video as it is, uint8 `[T, H, W, 3]`. Raises `VideoError`."""
    frames = [_to_rgb(frame) for _, frame in _decode(Path(path), limits)]
    return torch.from_numpy(np.stack(frames))


def read_video(
    path: str | Path,
    *,
    num_frames: int,
    height: int,
    width: int,
    fps: int,
    limits: VideoLimits = VideoLimits(),  # noqa: B008 (frozen)
) -> Tensor:
    """The first `num_frames` (4n + 1) frames at `fps`, resized and centre-cropped: uint8 `[T, H, W, 3]`.

    Frame k is the one on screen at time k / fps after the first frame, by presentation time stamps, so a variable frame
    rate is read right. Raises `VideoError` when the video is too short, damaged or over a limit.
    """
    if num_frames % 4 != 1:
        raise ValueError(f"num_frames must be 4n + 1, got {num_frames}")
    chosen: list[np.ndarray] = []
    previous, start, last, interval = None, None, 0.0, 0.0
    for time, frame in _decode(Path(path), limits):
        start = time if start is None else start
        while previous is not None and len(chosen) < num_frames and len(chosen) / fps < time - start - TIME_TOLERANCE:
            chosen.append(_fit(previous, height, width))
        if len(chosen) == num_frames:
            break
        if previous is not None:
            interval = time - start - last
        previous, last = frame, time - start
    # The last frame stays on screen as long as the one before it did.
    while previous is not None and len(chosen) < num_frames and len(chosen) / fps < last + interval - TIME_TOLERANCE:
        chosen.append(_fit(previous, height, width))
    if len(chosen) < num_frames:
        raise VideoError(f"too short: {len(chosen)} frames at {fps} fps, {num_frames} are needed")
    return torch.from_numpy(np.stack(chosen))


def _decode(path: Path, limits: VideoLimits):
    """(time in seconds, frame) in presentation order."""
    import av

    container, stream = _open(path, limits)
    count = 0
    with container:
        try:
            for frame in container.decode(stream):
                if frame.width * frame.height > limits.max_pixels:
                    raise _over("max_pixels", limits, f"a frame has {frame.width * frame.height} pixels")
                if frame.time is None:
                    raise VideoError("a frame has no presentation time")
                if frame.time > limits.max_seconds + 1:
                    raise _over("max_seconds", limits, f"the video lasts {frame.time:.1f} s")
                if frame.is_corrupt:  # decoders conceal damage, and say so here only
                    raise VideoError(f"damaged: frame {count} cannot be decoded in full")
                count += 1
                if count > limits.max_frames:
                    raise _over("max_frames", limits, f"{count} frames were decoded and it is not at its end")
                yield frame.time, frame
        except (av.FFmpegError, OSError) as error:
            raise VideoError(
                f"damaged after {count} frames, or their size changed to more than {limits.max_pixels} pixels "
                f"({_flag('max_pixels')}): {error}"
            ) from None
    if not count:
        raise VideoError("damaged: no frame could be decoded")


class Isolated:
    """`function(path, limits=limits, **options)`, one of the functions above, in a process of its own, which reads one file
    after another and is killed when one takes longer than `limits.max_read_seconds`; the next file gets a new one.

    A call raises `VideoError` when the function does, when it takes longer, and when it crashes. Use as a context manager.
    """

    def __init__(self, function: Callable[..., Any], limits: VideoLimits) -> None:
        self.function, self.limits = function, limits
        self._process = self._pipe = None

    def __enter__(self) -> Isolated:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def __call__(self, path: str | Path, **options: Any) -> Any:
        if self._process is None or not self._process.is_alive():
            self._end()
            self._start()
        try:
            self._pipe.send_bytes(json.dumps([os.fspath(path), options]).encode())
            if not self._pipe.poll(self.limits.max_read_seconds):
                self._end()
                limit = f"{self.limits.max_read_seconds:g} s ({_flag('max_read_seconds')})"
                raise VideoError(f"not read within the limit of {limit}: hangs, or slow")
            answer = json.loads(self._pipe.recv_bytes())
            if "shape" in answer:
                frames = torch.empty(answer["shape"], dtype=torch.uint8)
                self._pipe.recv_bytes_into(frames.numpy().reshape(-1))
                return frames
        except (EOFError, OSError):
            self._process.join(1)
            status = self._process.exitcode
            self._end()
            raise VideoError(f"damaged: the decoder crashed (status {status})") from None
        if "error" in answer:
            raise VideoError(answer["error"])
        return VideoInfo(**answer["info"])

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")  # in milliseconds; nothing but the files is decoded there
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=self._serve, args=(theirs, self._pipe), daemon=True)
        self._process.start()
        theirs.close()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = self._pipe = None

    def _serve(self, pipe: Connection, other_end: Connection) -> None:
        """In the process of its own. Answers are JSON and the frames' bytes: what a decoder has touched is not unpickled."""
        other_end.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent ends this process
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        while True:
            try:
                path, options = json.loads(pipe.recv_bytes())
            except EOFError:
                return
            answer: dict[str, Any] = {}
            try:
                result = self.function(Path(path), limits=self.limits, **options)
                answer = (
                    {"info": dataclasses.asdict(result)} if isinstance(result, VideoInfo) else {"shape": result.shape}
                )
            except VideoError as error:
                answer = {"error": str(error)}
            pipe.send_bytes(json.dumps(answer).encode())
            if "shape" in answer:
                pipe.send_bytes(result.contiguous().numpy().reshape(-1))


def _to_rgb(frame) -> np.ndarray:
    image = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4  # phones record portrait as rotated landscape
    return np.rot90(image, turns).copy() if turns else image


def _fit(frame, height: int, width: int) -> np.ndarray:
    """Scale so that the frame covers height x width, then crop the centre."""
    from PIL import Image

    image = Image.fromarray(_to_rgb(frame))
    scale = max(height / image.height, width / image.width)
    if scale != 1:
        size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=None)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))
