"""Real video files in and out, by PyAV: frames chosen by presentation time, sizes by resize and centre crop.

Files from outside are read `Isolated`: in a process that ends when the decoder hangs or crashes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fvtitan.components.files import fsync_path
from fvtitan.components.processes import end_with_parent
from fvtitan.errors import UserError

# Containers that are read; playlists and the like could point to other files.
FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif"
# Decoded frames of these carry the time stamps of decoding; only these others can be sought in without losing them.
UNTIMED, INDEXED = ("avi",), ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
MAX_READ_SECONDS = 1_000_000  # the system waits for milliseconds that fit 32 bits
# Seconds. Matroska rounds time stamps to milliseconds, that of the first frame too.
TIME_TOLERANCE = 1.1e-3


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
        if self.max_read_seconds > MAX_READ_SECONDS:
            raise UserError(f"--max-read-seconds {self.max_read_seconds:g}: must be <= {MAX_READ_SECONDS} (11 days)")


def _damaged(count: int, limits: VideoLimits, error: Exception) -> VideoError:
    return VideoError(
        f"damaged after {count} frames, or their size changed to more than {limits.max_pixels} pixels "
        f"({_flag('max_pixels')}): {error}"
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _over(limit: str, limits: VideoLimits, what: str) -> VideoError:
    return VideoError(f"{what}, more than the limit of {getattr(limits, limit):g} ({_flag(limit)})")


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a file's first video stream from its packets and its first picture.

    `width` x `height` is the size as shown: rotated as the metadata asks (`rotation`, degrees counter-clockwise) and with
    square pixels (stored ones are `pixel_aspect` times as wide as high). `times` are the seconds at which the frames appear,
    the first at 0, in the order shown; `start` is the time stamp of the first. `container` is FFmpeg's name of the format.
    """

    width: int
    height: int
    rotation: int
    pixel_aspect: float
    container: str
    start: float
    times: Sequence[float]

    @property
    def num_frames(self) -> int:
        return len(self.times)

    @property
    def seconds(self) -> float:
        """How long it lasts: the last frame stays on screen as long as the one before it did."""
        last = self.times[-1]
        return last + (last - self.times[-2] if len(self.times) > 1 else 0.0)

    @property
    def fps(self) -> float:
        """The mean frame rate; 0 of a single frame."""
        return (len(self.times) - 1) / self.times[-1] if len(self.times) > 1 else 0.0

    def frames_at(self, fps: int) -> np.ndarray:
        """Which frame is on screen at k / fps, for every k before the end: int64 `[N]`, ascending."""
        count = max(1, math.ceil((self.seconds - TIME_TOLERANCE) * fps))
        return np.searchsorted(self.times, np.arange(count) / fps + TIME_TOLERANCE, side="right") - 1


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
    # For the container only: before PyAV 18, options for streams too crash where a stream is found later on, as in .mpg.
    options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
    try:
        container = av.open(str(path.resolve()), container_options=options)
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
    """Size and exact frame times by demuxing; only the first picture is decoded, which alone knows how it is rotated.

    Raises `VideoError`.
    """
    import av

    container, stream = _open(Path(path), limits)
    stream.thread_type = "NONE"  # threads would want more packets before they give the first picture
    stamps: list[int] = []
    first = None
    with container:
        try:
            for packet in container.demux(stream):
                if first is None:
                    first = next(iter(packet.decode()), None)
                stamp = packet.dts if packet.pts is None else packet.pts  # some streams have no pts
                if packet.size and stamp is not None and not packet.is_discard:  # an edit list hides some
                    stamps.append(stamp)
                if len(stamps) > limits.max_frames:
                    raise _over("max_frames", limits, f"the file has {len(stamps)} frames and is not at its end")
        except (av.FFmpegError, OSError) as error:
            raise _damaged(0 if first is None else len(stamps), limits, error) from None
        if first is None or first.time is None:
            raise VideoError(
                "damaged: no frame could be decoded" if first is None else "a frame has no presentation time"
            )
        if first.is_corrupt:
            raise VideoError("damaged: frame 0 cannot be decoded in full")
        name = container.format.name
        ordered = np.sort(stamps) if name in UNTIMED else np.unique(stamps)
        times = ordered * float(stream.time_base) - first.time
        times = times[times > -1e-6]  # leading frames of a stream that was cut cannot be decoded
        if not len(times):
            raise VideoError("a frame has no presentation time")
        if times[-1] > limits.max_seconds:  # not every container says so at its beginning
            raise _over("max_seconds", limits, f"the video lasts {times[-1]:.1f} s")
        aspect = float(stream.sample_aspect_ratio or 1)
        rotation = _rotation(first)
        size = (max(1, round(first.width * aspect)), first.height)
        width, height = size if rotation % 180 == 0 else size[::-1]
        return VideoInfo(width, height, rotation, aspect, name, first.time, times.clip(0).tolist())


