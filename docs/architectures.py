"""Writes ``docs/reference/architectures.md``: what Rowmill does with twenty architectures, against PyTorch.

Each is a tiny checkpoint with random, widely spread weights. Rows of every length run on ONNX Runtime one by one and
all together, and PyTorch computes each row alone. This takes minutes: ``python docs/architectures.py`` is run by hand
after a change to the export or the engine.
"""

from __future__ import annotations

import importlib
import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers

from examples.tiny_encoder import build_encoder, vocabulary
from pipeline import Client
from pipeline.config.settings import Settings
from storage.errors import InvalidModel, RowmillError

PAGE = Path(__file__).resolve().parent / "reference" / "architectures.md"
LIMIT = 64
"""Tokens that each text model takes, with the special ones."""
WORDS = {"1 word": 1, "short": 7, "max − 1": LIMIT - 3, "max": LIMIT - 2, "max + 1": LIMIT - 1, "700 words": 700}
"""Rows by name, in words of one token; a text has two special tokens."""
SIDES = {"20 × 45": (20, 45), "32 × 32": (32, 32), "300 × 200": (300, 200)}
"""Images by name: width and height, in pixels."""
BATCHES = {"alone": 1, "together": 256}
TOLERANCE = 1e-5
_TEXT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_COMMON: dict[str, Any] = {"vocab_size": len(vocabulary()), "max_position_embeddings": LIMIT, "pad_token_id": 0}
# Their position ids start after the padding's.
_OFFSET: dict[str, Any] = {"max_position_embeddings": LIMIT + 1}
_LABELS: dict[str, Any] = {"id2label": dict(enumerate("abc")), "label2id": {name: at for at, name in enumerate("abc")}}


@dataclass(frozen=True)
class Checkpoint:
    """``kind``: the class of Transformers, whose configuration is ``family`` + ``Config``."""

    name: str
    family: str
    kind: str
    task: str
    config: Mapping[str, Any]

    @property
    def of_images(self) -> bool:
        return self.kind.endswith("ForImageClassification")


def _encoder(name: str, family: str, kind: str = "", /, **config: Any) -> Checkpoint:
    return Checkpoint(name, family, kind or f"{family}Model", "embed", {**_TEXT, **_COMMON, **config})


def _image(name: str, family: str, **config: Any) -> Checkpoint:
    return Checkpoint(name, family, f"{family}ForImageClassification", "classify", {**_LABELS, **config})


