"""Images: the recipe beside Transformers' own, whole models beside PyTorch, and what becomes of broken ones."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import PIL.Image
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from examples.tiny_vision import LABELS, build_resnet, build_vit
from pipeline import Client
from pipeline.config.settings import Settings
from pipeline.engines.base import EngineContext
from pipeline.engines.media import images
from pipeline.engines.media.images import lookup_table, opened, to_input
from pipeline.engines.model_config.image import recipe
from pipeline.engines.onnx.engine import OnnxEngine
from pipeline.engines.onnx.models import image_model
from pipeline.engines.onnx.models.image_model import ImageModel
from pipeline.models.resolve import resolve
from pipeline.process.permissions import RowFiles
from storage.errors import InvalidInput, InvalidJob, InvalidModel
from storage.objects.store import ObjectStore
from tests.engines.onnx.support import FLOAT, batches, by_label, embeddings, graph, job, model_at, model_of, run, value
from tests.examples import examples

SPEC = job("classify", column="image")


def picture(seed: int, width: int = 40, height: int = 30, mode: str = "RGB") -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


def encoded(image: PIL.Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def loaded(vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnnxEngine]:
    made = image_engine(vit, "classify", tmp_path_factory.mktemp("cache"))
    yield made
    made.close()


def image_engine(path: Path, task: str, cache: Path, fetch: Any = None, **options: Any) -> OnnxEngine:
    spec = job(task, column="image")
    made = OnnxEngine(resolve(str(path), cache), spec.task, options, EngineContext(cache, fetch=fetch))
    made.load()
    return made


PROCESSORS = [
    ("ViT", {}),
    ("ViT", {"size": {"height": 17, "width": 23}, "resample": 3}),
    ("DeiT", {"size": {"height": 25, "width": 25}, "crop_size": {"height": 20, "width": 33}}),
    ("CLIP", {"size": {"shortest_edge": 31}, "crop_size": {"height": 28, "width": 28}}),
    ("CLIP", {"do_resize": False, "crop_size": {"height": 21, "width": 50}}),
    ("Bit", {"size": {"shortest_edge": 20}, "crop_size": {"height": 33, "width": 26}}),
    ("Siglip", {"size": {"height": 16, "width": 24}}),
    ("ConvNext", {"size": {"shortest_edge": 28}}),
    ("ConvNext", {"size": {"shortest_edge": 384}}),
    ("ViT", {"do_normalize": False, "rescale_factor": 1 / 127.5, "size": {"height": 9, "width": 9}}),
    ("ViT", {"do_rescale": False, "do_resize": False}),
]


@pytest.mark.parametrize(("kind", "fields"), PROCESSORS, ids=str)
@settings(deadline=None, max_examples=examples(10))  # a busy machine is no failure
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 99), st.sampled_from(["RGB", "L", "RGBA", "P"]))
def test_the_recipe_is_bit_equal_to_transformers(
    kind: str, fields: dict[str, Any], width: int, height: int, seed: int, mode: str
) -> None:
    module = __import__(f"transformers.models.{kind.lower()}.image_processing_pil_{kind.lower()}", fromlist=["x"])
    theirs = getattr(module, f"{kind}ImageProcessorPil")(**fields)
    image = picture(seed, width, height, mode)
    expected = theirs(image.convert("RGB"), return_tensors="np")["pixel_values"][0]
    written = json.loads(theirs.to_json_string())
    for config in (written, {"image_processor_type": written["image_processor_type"]} | fields):
        made = recipe(config, "preprocessor_config.json")
        ours = to_input(opened(encoded(image)).convert("RGB"), made, lookup_table(made))
        assert ours.dtype == np.float32
        assert np.array_equal(ours, expected.astype(np.float32))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"image_processor_type": "DetrImageProcessor"}, "asks for DetrImageProcessor; engine 'onnx' does ViTImage"),
        ({}, "asks for no known image processor"),
        ({"image_processor_type": "ViTImageProcessor", "do_pad": True}, "asks for padding"),
        ({"image_processor_type": "CLIPImageProcessor", "size": {"longest_edge": 3}}, "size {'longest_edge': 3}"),
        ({"image_processor_type": "ViTImageProcessor", "image_mean": [0.5]}, "1 channels; images have three here"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidModel, match=says):
        recipe(config, "preprocessor_config.json")


def test_a_classifier_of_images_agrees_with_pytorch(loaded: OnnxEngine, vit: Path, tmp_path: Path) -> None:
    import torch
    import transformers

    pictures = [picture(n, 20 + n, 45 - n) for n in range(23)]
    table, failures = run(loaded, SPEC, pa.record_batch({"image": [encoded(image) for image in pictures]}), size=10)
    assert not failures
    module = __import__("transformers.models.vit.image_processing_pil_vit", fromlist=["x"])
    config = json.loads((vit / "preprocessor_config.json").read_text())
    pixels = module.ViTImageProcessorPil(**config)(pictures, return_tensors="np")["pixel_values"]
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig.from_pretrained(vit)).eval()
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor(np.asarray(pixels))).logits, dim=-1).numpy()
    found = np.array([by_label(row, LABELS) for row in table.column("scores").to_pylist()])
    assert np.abs(found - expected).max() < 1e-5
    assert table.column("label").to_pylist() == [LABELS[at] for at in expected.argmax(axis=1)]
    stats = loaded.stats()
    assert stats["output"] == "logits" and stats["image_batch"] == 8


GREY = np.full((8, 8), 128, np.uint8)


@pytest.mark.parametrize("axes", [["b", 3, 8, 8], ["b", 8, 8, 3], [None, None, None, 3], ["b", "h", "w", 3]], ids=str)
def test_colours_arrive_where_the_graph_has_its_channels(tmp_path: Path, axes: list[Any]) -> None:
    """A graph of the mean of each channel, in either layout; grey values of more than 8 bits are scaled."""
    last = axes[3] == 3
    over = [1, 2] if last else [2, 3]
    (tmp_path / "m").mkdir()
    graph(
        tmp_path / "m/model.onnx",
        [helper.make_node("ReduceMean", ["pixel_values"], ["pooler_output"], axes=over, keepdims=0)],
        [value("pixel_values", FLOAT, axes)],
        [value("pooler_output", FLOAT, ["b", 3])],
        opset=17,
    )
    recipe = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "do_normalize": False}
    (tmp_path / "m/preprocessor_config.json").write_text(json.dumps(recipe))
    (tmp_path / "m/config.json").write_text("{}")
    flat = np.broadcast_to(np.array([255, 0, 51], np.uint8), (8, 8, 3))
    wide = GREY.astype(np.uint16) * 257
    deep = (wide, "PNG"), (wide, "TIFF"), (GREY / np.float32(255), "TIFF")
    pictures = [PIL.Image.fromarray(array) for array in (flat, GREY, *(array for array, _ in deep))]
    kinds = ["PNG", "PNG", *(kind for _, kind in deep)]
    bad = [(np.full((8, 8), 200, np.float32), "floats"), (np.full((8, 8), 200, np.int32), "32-bit")]
    rows = [encoded(image, kind) for image, kind in zip(pictures, kinds, strict=True)]
    rows += [encoded(PIL.Image.fromarray(array), "TIFF") for array, _ in bad]
    made = image_engine(tmp_path / "m", "embed", tmp_path)
    table, failures = run(made, job("embed", column="image"), pa.record_batch({"image": rows}))
    made.close()
    want = [[1.0, 0.0, 0.2], *[[128 / 255] * 3] * 4]
    assert np.allclose(embeddings(table), want, atol=1e-6)
    assert {row: failure.code for row, failure in failures.items()} == {5: "invalid_image", 6: "invalid_image"}
    assert all(words in failures[5 + at].message for at, (_, words) in enumerate(bad))


def test_a_job_names_the_classes(vit: Path, tmp_path: Path) -> None:
    names = [f"kind {n}" for n in range(len(LABELS))]
    made = image_engine(vit, "classify", tmp_path, labels=names)
    table, _ = run(made, SPEC, pa.record_batch({"image": [encoded(picture(1))]}))
    made.close()
    assert {pair["label"] for pair in table.column("scores")[0].as_py()} == set(names)
    with pytest.raises(InvalidJob, match=r"engine_options\.labels: 1 names for 4 classes"):
        image_engine(vit, "classify", tmp_path, labels=["one"])


def test_a_resnet_classifies_and_a_headless_vit_embeds(tmp_path: Path) -> None:
    rows = pa.record_batch({"image": [encoded(picture(n, 60, 50)) for n in range(9)]})
    made = image_engine(build_resnet(tmp_path / "resnet"), "classify", tmp_path)
    table, failures = run(made, job("classify", column="image", top_k=1), rows)
    made.close()
    assert not failures and {len(row) for row in table.column("scores").to_pylist()} == {1}
    path = build_vit(tmp_path / "vit", head=False)
    made = image_engine(path, "embed", tmp_path)
    assert made.stats()["output"] == "pooler_output"
    spec = job("embed", column="image", normalize=True)
    table, failures = run(made, spec, rows)
    made.close()
    assert not failures and table.schema.names == ["embedding"]
    assert np.allclose(np.linalg.norm(embeddings(table), axis=1), 1, atol=1e-5)


def test_an_image_is_the_same_in_every_kind_of_column(loaded: OnnxEngine) -> None:
    data = [encoded(picture(n)) for n in range(5)]
    kinds = [pa.binary(), pa.large_binary(), pa.binary_view()]
    pair = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
    columns = [pa.array([data[0], *data], kind) for kind in kinds]
    columns.append(pa.array([{"bytes": item, "path": "x.png"} for item in [data[0], *data]], pair))
    tables = [run(loaded, SPEC, pa.record_batch({"image": column}).slice(1))[0] for column in columns]
    assert all(table.equals(tables[0]) for table in tables) and tables[0].num_rows == 5


def test_images_stand_in_a_text_column_themselves(loaded: OnnxEngine) -> None:
    data = [encoded(picture(n)) for n in range(2)]
    plain = [base64.b64encode(item).decode() for item in data]
    texts = [f"data:image/png;base64,{plain[0]}", plain[0], base64.encodebytes(data[0]).decode(), plain[1]]
    texts += ["data:image/png;base64,AAA", "x" * 200, "/" + "a" * 99]
    expected, _ = run(loaded, SPEC, pa.record_batch({"image": pa.array([data[at] for at in (0, 0, 0, 1)])}))
    table, failures = run(loaded, SPEC, pa.record_batch({"image": texts}))
    assert table.equals(expected)
    assert {row: failure.code for row, failure in failures.items()} == {
        4: "unreadable_uri",
        5: "invalid_image",
        6: "unreadable_uri",
    }
    assert "Base64" in failures[4].message


def test_a_broken_image_fails_its_row_only(loaded: OnnxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    good = encoded(picture(0))
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 30)
    large = encoded(picture(1, 41, 30))
    rows = [good, good[: len(good) // 2], b"", None, b"no image", good[:8] + b"\0" * 50, large, good]
    table, failures = run(loaded, SPEC, pa.record_batch({"image": pa.array(rows, pa.binary())}))
    codes = {row: failure.code for row, failure in failures.items()}
    assert codes == {3: "missing_value"} | dict.fromkeys([1, 2, 4, 5, 6], "invalid_image")
    assert "truncated" in failures[1].message
    assert "no image in a format that Pillow reads (8 bytes)" in failures[4].message
    assert "41 × 30 pixels are more than 1200" in failures[6].message
    assert table.num_rows == 2 and table.slice(0, 1).equals(table.slice(1, 1))


def test_only_formats_of_photographs_are_read(loaded: OnnxEngine) -> None:
    rows = [encoded(picture(0), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PCX", "EPS")]
    _, failures = run(loaded, SPEC, pa.record_batch({"image": pa.array(rows, pa.binary())}))
    assert list(failures) == [6, 7]
    assert all("no image in a format" in failure.message for failure in failures.values())


def test_what_becomes_large_is_decoded_alone_too(loaded: OnnxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(loaded, ImageModel)
    reader = model._reader
    becomes = images.resized((2, 2), reader._recipe)
    assert becomes is not None and becomes[0] * becomes[1] > 100
    monkeypatch.setattr(images, "LARGE_PIXELS", 100)
    assert reader._memory_for((2, 2)) is reader._large


def test_a_window_ends_on_decoded_bytes(loaded: OnnxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(loaded, ImageModel)
    rows = pa.record_batch({"image": [*(encoded(picture(n)) for n in range(20)), b"no image"]})
    whole, _ = run(loaded, SPEC, rows)
    assert len(list(model.prepare(SPEC, batches(rows)))) < 3
    monkeypatch.setattr(image_model, "DECODED_BYTES", 1)
    found = list(model.prepare(SPEC, batches(rows)))
    assert len(found) == 3 and [len(window.batches) for window in found] == [8, 8, 4]
    parts, failures = run(loaded, SPEC, rows)
    assert list(failures) == [20]
    scores = [np.asarray(table.column("score").combine_chunks()) for table in (parts, whole)]
    assert np.allclose(*scores, atol=1e-5)


def test_a_batch_that_is_halved_while_a_window_is_read(loaded: OnnxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(loaded, ImageModel)
    rows = pa.record_batch({"image": [encoded(picture(n)) for n in range(30)]})
    expected, _ = run(loaded, SPEC, rows)
    read, size = images.ImageReader.read, model.batch

    def halving(self: images.ImageReader, column: Any, name: str) -> Any:
        model._too_large(model.batch)  # as a lane does that runs out of memory
        return read(self, column, name)

    monkeypatch.setattr(images.ImageReader, "read", halving)
    try:
        table, failures = run(loaded, SPEC, rows)
    finally:
        model.batch = size
    assert not failures and table.column("label").equals(expected.column("label"))
    assert np.allclose(table.column("score").to_numpy(), expected.column("score").to_numpy(), atol=1e-5)


def test_a_pooling_is_of_the_token_states(vit: Path, tmp_path: Path) -> None:
    rows = pa.record_batch({"image": [encoded(picture(n)) for n in range(5)]})
    path = build_vit(tmp_path / "vit", head=False)
    made = image_engine(path, "embed", tmp_path)
    found = {
        how: embeddings(run(made, job("embed", column="image", pooling=how, normalize=False), rows)[0])
        for how in ("auto", "mean", "cls", "last")
    }
    model = model_of(made, ImageModel)
    pixels = np.stack([model._reader.prepare(encoded(picture(n))) for n in range(5)])
    made.close()
    session = onnxruntime.InferenceSession(str(path / "model.onnx"), providers=["CPUExecutionProvider"])
    states, pooled = session.run(["last_hidden_state", "pooler_output"], {"pixel_values": pixels})
    expected = {"auto": pooled, "mean": states.mean(axis=1), "cls": states[:, 0], "last": states[:, -1]}
    for how, vectors in expected.items():
        assert np.allclose(found[how], vectors, atol=1e-5), how


def test_a_pooling_of_a_graph_that_pools_is_refused(tmp_path: Path) -> None:
    path = build_vit(tmp_path / "vit", head=False)
    graph = onnx.load(path / "model.onnx")
    del graph.graph.output[0]
    onnx.save(graph, path / "model.onnx")
    schema, spec = pa.schema([pa.field("image", pa.binary())]), job("embed", column="image", pooling="mean")
    with pytest.raises(InvalidJob, match="pools by itself") as caught:
        OnnxEngine.check(spec, model_at(path, graphs=["model.onnx"]), schema)
    assert caught.value.field == "pooling"


def test_large_images_are_the_same_as_small_ones(loaded: OnnxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are decoded one at a time."""
    rows = pa.record_batch({"image": [encoded(picture(n)) for n in range(9)]})
    small, _ = run(loaded, SPEC, rows)
    monkeypatch.setattr(images, "LARGE_PIXELS", 0)
    large, failures = run(loaded, SPEC, rows)
    assert not failures and large.equals(small)


