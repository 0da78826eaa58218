"""Whether a model gives what it should: its final results against the original pipeline's, or another model's."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.client.client import Client
from pipeline.config.settings import Settings
from pipeline.host.cpu import flags
from pipeline.models import origin
from pipeline.models.compare import Comparison, Limits, OutputDiff
from pipeline.models.model import Model
from pipeline.models.resolve import resolve
from pipeline.registry import precision, reference
from pipeline.registry import verdict as verdicts
from storage.errors import EngineMissing, InvalidInput, InvalidJob, InvalidModel, RowmillError

_TEXT_FIELDS = ("column", "pair_column")
_NOT_RESULTS = ("error", "prompt_tokens")
WORST = 20


@dataclass(frozen=True, slots=True)
class Request:
    """``candidate`` and ``against`` are paths; without ``against`` it is held to the checkpoint that it was made from.

    ``fields`` are those of the job that reads the rows, ``limits`` how far outputs may differ, and ``asked`` which of
    them the user gave. ``alternative`` is what stands in for a checkpoint that is not there.
    """

    candidate: str
    fields: Mapping[str, Any]
    limits: Limits
    asked: frozenset[str]
    against: str | None = None
    alternative: str | None = None

    @property
    def task(self) -> str:
        return str(self.fields["task"])


def validate(
    settings: Settings, request: Request, notify: Callable[[str], None], broken: str | None = None
) -> dict[str, Any]:
    """The report of a validation. Its ``verdict`` is FAIL, too, where the candidate does not run, or is ``broken``.

    Raises :class:`~storage.errors.InvalidJob` for a request that makes no sense, and for a reference that does not run.
    """
    cache_dir = settings.cache_dir
    if broken is not None:
        return _report(request, request.against, None, [f"the candidate cannot be loaded: {broken}"], [], {})
    checkpoint = _checkpoint(request, cache_dir)
    against = request.against or (None if checkpoint is not None else request.alternative)
    if against is None and checkpoint is None:
        raise InvalidJob(
            "there is nothing to compare with: the checkpoint that the model was made from is not there, and no "
            "revision of it is active; give --against MODEL",
            field="against",
        )
    with tempfile.TemporaryDirectory(prefix="rowmill-validate-") as folder:
        runs = _Runs(settings, request, Path(folder), notify)
        theirs = None if against is None else runs.results("reference", against)
        try:
            candidate = resolve(request.candidate, cache_dir)
            ours = runs.results("candidate", request.candidate)
        except RowmillError as error:
            if not _is_the_candidates(error):
                raise
            return _report(request, against, None, [f"the candidate does not run: {error}"], [], {})
        return _judged(request, candidate, checkpoint, against, ours, theirs, runs.facts)


def _checkpoint(request: Request, cache_dir: Path) -> Model | None:
    """The original pipeline of the candidate, or of the model that it is held against; ``None`` where none is there."""
    if request.task not in reference.TASKS or not set(_TEXT_FIELDS) & set(request.fields):
        return None
    try:
        return origin.original(resolve(request.against or request.candidate, cache_dir), cache_dir)
    except InvalidModel:
        return None  # whoever runs it says what is wrong


def _is_the_candidates(error: RowmillError) -> bool:
    """Whether an error is the candidate's own; a mistake in the request is the user's."""
    if isinstance(error, InvalidModel):
        return error.field in (None, "model")
    return not isinstance(error, InvalidJob) or (not isinstance(error, InvalidInput) and error.field == "model")


class _Runs:
    """Both models over the rows, as jobs of a database of their own."""

    def __init__(self, settings: Settings, request: Request, folder: Path, notify: Callable[[str], None]) -> None:
        own = {"data_dir": folder / "data", "database_url": None, "broker_url": None}
        self._settings = settings.model_copy(update=own)
        self._request, self._folder, self._notify = request, folder, notify
        self.facts: dict[str, Any] = {}
        """What the candidate's engine says of itself."""

    def results(self, name: str, model: str) -> pa.Table:
        """The results of all rows, with the texts that they are of."""
        import json

        fields, output = dict(self._request.fields), self._folder / name
        kept = [fields[field] for field in _TEXT_FIELDS if field in fields] if _is_text(self._request) else []
        self._notify(f"running {model}")
        with Client(settings=self._settings) as client:
            status = client.run(**fields, model=_as_path(model), output=str(output), keep_columns=tuple(kept))
        if not (output / "_SUCCESS").exists():
            raise InvalidModel(f"{model} did not get through the rows: {status.error}", field="model")
        manifest = json.loads((output / "_manifest.json").read_bytes())
        self.facts = {"engine": manifest["engine"]["name"], "facts": manifest["engine"]["facts"]}
        return pq.read_table(sorted((output / "data").glob("*.parquet")))


