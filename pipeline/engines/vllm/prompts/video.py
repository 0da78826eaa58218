"""Videos to frames, by vLLM's own loader for the model, which also chooses the frames; and frames that are images.

vLLM's loader decodes with OpenCV, which every vLLM brings along, unless ``media_io_kwargs`` names another.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.engines.media import containers
from pipeline.engines.media.limits import MediaLimits
from pipeline.spec.error_codes import RowErrorCode
from storage.errors import RowError

FRAME_RATE = 1.0
"""Frames per second of a video that comes as images, where the job does not say: as vLLM takes such videos."""
Video = tuple[Any, dict[str, Any]]
"""uint8 [frames, height, width, 3], and what vLLM's processors want to know about them."""
FORMATS = "mov,matroska,avi,gif,flv,ogg,mpeg,mpegts,mpegvideo"
"""FFmpeg's names of the containers in ``containers.VIDEOS``."""
OPENCV_OPTIONS = f"format_whitelist;{FORMATS}|protocol_whitelist;none"
"""What OpenCV hands to FFmpeg. Without it FFmpeg probes what the bytes are, and may take them for a list of addresses
(SDP, HLS), whatever mark they begin with."""
MISSING = 0.1
"""The share of the promised frames that may be missing at the end of a container, where counts differ."""


class VideoLoader:
    """``config`` is vLLM's ``ModelConfig``, with the job's ``media_io_kwargs``."""

    def __init__(self, config: Any, limits: MediaLimits) -> None:
        from vllm.multimodal.media import ImageMediaIO, VideoMediaIO
        from vllm.multimodal.video import get_video_loader_backend_for_processor
        from vllm.transformers_utils.processor import get_video_processor_cls_name

        # OpenCV reads this whenever it opens a video; it has no other way to hand FFmpeg options.
        os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = OPENCV_OPTIONS
        options = dict((config.multimodal_config.media_io_kwargs or {}).get("video", {}))
        if "video_backend" not in options:
            suited = get_video_loader_backend_for_processor(get_video_processor_cls_name(config))
            options |= {"video_backend": suited} if suited else {}
        self._loader = VideoMediaIO(ImageMediaIO(), **options)
        self._limits = limits

    def decode(self, data: bytes) -> Video:
        """The frames of an encoded video. Raises :class:`RowError`: ``invalid_video``, ``media_too_long``."""
        # A clear reason; what FFmpeg itself may open, OPENCV_OPTIONS says.
        container = containers.video_container(data)
        if container is None:
            raise broken(f"none of {', '.join(containers.VIDEOS)} ({len(data)} bytes)")
        if containers.is_cut(data):
            raise broken("the file ends before its video does")
        watched = _watched(type(self._loader.video_loader), self._limits, container)
        try:
            frames, facts = watched.load_bytes(data, num_frames=self._loader.num_frames, **self._loader.kwargs)
        except RowError:
            raise
        except Exception as error:  # OpenCV and the loaders raise nearly anything for broken files
            raise broken(f"{str(error).strip() or type(error).__name__} ({len(data)} bytes)") from None
        if not len(frames):
            raise broken("no frame of it can be decoded")
        return frames, facts

    def from_images(self, images: Sequence[Any], rate: float | None) -> Video:
        """A video of RGB images of one size, ``rate`` of them a second. Raises :class:`RowError`."""
        rate = rate or FRAME_RATE
        sizes = {image.size for image in images}
        if len(sizes) > 1:
            found = ", ".join(f"{width}×{height}" for width, height in sorted(sizes)[:4])
            raise broken(f"its frames have different sizes: {found}")
        frames = np.stack([np.asarray(image.convert("RGB"), np.uint8) for image in images])
        count = len(images)
        return frames, {
            "total_num_frames": count,
            "fps": rate,
            "duration": count / rate,
            "video_backend": "images",
            "frames_indices": list(range(count)),
            "do_sample_frames": False,
        }


def _watched(loader: Any, limits: MediaLimits, container: str) -> Any:
    """The loader, for one video: it stops at a limit before frames are decoded, and at a frame that is missing."""

    class Watched(loader):  # type: ignore[misc]
        frames_there = 0

        @classmethod
        def compute_frames_index_to_sample(cls, source: Any, target: Any, **options: Any) -> Any:
            if source.total_frames_num < 1:
                raise broken("it does not say how many frames it has")
            cls.frames_there = source.total_frames_num
            limits.check_video(source.duration, 1, 0)
            chosen = super().compute_frames_index_to_sample(source=source, target=target, **options)
            limits.check_video(source.duration, len(chosen), 0)
            return chosen

        @classmethod
        def read_frames(cls, cap: Any, frame_idx: Any, *rest: Any, **options: Any) -> Any:
            import cv2

            wanted = len(set(frame_idx))
            size = int(cap.get(cv2.CAP_PROP_FRAME_WIDTH)) * int(cap.get(cv2.CAP_PROP_FRAME_HEIGHT)) * 3
            limits.check_video(0, wanted, wanted * size)
            promised, there = int(cap.get(cv2.CAP_PROP_FRAME_COUNT)), cls.frames_there
            # An MP4 may hide frames on purpose.
            if container != containers.MP4 and there < promised - max(1.0, MISSING * promised):
                raise broken(f"the file ends after {there} of {promised} frames")
            frames, valid = super().read_frames(cap, frame_idx, *rest, **options)
            missing = sorted(set(frame_idx).difference(valid))
            # Where the number of frames is an estimate, the last may not be there.
            exact = container in (containers.MP4, containers.AVI)
            if missing and (exact or not len(valid) or missing != [max(frame_idx)]):
                raise broken(f"{len(missing)} of the {wanted} chosen frames cannot be decoded")
            return frames, valid

    return Watched


def broken(why: str) -> RowError:
    """The row error of a video that cannot be decoded."""
    return RowError(RowErrorCode.INVALID_VIDEO, f"not a video that can be decoded: {why}")