def test_uris_are_read_below_the_allowed_places_only(vit: Path, tmp_path: Path) -> None:
    allowed, secret = tmp_path / "images", tmp_path / "secret"
    for folder in (allowed, secret, tmp_path / "images2"):
        folder.mkdir()
        (folder / "a.png").write_bytes(encoded(picture(0)))
    (allowed / "link.png").symlink_to(secret / "a.png")
    (allowed / "folder.png").mkdir()
    (allowed / "loop.png").symlink_to(allowed / "loop.png")
    uris = [
        str(allowed / "a.png"),
        f"file://{allowed}/a.png",
        str(allowed / "none.png"),
        str(allowed / ".." / "secret" / "a.png"),
        str(allowed / "link.png"),
        str(tmp_path / "images2" / "a.png"),
        "https://example.com/a.png",
        f"simplecache::file://{allowed}/a.png",
        str(allowed / "folder.png"),
        "s3://bucket/a.png",
        str(allowed / "a\0.png"),
        str(allowed / ("x" * 100_000)),
        str(allowed / "loop.png"),
        "",
        None,
    ]
    rows = pa.record_batch({"image": pa.array(uris, pa.string())})
    made = image_engine(vit, "classify", tmp_path, fetch=RowFiles(ObjectStore(), [str(allowed)]))
    table, failures = run(made, SPEC, rows)
    made.close()
    assert table.num_rows == 2
    codes = {row: failure.code for row, failure in failures.items()}
    assert codes == dict.fromkeys(range(2, 14), "unreadable_uri") | {14: "missing_value"}
    assert "does not exist" in failures[2].message
    for row in (3, 4, 5, 9):
        assert "lies outside the places that the operator's setting uri_prefixes allows" in failures[row].message
    made = image_engine(vit, "classify", tmp_path, fetch=RowFiles(ObjectStore(), []))
    _, failures = run(made, SPEC, rows)
    made.close()
    assert len(failures) == 15 and "allows no place" in failures[0].message