def _judged(
    request: Request,
    candidate: Model,
    checkpoint: Model | None,
    against: str | None,
    ours: pa.Table,
    theirs: pa.Table | None,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    kind = precision.of(candidate)
    original = None
    if checkpoint is not None and (theirs is None or kind == "float32"):
        try:
            original = _original(checkpoint, request, ours)
        except (InvalidModel, EngineMissing):
            if theirs is None:
                raise
    expected = theirs if theirs is not None else _as_results(_required(original), request, ours)
    columns = [name for name in expected.column_names if name not in (*_NOT_RESULTS, *_texts_of(request))]
    comparison = Comparison()
    broken: list[str] = []
    try:
        comparison.add(expected, ours, columns)
    except (ValueError, KeyError) as error:
        broken.append(f"the results cannot be compared: {error}")
        return _report(request, against, None, broken, [], {"precision": kind, **facts})
    diff = comparison.result()
    broken += request.limits.broken(diff, request.asked)
    measured: dict[str, Any] = {"precision": kind, **facts}
    fine = expected["error"].is_null().to_numpy() & ours["error"].is_null().to_numpy()
    a, b = (_numbers(table, request, fine) for table in (ours, expected))
    if kind == "float32" and not request.asked and a is not None and b is not None:
        allowed = verdicts.WITHOUT_ORIGINAL if original is None else verdicts.tolerance(original.single, original.exact)
        exact = b if theirs is not None or original is None else original.exact[fine[_has_text(ours, request)]]
        away = verdicts.relative_error(a, exact)
        measured |= {"relative_error": away, "tolerance": allowed}
        if not away <= allowed:
            broken.append(
                f"the largest difference is {away:.3g} of the results' RMS, more than the {allowed:.3g} that float32 "
                "explains"
            )
    near = verdicts.neighbours(a, b) if request.task == "embed" and a is not None and b is not None else None
    measured |= {} if near is None else {"spearman": near.spearman, "top10_overlap": near.top10_overlap}
    if a is not None and b is not None and a.shape == b.shape and a.size:
        measured["mean_difference"] = float(np.abs(a - b).mean())
        measured["worst"] = _worst(a, b, ours.filter(pa.array(fine)), request)
    broken += _fallback(request, facts)
    there = ours.filter(pa.array(_has_text(ours, request)))
    texts = [tuple(row.values()) for row in there.select(_texts_of(request)).to_pylist() if row]
    known = origin.of(candidate).calibration
    loose = kind != "float32" or "agreement" in request.asked
    unproved = verdicts.unproved(
        rows=diff.rows,
        distinct=len(set(texts)) if texts else diff.rows,
        agreement_limit=request.limits.agreement if loose else None,
        agreement=diff.agreement,
        labels=len(set(expected["label"].drop_null().to_pylist())) if "label" in expected.column_names else None,
        median_cosine=None if near is None else near.median_cosine,
        calibrated=sum(origin.row_hash(list(row)) in known for row in set(texts)) if known else 0,
    )
    return _report(request, against, diff, broken, unproved, measured)


def _required(original: reference.Reference | None) -> reference.Reference:
    assert original is not None
    return original


def _original(checkpoint: Model, request: Request, ours: pa.Table) -> reference.Reference:
    """The original pipeline's results of the rows that have a text."""
    rows = ours.filter(pa.array(_has_text(ours, request)))
    texts = rows[request.fields["column"]].to_pylist()
    pair = request.fields.get("pair_column")
    return reference.run(
        checkpoint,
        request.task,
        texts,
        None if pair is None else rows[pair].to_pylist(),
        prompt_name=request.fields.get("prompt_name"),
        prefix=request.fields.get("prefix"),
    )


def _has_text(table: pa.Table, request: Request) -> Any:
    found = np.ones(len(table), bool)
    for name in _texts_of(request):
        found &= table[name].is_valid().to_numpy()
    return found


def _as_results(original: reference.Reference, request: Request, ours: pa.Table) -> pa.Table:
    """The original's results as a table like the candidate's; rows without a text have an error."""
    there = _has_text(ours, request)
    at = np.cumsum(there) - 1
    values = original.exact.astype(np.float32)

    def spread(of_row: Callable[[int], Any]) -> list[Any]:
        return [of_row(int(at[n])) if there[n] else None for n in range(len(ours))]

    columns: dict[str, Any] = {}
    if request.task == "embed":
        columns["embedding"] = pa.array(spread(lambda n: values[n].tolist()), ours.schema.field("embedding").type)
    elif request.task == "score":
        if values.shape[1] != 1:
            raise InvalidModel(f"the original gives {values.shape[1]} scores for each row", field="task")
        columns["score"] = pa.array(spread(lambda n: float(values[n, 0])), pa.float32())
    else:
        order = np.argsort(-values, axis=1, kind="stable")
        columns["label"] = pa.array(spread(lambda n: original.labels[order[n, 0]]), pa.string())
        columns["score"] = pa.array(spread(lambda n: float(values[n, order[n, 0]])), pa.float32())
        columns["scores"] = pa.array(
            spread(lambda n: [{"label": original.labels[k], "score": float(values[n, k])} for k in order[n]]),
            ours.schema.field("scores").type,
        )
    error = ours.schema.field("error").type
    columns["error"] = pa.array([None if has else {"code": "missing", "message": "no text"} for has in there], error)
    return pa.table(columns)


def _numbers(table: pa.Table, request: Request, rows: Any) -> verdicts.Numbers | None:
    """The numbers that are compared, [rows, width], of these rows; classes in the order of their names."""
    chosen = table.filter(pa.array(rows))
    if request.task == "embed":
        return np.array(chosen["embedding"].to_pylist(), np.float64).reshape(len(chosen), -1)
    if request.task == "score":
        return np.array(chosen["score"].to_pylist(), np.float64).reshape(len(chosen), 1)
    if request.task == "classify" and "scores" in chosen.column_names:
        named = [
            {item["label"]: item["score"] for item in row} for row in chosen["scores"].to_pylist() if row is not None
        ]
        names = sorted({name for row in named for name in row})
        return np.array([[row.get(name, np.nan) for name in names] for row in named], np.float64)
    return None


def _worst(a: verdicts.Numbers, b: verdicts.Numbers, rows: pa.Table, request: Request) -> list[dict[str, Any]]:
    """The rows that are furthest away, with their texts."""
    apart = np.abs(a - b).max(axis=1)
    found = []
    for row in np.argsort(-apart, kind="stable")[:WORST]:
        texts = {name: str(rows[name][int(row)].as_py())[:200] for name in _texts_of(request)}
        found.append({"row": int(row), "max_difference": float(apart[row]), **texts})
    return found


def _fallback(request: Request, facts: Mapping[str, Any]) -> list[str]:
    """An execution provider that was asked for and did not run it."""
    asked = (request.fields.get("engine_options") or {}).get("providers")
    if not asked:
        return []
    first = asked[0] if isinstance(asked, list) else asked
    wanted = first[0] if isinstance(first, (list, tuple)) else first
    used = {name for item in facts.get("facts", ()) for name in item.get("providers", ())}
    return [] if not used or wanted in used else [f"{wanted} was asked for, and {', '.join(sorted(used))} ran it"]


def _is_text(request: Request) -> bool:
    return request.task in reference.TASKS


def _texts_of(request: Request) -> list[str]:
    return [request.fields[name] for name in _TEXT_FIELDS if name in request.fields] if _is_text(request) else []


def _as_path(model: str) -> str:
    return model if Path(model).is_absolute() or "/" in model else f"./{model}"


def _report(
    request: Request,
    against: str | None,
    diff: OutputDiff | None,
    broken: list[str],
    unproved: list[str],
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    outcome = verdicts.decide(broken, unproved)
    nothing = OutputDiff(0, 0, None, None, None, None)
    return {
        "model": request.candidate,
        "against": against or "the original pipeline, in PyTorch",
        **(diff or nothing).to_json(),
        **measured,
        "limits": {name: value for name, value in asdict(request.limits).items() if value is not None},
        "asked": sorted(request.asked),
        "fields": dict(request.fields),
        "versions": _versions(),
        "cpu_flags": sorted(flags()),
        "verdict": outcome.verdict,
        "reasons": list(outcome.reasons),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("rowmill", "onnxruntime", "torch", "transformers", "sentence-transformers", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
