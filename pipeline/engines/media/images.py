"""Images to model inputs: bytes or URIs, decoded by Pillow in threads, resized and normalized as Transformers does.

The arithmetic is that of Transformers' Pillow-backed processors, without importing them (they want torch): Pillow
resizes 8-bit pixels, which leaves 256 values per channel, and rescaling and normalizing are a table of these.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.engines.media import columns
from pipeline.engines.model_config.image import ImageRecipe
from pipeline.spec.error_codes import MESSAGE_LIMIT, RowErrorCode
from storage.errors import EngineMissing, RowError

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]
Failure = tuple[str, str]
"""A ``RowErrorCode`` and a message."""

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded (three bytes a pixel): a file of kilobytes can claim any size."""
LARGE_PIXELS = 16_000_000
"""Images larger than this, or that become so, are decoded one at a time."""
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM", "ICO")
"""Formats that are read, where Pillow was built for them. Some of the others start programs (EPS: Ghostscript) or read
further files, and none is a format of photographs."""


class ImageReader:
    """Rows of an image column to arrays. ``fetch`` reads a URI that the operator allows, or raises ``InvalidInput``."""

    def __init__(self, recipe: ImageRecipe, fetch: Callable[[str], bytes] | None, threads: int) -> None:
        try:
            import PIL.Image
        except ImportError as error:
            raise EngineMissing("the package Pillow is not installed; install rowmill[images]") from error
        PIL.Image.init()
        self._recipe = recipe
        self._fetch = fetch
        self._table = lookup_table(recipe)
        self._large = threading.Lock()
        self._threads = ThreadPoolExecutor(threads, "rowmill-images")

    def read(self, column: Any, name: str) -> list[Floats | Failure]:
        """For each row the input of the model, float32 [3, h, w], or what is wrong with it."""
        rows = [column[at] for at in range(len(column))]
        return list(self._threads.map(lambda row: self._one(row, name), rows))

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _one(self, row: Any, name: str) -> Floats | Failure:
        if columns.is_lacking(row):
            return RowErrorCode.MISSING_VALUE, f"column {name!r} is null"
        try:
            data = columns.read(row, self._fetch)
        except RowError as error:
            return error.code, f"column {name!r}: {error.message}"[:MESSAGE_LIMIT]
        try:
            return self.prepare(data)
        except Exception as error:  # Pillow's decoders raise nearly anything for broken files
            return RowErrorCode.INVALID_IMAGE, f"column {name!r}: {_reason(error)} ({len(data)} bytes)"[:MESSAGE_LIMIT]

    def prepare(self, data: Any) -> Floats:
        """The model's input, float32 [3, h, w], from an encoded image. Raises whatever Pillow does for a broken one."""
        with opened(data) as image, self._memory_for(image.size):
            return to_input(eight_bits(image).convert("RGB"), self._recipe, self._table)

    def _memory_for(self, size: tuple[int, int]) -> AbstractContextManager[object]:
        # A batch of large images takes the memory of one of them, however many cores there are.
        becomes = resized(size, self._recipe) or (0, 0)
        pixels = max(size[0] * size[1], becomes[0] * becomes[1])
        return self._large if pixels > LARGE_PIXELS else contextlib.nullcontext()