def test_uris_of_an_object_store_through_a_job(vit: Path, tmp_path: Path, s3: Any) -> None:
    import pyarrow.parquet as pq
    import s3fs

    bucket = s3fs.S3FileSystem(**s3.storage_options["s3"])
    for n in range(4):
        bucket.pipe_file(f"{s3.bucket}/images/{n}.png", encoded(picture(n)))
    names = [f"s3://{s3.bucket}/images/{n}.png" for n in range(5)] + [f"s3://{s3.bucket}/other/0.png"]
    pq.write_table(pa.table({"image": names}), tmp_path / "rows.parquet")
    settings = Settings(
        data_dir=tmp_path / "data",
        cache_dir=tmp_path / "cache",
        storage_options=s3.storage_options,
        uri_prefixes=(f"s3://{s3.bucket}/images",),
    )
    with Client(settings=settings) as client:
        out = tmp_path / "out"
        status = client.run(
            input=str(tmp_path / "rows.parquet"), output=str(out), model=str(vit), task="classify", column="image"
        )
    assert (status.rows_done, status.rows_failed) == (6, 2)
    table = pq.read_table(out / "data")
    assert [error and error["code"] for error in table.column("error").to_pylist()] == [None] * 4 + [
        "unreadable_uri"
    ] * 2
    assert None not in table.column("label").to_pylist()[:4]