_PATCHES = {**_TEXT, "image_size": 32, "patch_size": 8}
_T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "n_positions": LIMIT}
_STAGES: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1]}
CHECKPOINTS = (
    _encoder("BERT", "Bert"),
    _encoder("RoBERTa", "Roberta", **_OFFSET),
    _encoder("XLM-RoBERTa", "XLMRoberta", **_OFFSET),
    _encoder("MPNet", "MPNet", pad_token_id=1, max_position_embeddings=LIMIT + 2),
    _encoder("DistilBERT", "DistilBert", dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    _encoder("ALBERT", "Albert", embedding_size=16),
    _encoder("DeBERTa-v2", "DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16),
    _encoder("ELECTRA", "Electra", embedding_size=16),
    _encoder("ModernBERT", "ModernBert", global_attn_every_n_layers=2, local_attention=16),
    _encoder("T5 encoder", "T5", "T5EncoderModel", **_T5),
    _encoder("Longformer", "Longformer", **_OFFSET, attention_window=[16, 16]),
    _image("ViT", "ViT", **_PATCHES),
    _image("DeiT", "DeiT", **_PATCHES),
    _image("ResNet", "ResNet", embedding_size=8, layer_type="basic", **_STAGES),
    _image("ConvNeXt", "ConvNext", num_stages=2, **_STAGES),
    _image("Swin", "Swin", image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4),
    _image("MobileNetV2", "MobileNetV2", depth_multiplier=0.35, image_size=32),
    Checkpoint("Token classifier", "Bert", "BertForTokenClassification", "classify", {**_TEXT, **_COMMON, **_LABELS}),
    Checkpoint(
        "Cross-encoder", "Bert", "BertForSequenceClassification", "score", {**_TEXT, **_COMMON, "num_labels": 1}
    ),
    Checkpoint(
        "Multi-label classifier",
        "Bert",
        "BertForSequenceClassification",
        "classify",
        {**_TEXT, **_COMMON, **_LABELS, "problem_type": "multi_label_classification"},
    ),
)


def built(checkpoint: Checkpoint, folder: Path, tokenizer: Path) -> Any:
    """Write the checkpoint into ``folder``; returns the model of PyTorch."""
    torch.manual_seed(0)
    found: Any = importlib.import_module("transformers")
    model = getattr(found, checkpoint.kind)(getattr(found, f"{checkpoint.family}Config")(**checkpoint.config)).eval()
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if weight is not None and weight.dim() > 1:
                spread = 1.0 if isinstance(module, torch.nn.Embedding) else 1.5 / float(weight[0].numel()) ** 0.5
                weight.normal_(0, spread)
    model.requires_grad_(False).save_pretrained(folder)
    if checkpoint.of_images:
        _export(model, folder)
        recipe = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
        (folder / "preprocessor_config.json").write_text(json.dumps(recipe))
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((tokenizer / name).read_bytes())
    return model


def _export(model: Any, folder: Path) -> None:
    """Image classifiers are run as the graphs that their users export."""

    class Logits(torch.nn.Module):
        def forward(self, pixel_values: Any) -> Any:
            return model(pixel_values).logits

    axes = {"pixel_values": {0: "batch"}, "logits": {0: "batch"}}
    given: Any = torch.zeros(2, 3, 32, 32)
    torch.onnx.export(
        Logits().eval(),
        (given,),
        str(folder / "model.onnx"),
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_axes=axes,
        dynamo=False,
    )
    (folder / "model.safetensors").unlink()


def texts() -> dict[str, str]:
    # Words of the vocabulary alone: each of them is one token.
    words = [word for word in vocabulary() if word.isalpha() and len(word) > 1]
    rng = np.random.default_rng(0)
    return {name: " ".join(rng.choice(words, n)) for name, n in WORDS.items()}


def pictures() -> dict[str, PIL.Image.Image]:
    rng = np.random.default_rng(0)
    return {
        name: PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        for name, (width, height) in SIDES.items()
    }


def expected(checkpoint: Checkpoint, model: Any, folder: Path) -> list[np.ndarray[Any, Any]]:
    """What PyTorch makes of each row alone: an embedding (mean of the token states), the labels' scores, or a score."""
    answers = []
    for inputs in _image_inputs() if checkpoint.of_images else _text_inputs(checkpoint, folder):
        with torch.no_grad():
            output = model(**inputs)
        if checkpoint.task == "embed":
            answers.append(output.last_hidden_state[0].mean(dim=0).numpy())
        elif checkpoint.config.get("problem_type") or checkpoint.task == "score":
            answers.append(torch.sigmoid(output.logits[0]).numpy())
        else:
            answers.append(torch.softmax(output.logits[0], dim=-1).numpy())
    return answers


def _text_inputs(checkpoint: Checkpoint, folder: Path) -> list[dict[str, Any]]:
    kind: Any = transformers.PreTrainedTokenizerFast
    tokenizer = kind(tokenizer_file=str(folder / "tokenizer.json"))
    inputs = []
    for text in texts().values():
        pair = (text, "red river") if checkpoint.task == "score" else (text,)
        # A text that is scored is cut itself, not the question beside it.
        cut = "only_first" if checkpoint.task == "score" else True
        encoded = tokenizer(*pair, return_tensors="pt", truncation=cut, max_length=LIMIT, return_token_type_ids=True)
        if checkpoint.family != "Bert":
            del encoded["token_type_ids"]
        inputs.append(dict(encoded))
    return inputs


def _image_inputs() -> list[dict[str, Any]]:
    module: Any = importlib.import_module("transformers.models.vit.image_processing_pil_vit")
    processor = module.ViTImageProcessorPil(size={"height": 32, "width": 32})
    return [{"pixel_values": torch.tensor(np.asarray(processor(one)["pixel_values"]))} for one in pictures().values()]


def rows_of(checkpoint: Checkpoint) -> pa.Table:
    if not checkpoint.of_images:
        given = list(texts().values())
        return pa.table({"row": given, "other": ["red river"] * len(given)})
    files = []
    for picture in pictures().values():
        file = io.BytesIO()
        picture.save(file, "PNG")
        files.append(file.getvalue())
    return pa.table({"row": pa.array(files, pa.binary())})


def computed(client: Client, checkpoint: Checkpoint, model: Path, home: Path, batch: int) -> list[np.ndarray[Any, Any]]:
    """What a job makes of the rows, ``batch`` of them at a time at most. Raises :class:`RowmillError`."""
    pq.write_table(rows_of(checkpoint), home / "rows.parquet")
    fields: dict[str, Any] = {"column": "row", "engine_options": {"max_batch": batch}}
    if not checkpoint.of_images:
        fields["overlong"] = "truncate"
    if checkpoint.task == "embed":
        fields["pooling"] = "mean"
    if checkpoint.task == "score":
        fields["pair_column"] = "other"
    out = home / f"out-{batch}"
    status = client.run(
        input=str(home / "rows.parquet"), output=str(out), model=str(model), task=checkpoint.task, **fields
    )
    if status.state != "completed":
        raise InvalidModel(str(status.error))
    assert status.rows_failed == 0, status
    table: Any = pq.read_table(out / "data")
    if checkpoint.task == "embed":
        return [np.asarray(vector) for vector in table["embedding"].to_pylist()]
    if checkpoint.task == "score":
        return [np.asarray([score]) for score in table["score"].to_pylist()]
    return [
        np.asarray([{pair["label"]: pair["score"] for pair in row}[name] for name in "abc"])
        for row in table["scores"].to_pylist()
    ]


def compared(client: Client, checkpoint: Checkpoint, home: Path, tokenizer: Path) -> tuple[str, dict[str, list[float]]]:
    """The outcome, and the largest differences by kind of batch, row by row."""
    folder = home / "model"
    reference = expected(checkpoint, built(checkpoint, folder, tokenizer), folder)
    differences: dict[str, list[float]] = {}
    for name, size in BATCHES.items():
        try:
            found = computed(client, checkpoint, folder, home, size)
        except RowmillError as error:
            # What follows is PyTorch's own text, which differs from version to version.
            why = str(error).partition(": torchscript: ")[0].replace(str(folder), "it")
            return f"refused: {why}", {}
        scale = max(1.0, *(float(np.abs(row).max()) for row in reference))
        differences[name] = [
            float(np.abs(one - other).max()) / scale for one, other in zip(found, reference, strict=True)
        ]
    most = max(max(each) for each in differences.values())
    return "PASS" if most <= TOLERANCE else "FAIL", differences


def page(outcomes: Mapping[str, tuple[str, str, dict[str, list[float]]]]) -> str:
    lines = [
        "<!-- Generated from docs/architectures.py; do not edit. -->",
        "# Architectures",
        "What ONNX Runtime makes of a tiny checkpoint of each architecture, with random and widely spread weights,",
        "against PyTorch. Every row runs twice: *alone*, in a batch of its own, and *together* with the others. A",
        "number is the largest difference from what PyTorch computes for that row alone, relative to the largest",
        f"number of the task's answers (or to 1, if that is more). PASS: no difference above {TOLERANCE:g}.",
    ]
    for title, names, is_image in (("Texts", WORDS, False), ("Images", SIDES, True)):
        lines += ["", f"## {title}", *_about(is_image), ""]
        head = ["Architecture", "Task", "Batch", *names, "Outcome"]
        lines += [_row(head), _row(["---"] * len(head))]
        for checkpoint in (each for each in CHECKPOINTS if each.of_images == is_image):
            task, outcome, differences = outcomes[checkpoint.name]
            if not differences:
                lines.append(_row([checkpoint.name, task, "", *[""] * len(names), outcome]))
            for kind, each in differences.items():
                lines.append(_row([checkpoint.name, task, kind, *(f"{number:.0e}" for number in each), outcome]))
    return "\n".join(lines) + "\n"


def _about(is_image: bool) -> Sequence[str]:
    if is_image:
        return ("Images of these widths and heights, in pixels. Each model takes 32 × 32, as an ONNX graph.",)
    return (f"`max` is a text that fills the {LIMIT} tokens of each model to the last; longer ones are cut there.",)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def main(say: Callable[[str], None] = print) -> None:
    torch.set_num_threads(1)
    outcomes = {}
    with tempfile.TemporaryDirectory(prefix="rowmill-architectures-") as place:
        root = Path(place)
        tokenizer = build_encoder(root / "tokenizer")
        with Client(settings=Settings(data_dir=root / "data", cache_dir=root / "cache")) as client:
            for number, checkpoint in enumerate(CHECKPOINTS):
                home = root / str(number)
                home.mkdir()
                outcome, differences = compared(client, checkpoint, home, tokenizer)
                outcomes[checkpoint.name] = (checkpoint.task, outcome, differences)
                say(f"{checkpoint.name}: {outcome} {differences}")
    PAGE.write_text(page(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