def _reason(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":
        return "no image in a format that Pillow reads"
    return str(error).strip().rstrip(".") or type(error).__name__


def opened(data: Any) -> Any:
    """An image whose head was read, and whose pixels were not, as a ``PIL.Image``: a context manager.

    Raises ``ValueError`` for one that is too large, and whatever Pillow does for what is no image.
    """
    import PIL.Image

    image = PIL.Image.open(io.BytesIO(data), formats=[kind for kind in FORMATS if kind in PIL.Image.OPEN])
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{width} × {height} pixels are more than {MAX_PIXELS}")
    return image


def is_deep(image: Any) -> bool:
    """Whether it holds grey values of 16 bits, 32 bits or floats: Pillow's modes ``I;16…``, ``I`` and ``F``."""
    return bool(image.mode == "F" or image.mode.startswith("I"))


def png(image: Any) -> bytes:
    """The image, encoded without loss."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def eight_bits(image: Any) -> Any:
    """An image that :func:`is_deep` as one of 8 bits per channel; any other unchanged.

    Pillow's own conversion cuts off what is above 255. White is 65535, and 1.0. Raises ``ValueError`` for values whose
    white is not known: floats outside 0 to 1, and integers of 32 bits.
    """
    import PIL.Image

    if image.mode == "F":
        values = np.asarray(image, np.float64)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError("an image of floats must hold values from 0 to 1; scale them")
        white = 1.0
    elif is_deep(image):
        values = np.asarray(image, np.int64)
        known = image.mode != "I" or image.format in ("PNG", "PPM", "JPEG2000")
        if not known or values.min() < 0 or values.max() > _WHITE_16:
            raise ValueError("an image of 32-bit or signed integers has no known white; write it with 8 or 16 bits")
        white = float(_WHITE_16)
    else:
        return image
    return PIL.Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


_WHITE_16 = 65_535


def resized(size: tuple[int, int], recipe: ImageRecipe) -> tuple[int, int] | None:
    """Height and width that an image of this width and height gets; ``None``: it keeps them."""
    width, height = size
    if recipe.shortest is None:
        return recipe.size
    short, long = min(width, height), max(width, height)
    other = int(recipe.shortest * long / short)
    return (other, recipe.shortest) if width <= height else (recipe.shortest, other)


def to_input(image: Any, recipe: ImageRecipe, table: Floats) -> Floats:
    """The model's input, float32 [3, h, w], from an RGB ``PIL.Image``; ``table`` comes from :func:`lookup_table`."""
    size = resized(image.size, recipe)
    if size is not None:
        if size[0] * size[1] > MAX_PIXELS:
            width, height = image.size
            raise ValueError(f"{width} × {height} pixels become {size[1]} × {size[0]}: more than {MAX_PIXELS}")
        image = image.resize((size[1], size[0]), resample=recipe.resample)
    pixels = np.asarray(image, dtype=np.uint8)
    if recipe.crop is not None:
        pixels = _middle(pixels, *recipe.crop)
    made = np.empty((3, *pixels.shape[:2]), np.float32)
    for channel in range(3):
        np.take(table[channel], pixels[:, :, channel], out=made[channel])
    return made


def _middle(pixels: Pixels, height: int, width: int) -> Pixels:
    """The middle of an image, [h, w, 3]; where it is smaller, in the middle of black."""
    have = pixels.shape[:2]
    if have[0] < height or have[1] < width:
        tall, wide = max(height, have[0]), max(width, have[1])
        top, left = ceil((tall - have[0]) / 2), ceil((wide - have[1]) / 2)
        around = np.zeros((tall, wide, 3), np.uint8)
        around[top : top + have[0], left : left + have[1]] = pixels
        # Where the odd row goes follows Transformers, whose offsets come from the image's size before it was put there.
        up, across = (have[0] - height) // 2 + top, (have[1] - width) // 2 + left
        return around[max(0, up) : min(tall, up + height), max(0, across) : min(wide, across + width)]
    top, left = (have[0] - height) // 2, (have[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def lookup_table(recipe: ImageRecipe) -> Floats:
    """float32 [3, 256]: what a pixel's value becomes, rounded as Transformers' ``rescale`` and ``normalize`` round."""
    values = (np.arange(256, dtype=np.uint8).astype(np.float64) * recipe.scale).astype(np.float32)
    if recipe.mean is None or recipe.std is None:
        return np.tile(values, (3, 1))
    mean, std = np.asarray(recipe.mean, np.float32), np.asarray(recipe.std, np.float32)
    return np.asarray((values[None, :] - mean[:, None]) / std[:, None], np.float32)