@pytest.mark.parametrize(
    ("spec", "kind", "error", "says"),
    [
        (SPEC, pa.int64(), InvalidInput, "column 'image' is int64; images are binary"),
        (job("classify", column="picture"), pa.binary(), InvalidInput, "no column 'picture'"),
        (job("classify", column="image", pair_column="image"), pa.binary(), InvalidJob, "takes one image a row"),
        (job("score", column="image"), pa.binary(), InvalidModel, "takes images: it does embed and classify"),
    ],
    ids=["type", "missing", "pair", "score"],
)
def test_check_refuses_what_cannot_work(vit: Path, spec: Any, kind: Any, error: type[Exception], says: str) -> None:
    schema = pa.schema([pa.field("image", kind)])
    with pytest.raises(error, match=says):
        OnnxEngine.check(spec, model_at(vit, graphs=["model.onnx"]), schema)


def test_a_recipe_that_does_not_fit_the_graph_is_refused_at_load(vit: Path, tmp_path: Path) -> None:
    path = build_vit(tmp_path / "vit")
    config = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(json.dumps(config | {"size": {"height": 24, "width": 24}}))
    with pytest.raises(InvalidModel, match=r"does not run on an image of shape \[3, 24, 24\]"):
        image_engine(path, "classify", tmp_path)
