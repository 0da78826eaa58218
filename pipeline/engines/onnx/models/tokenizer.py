"""Text columns to token ids: in Rust, unpadded, each distinct text once."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.engines.model_config.text import TextFolder
from pipeline.spec.error_codes import RowErrorCode
from storage.errors import EngineMissing, InvalidModel

Indices = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]
CLIP_CHARACTERS = 65_536
"""Single texts longer than this (and than 64 characters a token of the limit) are tokenized by their beginning first:
a text of 20 MB was measured to take 10 s and 1.9 GB, for 256 tokens."""
MAX_PIECES = 1024
"""Most pieces of one text that are run."""
PAIR_CHARACTERS = 16
"""Texts of a pair with more characters than this for each token of the limit are cut before they are joined."""
PIECE_CHARACTERS = 16
"""A text with more characters than this for each token of its ``MAX_PIECES`` is split by its beginning first."""

Failure = tuple[str, str]
"""A ``RowErrorCode`` and a message."""


@dataclass(frozen=True, slots=True)
class DistinctTexts:
    """The distinct values of n rows. ``texts``: u tuples of one text or a pair; ``of_row``: int64 [n], which of them a
    row has, or -1 for a row in ``failures`` (row position → code, message)."""

    texts: list[tuple[str, ...]]
    of_row: Indices
    failures: dict[int, Failure]


def distinct(batches: Sequence[pa.RecordBatch], columns: Sequence[str]) -> DistinctTexts:
    """The distinct texts (or pairs, for two columns) of the rows. Null is ``missing_value``; bytes that are not UTF-8
    are ``invalid_utf8``, in a string column too, because Parquet readers do not look."""
    failures: dict[int, Failure] = {}
    decoded: list[list[str | None]] = []
    codes: list[Indices] = []
    for name in columns:
        chunks = [batch.column(name).cast(pa.large_binary()) for batch in batches]
        encoded = pa.chunked_array(chunks, pa.large_binary()).combine_chunks().dictionary_encode()
        values: list[str | None] = []
        broken: dict[int, str] = {}
        for code, raw in enumerate(encoded.dictionary.to_pylist()):
            assert raw is not None  # a dictionary holds no nulls
            try:
                values.append(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                values.append(None)
                broken[code] = f"column {name!r} is not UTF-8: {error.reason} at byte {error.start}"
        of_row = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        for row in np.flatnonzero(of_row < 0):
            failures.setdefault(int(row), (RowErrorCode.MISSING_VALUE, f"column {name!r} is null"))
        for row in np.flatnonzero(np.isin(of_row, list(broken))) if broken else ():
            failures.setdefault(int(row), (RowErrorCode.INVALID_UTF8, broken[int(of_row[row])]))
        decoded.append(values)
        codes.append(of_row)
    good = np.ones(len(codes[0]), dtype=bool)
    good[list(failures)] = False
    key = codes[0] if len(codes) == 1 else codes[0] * max(1, len(decoded[1])) + codes[1]
    _, first, inverse = np.unique(key[good], return_index=True, return_inverse=True)
    rows = np.flatnonzero(good)
    texts = [
        tuple(values[int(code[row])] or "" for values, code in zip(decoded, codes, strict=True)) for row in rows[first]
    ]
    result = np.full(len(good), -1, dtype=np.int64)
    result[good] = inverse.astype(np.int64)
    return DistinctTexts(texts, result, failures)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of u texts, end to end. ``ids``, ``types``: int32 [sum of lengths]; ``lengths``: int64 [u];
    ``truncated``: bool [u]; ``failures``: text → code, message (the length of such a text is 0)."""

    ids: Ids
    types: Ids
    lengths: Indices
    truncated: npt.NDArray[np.bool_]
    failures: dict[int, Failure]

    @property
    def starts(self) -> Indices:
        """int64 [u]: where each text begins in ``ids``."""
        return (
            np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)[:-1]]) if len(self.lengths) else self.lengths
        )


