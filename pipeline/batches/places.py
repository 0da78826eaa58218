"""Where the gateway's files and batches lie, from their ids alone."""

from __future__ import annotations

import hashlib

import uuid_utils

from pipeline.config.settings import Settings


def new_id(kind: str) -> str:
    """A new id, such as ``file-…``: sorts by the time at which it was made, and cannot be guessed."""
    made = uuid_utils.uuid7().hex
    return f"{kind}{'_' if kind == 'batch' else '-'}{made}"


def output_file_id(batch_id: str, *, failed: bool) -> str:
    """The id of what a batch writes: the same each time that it is written, whoever writes it."""
    what = "errors" if failed else "output"
    return "file-" + hashlib.sha256(f"{batch_id}/{what}".encode()).hexdigest()[:32]


def file_uri(settings: Settings, file_id: str) -> str:
    """The object that holds a file's content."""
    return f"{settings.effective_files_dir}/content/{file_id}.jsonl"


def batch_output(settings: Settings, batch_id: str) -> str:
    """The output of a batch's job."""
    return f"{settings.effective_files_dir}/batches/{batch_id}"
