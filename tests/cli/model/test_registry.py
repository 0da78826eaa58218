"""``rowmill model add … remove``: what scripts rest on, the names in documents and the exit codes."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq

from examples.tiny_encoder import build_encoder
from tests.cli.conftest import Rowmill
from tests.cli.model.test_model import texts
from tests.registry.models import write_model


def test_from_a_draft_to_a_rollback(rowmill: Rowmill) -> None:
    pq.write_table(pa.table({"text": ["a", "b"]}), rowmill.home / "in.parquet")
    write_model(rowmill.home / "one")
    write_model(rowmill.home / "two", seed=1)
    first = rowmill.inside("model", "add", "encoder", "one", "-t", "embed", "--alias", "prod", "--json")
    assert first.code == 0, first.err
    document = {key: value for key, value in first.document.items() if key != "version"}
    assert set(document) == {"name", "revision", "digest", "state"}
    assert (document["name"], document["revision"], document["state"]) == ("encoder", 1, "draft")
    second = rowmill.inside("model", "add", "encoder", "two", "--json")
    assert second.document["revision"] == 2

    refused = rowmill.inside("model", "activate", "encoder")
    assert refused.code == 1 and "encoder@2 was not validated" in refused.err
    for name in ("encoder@1", "encoder"):
        done = rowmill.inside("model", "activate", name, "--force", "--reason", "a test", "--json")
        assert done.code == 0 and done.document["state"] == "active", done.err
    again = rowmill.inside("model", "activate", "encoder", "--force")
    assert again.code == 1 and "is active already" in again.err

    run = ("run", "in.parquet", "-t", "embed", "--column", "text", "--set", "delay_ms_per_batch=0", "--engine", "fake")
    for name, digest in (("encoder", second), ("encoder@prod", first)):
        done = rowmill.inside(*run, "-o", name, "-m", name)
        assert done.code == 0, done.err
        manifest = json.loads((rowmill.home / name / "_manifest.json").read_bytes())
        assert manifest["model"]["digest"] == digest.document["digest"]

    back = rowmill.inside("model", "rollback", "encoder", "--json")
    assert (back.code, back.document["revision"], back.document["state"]) == (0, 1, "active")
    assert rowmill.inside("model", "rollback", "encoder").code == 1
    events = rowmill.inside("model", "history", "encoder", "--json").document["events"]
    assert all({"at", "actor", "from", "to", "reason", "forced"} <= set(event) for event in events)
    moves = [(event["type"], event["revision"], event["forced"]) for event in events if event["to"] == "active"]
    assert moves == [("activated", 1, True), ("activated", 2, True), ("rolled_back", 1, False)]
    then = rowmill.inside("model", "history", "encoder", "--at", "2020-01-01", "--json")
    assert then.document["active"] is None
    assert rowmill.inside("model", "history", "encoder", "--at", "0.0s", "--json").document["active"]["revision"] == 1

    listed = rowmill.inside("model", "list", "--json").document["models"]
    assert [(item["name"], item["active"], item["aliases"]) for item in listed] == [("encoder", 1, {"prod": 1})]
    assert rowmill.inside("model", "alias", "encoder@2", "prod").code == 0
    for command in (("list",), ("show", "encoder"), ("show", "encoder@prod"), ("history", "encoder")):
        done = rowmill.inside("model", *command)
        assert done.code == 0 and "encoder" in done.out + str(command), done.err
    assert rowmill.inside("model", "remove", "encoder").code == 2
    assert rowmill.inside("model", "retire", "encoder", "--json").document["state"] == "retired"
    assert rowmill.inside("model", "remove", "encoder", "--json").document["removed"] == ["encoder@1", "encoder@2"]
    assert rowmill.inside("model", "show", "encoder").code == 6


def test_mistakes_are_told_plainly(rowmill: Rowmill) -> None:
    write_model(rowmill.home / "one")
    for arguments, code, says in (
        (("add", "a b", "one"), 2, "NAME"),
        (("add", "a", "nowhere"), 2, "no model"),
        (("add", "a", "one", "--alias", "3"), 2, "alias"),
        (("activate", "nothing"), 6, "no model nothing"),
        (("history", "nothing"), 6, "no model nothing"),
        (("rollback", "nothing"), 6, "no model nothing"),
        (("activate", "./one"), 2, "is no registered model"),
    ):
        done = rowmill.inside("model", *arguments)
        assert done.code == code and says in done.err, (arguments, done.code, done.err)


def test_only_what_passes_is_activated(rowmill: Rowmill) -> None:
    texts(rowmill)
    texts(rowmill, 8, name="few")
    build_encoder(rowmill.home / "one", pooling="cls", normalize=True)
    build_encoder(rowmill.home / "two", pooling="cls", normalize=True, seed=1)
    assert rowmill.inside("model", "add", "encoder", "one").code == 0
    rows = ("-t", "embed", "--column", "text", "--json")
    few = rowmill.inside("model", "validate", "encoder", "few.parquet", *rows)
    assert (few.code, few.document["verdict"]) == (1, "INSUFFICIENT"), few.out
    assert rowmill.inside("model", "activate", "encoder").code == 1
    passed = rowmill.inside("model", "validate", "encoder", "rows.parquet", *rows)
    assert (passed.code, passed.document["verdict"]) == (0, "PASS"), passed.out
    found = passed.document
    assert found["against"] == "the original pipeline, in PyTorch" and found["state"] == "validated"
    assert found["relative_error"] <= found["tolerance"] < 1e-3 and len(found["worst"]) == 20
    assert rowmill.inside("model", "activate", "encoder").code == 0

    assert rowmill.inside("model", "add", "encoder", "two").code == 0
    # Held against revision 1 it is another model, whatever its own checkpoint says.
    failed = rowmill.inside("model", "validate", "encoder@2", "rows.parquet", "--against", "encoder@1", *rows)
    assert (failed.code, failed.document["verdict"]) == (1, "FAIL")
    refused = rowmill.inside("model", "activate", "encoder")
    assert refused.code == 1 and failed.document["report"] in refused.err
    config = rowmill.home / "two" / "tokenizer.json"
    config.write_bytes(config.read_bytes()[:-2] + b"  ")
    broken = rowmill.inside("model", "validate", "encoder@2", "rows.parquet", *rows)
    assert (broken.code, broken.document["verdict"]) == (1, "FAIL")
    assert "tokenizer.json" in " ".join(broken.document["reasons"])

    done = rowmill.inside("run", "few.parquet", "-o", "out", "-m", "encoder", "-t", "embed", "--column", "text")
    assert done.code == 4, done.err
    model = json.loads((rowmill.home / "out" / "_manifest.json").read_bytes())["model"]
    assert (model["name"], [report["verdict"] for report in model["reports"]]) == (
        "encoder@1",
        ["PASS", "INSUFFICIENT"],
    )
    assert model["reports"][0]["id"] == passed.document["report"]