def read_all_frames(path: str | Path, limits: VideoLimits = VideoLimits()) -> Tensor:  # noqa: B008 (frozen)
    """Every frame of a video as it is, uint8 `[T, H, W, 3]`. Raises `VideoError`."""
    frames = [_to_rgb(frame) for _, frame in _decode(Path(path), limits)]
    return torch.from_numpy(np.stack(frames))


def read_first_frame(path: str | Path, limits: VideoLimits = VideoLimits()) -> Tensor:  # noqa: B008 (frozen)
    """The first frame as shown (rotated, but with the pixels as stored), uint8 `[H, W, 3]`. Raises `VideoError`."""
    return torch.from_numpy(_to_rgb(next(iter(_decode(Path(path), limits)))[1]))


def read_video(
    path: str | Path,
    *,
    num_frames: int,
    height: int,
    width: int,
    fps: int,
    start: int = 0,
    limits: VideoLimits = VideoLimits(),  # noqa: B008 (frozen)
) -> Tensor:
    """`num_frames` (4n + 1) frames at `fps` from number `start` on, resized and centre-cropped: uint8 `[T, H, W, 3]`.

    Frame k is the one on screen at time k / fps after the first frame, by presentation time stamps, so a variable frame
    rate is read right. Raises `VideoError` when the video is too short, damaged or over a limit.
    """
    if num_frames % 4 != 1:
        raise ValueError(f"num_frames must be 4n + 1, got {num_frames}")
    info = probe_video(path, limits)
    wanted = info.frames_at(fps)[start:].tolist()[:num_frames]
    if len(wanted) < num_frames:
        raise VideoError(f"too short: {len(wanted)} frames at {fps} fps, {num_frames} are needed")
    chosen: list[np.ndarray] = []
    for index, frame in _decode_from(Path(path), limits, info, wanted[0]):
        while index == wanted[len(chosen)]:
            chosen.append(_fit(frame, height, width, info.pixel_aspect))
            if len(chosen) == num_frames:
                return torch.from_numpy(np.stack(chosen))
        if index > wanted[len(chosen)]:
            break
    raise VideoError(f"damaged: frame {wanted[len(chosen)]} is in the file, but cannot be decoded")


def _decode_from(path: Path, limits: VideoLimits, info: VideoInfo, first: int):
    """(number in `info.times`, frame) in presentation order, from the frame `first` on or from an earlier one."""
    if info.container in UNTIMED:
        yield from enumerate(frame for _, frame in _decode(path, limits))
        return
    times, seconds = np.asarray(info.times), info.start + info.times[first]
    for begin in (seconds, None) if first and info.container in INDEXED else (None,):
        for count, (time, frame) in enumerate(_decode(path, limits, begin)):
            if begin is not None and not count and time > seconds + 1e-6:
                break  # the container's index is wrong: from the beginning
            index = int(np.searchsorted(times, time - info.start - 1e-6))
            if index == len(times) or abs(times[index] - (time - info.start)) > 1e-6:
                raise VideoError(f"damaged: the file lists no frame at {time:.3f} s, but has one")
            yield index, frame
        else:
            return


def _decode(path: Path, limits: VideoLimits, seconds: float | None = None):
    """(time in seconds, frame) in presentation order, from the last key frame before `seconds` on."""
    import av

    container, stream = _open(path, limits)
    count = 0
    with container:
        try:
            if seconds is not None:
                with contextlib.suppress(av.FFmpegError):  # one that cannot be sought in is read from the beginning
                    container.seek(int(seconds / stream.time_base), stream=stream)
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
            raise _damaged(count, limits, error) from None
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
        end_with_parent(signal.SIGKILL)
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


def _rotation(frame) -> int:
    """Degrees counter-clockwise by which a decoded frame is turned to be shown: 0, 90, 180 or 270."""
    return round(frame.rotation / 90) % 4 * 90  # phones record portrait as rotated landscape


def _to_rgb(frame) -> np.ndarray:
    image, turns = frame.to_ndarray(format="rgb24"), _rotation(frame) // 90
    return np.rot90(image, turns).copy() if turns else image


def _fit(frame, height: int, width: int, pixel_aspect: float) -> np.ndarray:
    """Scale so that the frame, with square pixels, covers height x width, then crop the centre."""
    from PIL import Image

    image = Image.fromarray(_to_rgb(frame))
    wide, high = (pixel_aspect, 1.0) if _rotation(frame) % 180 == 0 else (1.0, pixel_aspect)
    shown_width, shown_height = image.width * wide, image.height * high
    scale = max(height / shown_height, width / shown_width)
    size = (max(width, round(shown_width * scale)), max(height, round(shown_height * scale)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=None)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))