class TextTokenizer:
    """``tokenizer.json`` of a model, with the model's own length limit."""

    def __init__(self, folder: TextFolder, max_length: int | None) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise EngineMissing("the package tokenizers is not installed; install rowmill[onnx]") from error
        assert folder.tokenizer is not None
        self._lock = threading.Lock()
        self._prompt_lengths: dict[str, int] = {}
        self.max_length = max_length
        self.vocab_size = folder.vocab_size
        try:
            text = folder.tokenizer.read_text(encoding="utf-8")
            self._whole = Tokenizer.from_str(text)
            self._cut = Tokenizer.from_str(text)
        except Exception as error:  # the Rust binding raises a bare Exception for whatever is wrong with the file
            raise InvalidModel(f"{folder.tokenizer} cannot be read: {error}") from error
        padding = self._whole.padding or {}
        self.pad_id = int(folder.config.get("pad_token_id") or padding.get("pad_id") or 0)
        for tokenizer in (self._whole, self._cut):
            tokenizer.no_padding()
            tokenizer.no_truncation()
            if folder.lower_case:
                _lower_case(tokenizer)
        if max_length is not None:
            self._cut.enable_truncation(max_length)

    def prompt_length(self, prompt: str) -> int:
        """How many tokens of a text are its prompt: those of the prompt alone, but not a special token at its end."""
        if not prompt:
            return 0
        if prompt not in self._prompt_lengths:
            encoding = self._cut.encode(prompt)
            special = {at for at, token in self._cut.get_added_tokens_decoder().items() if token.special}
            ends = bool(encoding.ids) and (encoding.special_tokens_mask[-1] == 1 or encoding.ids[-1] in special)
            self._prompt_lengths[prompt] = len(encoding.ids) - ends
        return self._prompt_lengths[prompt]

    def encode(self, texts: Sequence[tuple[str, ...]], *, truncate: bool, prompt: str = "") -> Tokens:
        """Token ids of the texts or pairs, special tokens included; ``prompt`` stands before each text.

        Texts past the limit are cut (the longer one of a pair first), or are ``prompt_too_long`` without ``truncate``.
        Ids outside the vocabulary are ``invalid_value``: one of them would fail its whole batch on a CPU, and read
        garbage on a GPU.
        """
        whole: list[Any] = [prompt + text[0] if len(text) == 1 else (prompt + text[0], text[1]) for text in texts]
        tokenizer = self._cut if truncate else self._whole
        shortened: set[int] = set()
        clip = None if self.max_length is None else max(CLIP_CHARACTERS, 64 * self.max_length)
        if clip is not None:
            pairs = self._beginnings({i: text for i, text in enumerate(whole) if not isinstance(text, str)}, clip)
            shortened = {i for i, pair in pairs.items() if pair != whole[i]}
            whole = [pairs.get(i, text) for i, text in enumerate(whole)]
        clipped = {i for i, text in enumerate(whole) if clip is not None and isinstance(text, str) and len(text) > clip}
        encodings = tokenizer.encode_batch_fast([text[:clip] if i in clipped else text for i, text in enumerate(whole)])
        limit = self.max_length or 0
        for index in sorted(clipped):
            # Twice the limit lies within the clip: what was clipped cannot have changed the tokens before the limit.
            if len(encodings[index].ids) + len(encodings[index].overflowing) * limit < 2 * limit:
                encodings[index] = tokenizer.encode_batch_fast([whole[index]])[0]
                clipped.discard(index)
        failures: dict[int, Failure] = {}
        kept: list[list[int]] = []
        types: list[list[int]] = []
        truncated = np.zeros(len(texts), dtype=bool)
        for index, encoding in enumerate(encodings):
            ids = encoding.ids
            failure = None
            if not ids:
                failure = (RowErrorCode.INVALID_VALUE, "the text has no tokens")
            elif self.max_length is not None and len(ids) > self.max_length:
                count = f"at least {len(ids)}" if index in clipped | shortened else f"{len(ids)}"
                failure = (
                    RowErrorCode.PROMPT_TOO_LONG,
                    f"the text has {count} tokens, the model's limit is {self.max_length}",
                )
            elif self.vocab_size is not None and max(ids) >= self.vocab_size:
                failure = (
                    RowErrorCode.INVALID_VALUE,
                    f"token id {max(ids)} lies outside the model's vocabulary of {self.vocab_size}",
                )
            if failure is not None:
                failures[index] = failure
                ids = []
            kept.append(ids)
            types.append(encoding.type_ids if ids else [])
            truncated[index] = truncate and bool(ids) and len(encoding.overflowing) > 0
        return _tokens(kept, types, truncated, failures)

    def _beginnings(self, pairs: Mapping[int, tuple[str, str]], clip: int) -> dict[int, tuple[str, str]]:
        """The pairs, with long texts cut to twice as many tokens as the limit.

        Otherwise the tokenizer, which cuts the pair, would build every combination of the pieces of both texts. Which
        of two such texts keeps one token more may depend on where they were cut.
        """
        limit = self.max_length or 0
        long = {text for pair in pairs.values() for text in pair if len(text) > PAIR_CHARACTERS * limit}
        cut: dict[str, str] = {}
        if long:
            whole = list(long)
            for text, encoding in zip(
                whole, self._whole.encode_batch([text[:clip] for text in whole], add_special_tokens=False), strict=True
            ):
                if len(encoding.ids) > 2 * limit:  # otherwise it has few tokens, and stays whole
                    cut[text] = text[: encoding.offsets[2 * limit][1]]
        return {at: (cut.get(one, one), cut.get(two, two)) for at, (one, two) in pairs.items()}

    def split(self, texts: Sequence[tuple[str, ...]], tokens: Tokens, prompt: str = "") -> dict[int, Tokens]:
        """The pieces of the texts that are too long in ``tokens``, each with special tokens of its own.

        Text → its pieces, end to end. What was split is taken out of ``tokens.failures``; a text of more than
        ``MAX_PIECES`` pieces, or with an id outside the vocabulary, stays there.
        """
        found: dict[int, Tokens] = {}
        most = max(CLIP_CHARACTERS, PIECE_CHARACTERS * MAX_PIECES * (self.max_length or 1))
        for index in [i for i, (code, _) in tokens.failures.items() if code == RowErrorCode.PROMPT_TOO_LONG]:
            text = prompt + texts[index][0]
            encoding = self._cut.encode_batch_fast([text[:most]])[0]
            parts = [encoding, *encoding.overflowing]
            if len(text) > most and len(parts) <= MAX_PIECES:
                encoding = self._cut.encode_batch_fast([text])[0]
                parts = [encoding, *encoding.overflowing]
            if len(parts) > MAX_PIECES:
                count = f"at least {len(parts)}" if len(text) > most else f"{len(parts)}"
                message = f"the text has {count} pieces of {self.max_length} tokens; at most {MAX_PIECES} are run"
                tokens.failures[index] = (RowErrorCode.PROMPT_TOO_LONG, message)
                continue
            largest = max(max(part.ids) for part in parts)
            if self.vocab_size is not None and largest >= self.vocab_size:
                message = f"token id {largest} lies outside the model's vocabulary of {self.vocab_size}"
                tokens.failures[index] = (RowErrorCode.INVALID_VALUE, message)
                continue
            del tokens.failures[index]
            none = np.zeros(len(parts), dtype=bool)
            found[index] = _tokens([part.ids for part in parts], [part.type_ids for part in parts], none, {})
        return found


def _tokens(
    ids: list[list[int]], types: list[list[int]], truncated: npt.NDArray[np.bool_], failures: dict[int, Failure]
) -> Tokens:
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    total = int(lengths.sum())
    return Tokens(
        ids=np.fromiter(chain.from_iterable(ids), np.int32, total),
        types=np.fromiter(chain.from_iterable(types), np.int32, total),
        lengths=lengths,
        truncated=truncated,
        failures=failures,
    )


def _lower_case(tokenizer: Any) -> None:
    from tokenizers import normalizers

    inner = tokenizer.normalizer
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([inner] if inner is not None else [])])
