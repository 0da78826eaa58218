"""The stable codes of row errors: what may stand in ``error.code`` of an output row."""

from __future__ import annotations

from enum import StrEnum


class RowErrorCode(StrEnum):
    MISSING_VALUE = "missing_value"
    """A column that the task reads is null in this row."""
    INVALID_VALUE = "invalid_value"
    """A value is there but cannot be used: wrong role, empty prompt, a token id outside the vocabulary."""
    UNSUPPORTED_PARAMETER = "unsupported_parameter"
    """A request asks for a parameter that the engine cannot honour; the message names it."""
    INVALID_UTF8 = "invalid_utf8"
    """A text column holds bytes that are not UTF-8."""
    INVALID_IMAGE = "invalid_image"
    """An image that cannot be decoded, or is too large."""
    INVALID_AUDIO = "invalid_audio"
    """A sound that cannot be decoded to its end, or that has no usual sampling rate."""
    INVALID_VIDEO = "invalid_video"
    """A video that cannot be decoded, or whose frames have different sizes."""
    MEDIA_TOO_LONG = "media_too_long"
    """A sound or a video with more seconds, frames or decoded bytes than the job's limits."""
    UNREADABLE_URI = "unreadable_uri"
    """The row names a file that is not there, cannot be read, or lies outside what the operator allows."""
    PROMPT_TOO_LONG = "prompt_too_long"
    """The prompt is longer than the model accepts, and ``overlong`` neither truncates nor splits it. In generate and
    chat one token of the answer must fit too."""
    WRONG_TYPE = "wrong_type"
    """A tensor's element type cannot be converted to the graph's without loss."""
    WRONG_SHAPE = "wrong_shape"
    """A tensor's shape does not fit the graph's input."""
    BROKEN_SEQUENCE = "broken_sequence"
    """An earlier row of the row's sequence failed, so that the state in which the row begins is not known."""
    NOT_FINITE = "not_finite"
    """A NaN or an infinity where the job refuses them, or in the embedding, score or probabilities of the row."""
    INVALID_OUTPUT = "invalid_output"
    """The answer does not keep to the schema, choice or grammar that was asked for; most often it was cut off."""
    ENGINE_REFUSED = "engine_refused"
    """The engine rejected this row alone; the message is the engine's."""
    TIMED_OUT = "timed_out"
    """The row alone took longer than the job allows."""
    REQUEST_TIMEOUT = "request_timeout"
    """The row was inside the engine for longer than the job's ``request_timeout``, and was aborted."""
    POISON_ROW = "poison_row"
    """The row killed the engine each time it was tried."""


def request_timed_out(seconds: float | None) -> str:
    """The message of ``request_timeout``."""
    return f"the row took longer than request_timeout, {seconds:g} s"


MESSAGE_LIMIT = 500
"""Longest error message kept, in characters."""
