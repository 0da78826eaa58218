"""Images, sounds and videos of a row for a multimodal model: read, decoded, and put with the prompt.

That takes a processor's time and a tensor's memory, so it is done when a request is started, not when its row is read.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.engines.media import audio, columns, images
from pipeline.engines.media.audio import Sound
from pipeline.engines.media.columns import FIELDS, WORDS, Media
from pipeline.engines.media.limits import MediaLimits
from pipeline.engines.vllm.process.output import first_lines
from pipeline.engines.vllm.process.process import RunningVllm
from pipeline.engines.vllm.prompts.video import VideoLoader
from pipeline.spec.error_codes import MESSAGE_LIMIT, RowErrorCode
from pipeline.spec.job_spec import JobSpec
from storage.errors import InvalidJob, RowError, TransientError

CUT = frozenset({"Qwen2AudioForConditionalGeneration", "WhisperForConditionalGeneration"})
"""Models of which vLLM's processor drops, without a word, what comes after the window that they hear."""


class MediaInputs:
    """The images, sounds and videos of one job. ``fetch`` reads a URI that the operator allows, or raises
    :class:`InvalidInput`; ``options`` are the engine's.

    Raises :class:`InvalidJob` for a model that does not take them, :class:`EngineMissing` without PyAV for sounds.
    """

    def __init__(
        self,
        running: RunningVllm,
        spec: JobSpec,
        fetch: Callable[[str], bytes] | None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        from vllm.multimodal.media import ImageMediaIO

        self._config = running.config.model_config
        self._renderer = running.llm.renderer
        self._context: int = self._config.max_model_len
        self._fetch = fetch
        self._rate, self._frame_rate = spec.audio_sampling_rate, spec.video_frame_rate
        self.columns = columns.columns_of(spec)
        self._check_model()
        self._limits = MediaLimits.of(options or {}, self._window_seconds())
        self._images = ImageMediaIO()
        if "video" in self.columns:
            self._videos = VideoLoader(self._config, self._limits)
        if "audio" in self.columns:
            audio.check_installed()

    def _check_model(self) -> None:
        first = FIELDS[next(iter(self.columns))]
        if not self._config.is_multimodal_model:
            raise InvalidJob("this model takes text only", field=first)
        taken = set(self._renderer.get_mm_processor().info.supported_mm_limits)
        # A few models have one name for images and videos; their images can be handed over as images all the same.
        taken |= {"image"} if "vision_chunk" in taken else set()
        for modality in self.columns:
            if modality not in taken:
                able = " and ".join(words for kind, words in WORDS.items() if kind in taken)
                raise InvalidJob(f"this model takes no {WORDS[modality]}; it takes {able}", field=FIELDS[modality])

    def _window_seconds(self) -> float | None:
        if "audio" not in self.columns or not CUT & set(self._config.architectures):
            return None
        return float(self._renderer.get_mm_processor().info.get_feature_extractor().chunk_length)

    def of(self, batch: pa.RecordBatch, row: int) -> Media:
        """What the row has. Raises :class:`RowError` where something is missing."""
        return columns.media_of(self.columns, batch, row)

    def completion(self, text: str, media: Media) -> Any:
        """vLLM's input for a text, which names the places of its media as the model wants them named."""
        data = self._loaded(media)
        return self._made(lambda: self._rendered({"prompt": text, "multi_modal_data": data}, None))

    def chat(self, messages: Sequence[dict[str, Any]], media: Media, chat_params: Any) -> Any:
        """vLLM's input for messages; images, videos and sounds go before the text of the last message of a user."""
        talk = [dict(message) for message in messages]
        at = max((index for index, message in enumerate(talk) if message["role"] == "user"), default=None)
        if at is None:
            raise RowError(RowErrorCode.INVALID_VALUE, "no message is a user's, to put the media into")
        data = self._loaded(media)
        content = talk[at]["content"]
        text = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        parts = [_part(kind, number, item) for kind in FIELDS for number, item in enumerate(data.get(kind, ()))]
        talk[at]["content"] = parts + text
        tokens = self._renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False)

        def render() -> Any:
            _, prompt = self._renderer.render_messages(talk, chat_params)
            others = {kind: items for kind, items in data.items() if kind != "image"}
            if others:
                # vLLM takes sounds and videos of a message by address only; so they are named, and put in here.
                prompt["multi_modal_data"] = {**prompt["multi_modal_data"], **others}
                prompt.pop("multi_modal_uuids", None)
            return self._renderer.render_cmpl([prompt], tokens, skip_mm_cache=True)[0]

        return self._made(render)

    def _rendered(self, prompt: dict[str, Any], tokens: Any) -> Any:
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        parsed = parse_model_prompt(self._config, prompt)
        return self._renderer.render_cmpl([parsed], tokens, skip_mm_cache=True)[0]

    # ---- decoding ----

    def _loaded(self, media: Media) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        n_bytes = 0
        for modality, items in media.items.items():
            in_frames = modality == "video" and media.in_frames
            try:
                self._check_count(modality, 1 if in_frames else len(items))
                if in_frames:
                    stills = self._frames(items, n_bytes)
                    found[modality] = [self._videos.from_images(stills, self._frame_rate)]
                    n_bytes += found[modality][0][0].nbytes
                    continue
                found[modality] = []
                for item in items:
                    made, size = self._one(modality, item, n_bytes)
                    found[modality].append(made)
                    n_bytes += size
                    self._limits.check_row(n_bytes)
            except RowError as error:
                message = f"column {self.columns[modality]!r}: {error.message}"
                raise RowError(error.code, message[:MESSAGE_LIMIT]) from None
        return found

    def _read(self, item: Any) -> bytes:
        return columns.read(item, self._fetch)

    def _check_count(self, modality: str, count: int) -> None:
        """Refuse too many of a kind before any is decoded: vLLM counts only those that are."""
        allowed = self._renderer.get_mm_processor().info.allowed_mm_limits
        most = allowed.get(modality, allowed.get("vision_chunk") if modality != "audio" else None)
        if most is not None and count > most:
            message = f"the row has {count}, the model takes at most {most} (limit_mm_per_prompt)"
            raise RowError(RowErrorCode.INVALID_VALUE, message)

    def _one(self, modality: str, item: Any, before: int) -> tuple[Any, int]:
        """One of them, and its decoded bytes; the row's others have ``before``."""
        if modality == "image":
            return self._image(item, before)
        if modality == "audio":
            sound = self._heard(self._sound(item))
            return sound, sound[0].nbytes
        film = self._videos.decode(self._read(item))
        return film, film[0].nbytes

    def _frames(self, items: Sequence[Any], before: int) -> list[Any]:
        self._limits.check_video(0, len(items), 0)
        stills: list[Any] = []
        for item in items:
            still, size = self._image(item, before)
            stills.append(still)
            before += size
        return stills

    def _image(self, item: Any, before: int) -> tuple[Any, int]:
        data = self._read(item)
        try:
            # The head alone: a file of kilobytes can claim any size.
            with images.opened(data) as head:
                size = 3 * head.size[0] * head.size[1]
                self._limits.check_row(before + size)
                if images.is_deep(head):  # vLLM would cut its values off at 255
                    data = images.png(images.eight_bits(head))
            return self._images.load_bytes(data), size
        except RowError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything for broken files
            raise RowError(RowErrorCode.INVALID_IMAGE, f"{first_lines(error)} ({len(data)} bytes)") from None

    def _sound(self, item: Any) -> Sound:
        if columns.is_samples(item.type):
            return audio.from_numbers(item.values, self._rate, self._limits)
        if columns.is_sampled(item.type):
            rate = item["sampling_rate"].as_py()
            return audio.from_numbers(item["array"].values, rate, self._limits)
        return audio.decode(self._read(item), self._limits)

    def _heard(self, sound: Sound) -> Sound:
        """Resample to the model's rate where vLLM cannot: for most models it uses torchaudio, which may be missing."""
        from vllm.multimodal.audio import resample_audio_pyav

        samples, rate = sound
        resampler = self._renderer.get_mm_processor().info.data_parser.audio_resampler
        if resampler.method != "torchaudio" or importlib.util.find_spec("torchaudio") or not resampler.target_sr:
            return sound
        wanted = int(resampler.target_sr)
        return resample_audio_pyav(samples, orig_sr=rate, target_sr=wanted), wanted

    def _made(self, render: Callable[[], Any]) -> Any:
        try:
            made = render()
        except (RowError, TransientError, MemoryError):
            raise
        except (
            Exception
        ) as error:  # a prompt that does not fit its media: assertions and more, as the model's code likes
            long = str(getattr(error, "parameter", "")).startswith("input_")
            code = RowErrorCode.PROMPT_TOO_LONG if long else RowErrorCode.INVALID_VALUE
            raise RowError(code, first_lines(error, MESSAGE_LIMIT)) from None
        if (size := len(made.get("decoder_prompt", made)["prompt_token_ids"])) >= self._context:
            message = f"the prompt has {size} tokens with its media; with one more it must fit into {self._context}"
            raise RowError(RowErrorCode.PROMPT_TOO_LONG, message)
        return made


def _part(modality: str, number: int, item: Any) -> dict[str, Any]:
    if modality == "image":
        return {"type": "image_pil", "image_pil": item}
    return {"type": f"{modality}_url", f"{modality}_url": None, "uuid": f"{modality}-{number}"}
