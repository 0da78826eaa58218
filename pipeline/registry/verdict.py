"""Pure: from measurements to PASS, FAIL or INSUFFICIENT. What a sample cannot show is not taken for shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]

PASS, FAIL, INSUFFICIENT = "PASS", "FAIL", "INSUFFICIENT"
FLOOR = 1e-6
"""The least tolerance, relative to the RMS of the reference: float32 results cannot be told apart below it."""
MULTIPLE = 10.0
"""How many times PyTorch's own float32 error a float32 candidate may be away from the float64 result."""
WITHOUT_ORIGINAL = 1e-4
"""The tolerance of a float32 candidate where no PyTorch original says how large float32's own error is."""
ALIKE = 0.99
LEAST_ROWS = 10
_CONFIDENCE = 0.05
_PAIRS_OF = 500
_NEIGHBOURS = 10


@dataclass(frozen=True, slots=True)
class Verdict:
    """``reasons`` say why it is no PASS."""

    verdict: str
    reasons: tuple[str, ...] = ()


def decide(broken: Sequence[str], unproved: Sequence[str]) -> Verdict:
    """A broken limit is a FAIL, whatever else; without one, anything unproved is INSUFFICIENT."""
    if broken:
        return Verdict(FAIL, (*broken, *unproved))
    return Verdict(INSUFFICIENT, tuple(unproved)) if unproved else Verdict(PASS)


def relative_error(candidate: Numbers, reference: Numbers) -> float:
    """The largest difference of two numbers, over the RMS of the reference; infinite where one is not finite."""
    if not candidate.size:
        return 0.0
    if candidate.shape != reference.shape or not np.isfinite(candidate).all() or not np.isfinite(reference).all():
        return math.inf
    scale = math.sqrt(float((reference**2).mean()))
    largest = float(np.abs(candidate - reference).max())
    return largest / scale if scale else (math.inf if largest else 0.0)


def tolerance(single: Numbers, exact: Numbers) -> float:
    """What a float32 candidate may be away by: a multiple of float32's own error in the original pipeline."""
    return max(MULTIPLE * relative_error(single, exact), FLOOR)


def shows_share(rows: int, disagreements: int, share: float) -> bool:
    """Whether ``rows`` rows show, with 95% confidence (exact, one-sided), that at least ``share`` of all agree.

    0.99 needs 299 rows without a disagreement.
    """
    if share <= 0:
        return True
    if share >= 1:
        return False
    terms = (
        math.lgamma(rows + 1)
        - math.lgamma(k + 1)
        - math.lgamma(rows - k + 1)
        + k * math.log1p(-share)
        + (rows - k) * math.log(share)
        for k in range(min(disagreements, rows) + 1)
    )
    return math.fsum(math.exp(term) for term in terms) <= _CONFIDENCE


def rows_needed(share: float) -> int:
    """How many rows without a disagreement show a share."""
    return math.ceil(math.log(_CONFIDENCE) / math.log(share)) if 0 < share < 1 else 0


def unproved(
    *,
    rows: int,
    distinct: int,
    agreement_limit: float | None,
    agreement: float | None,
    labels: int | None,
    median_cosine: float | None,
    calibrated: int,
) -> list[str]:
    """What the sample leaves open, in words. ``labels``: how many labels the reference gives; ``median_cosine``: of
    pairs of its vectors; ``calibrated``: how many of the rows calibrated the candidate."""
    found = []
    if distinct < LEAST_ROWS:
        found.append(f"the sample has {distinct} distinct rows; give {LEAST_ROWS} at least")
    if agreement_limit is not None and agreement is not None and 0 < agreement_limit < 1:
        disagreements = round(rows * (1 - agreement))
        if not shows_share(distinct, disagreements, agreement_limit):
            found.append(
                f"{distinct} distinct rows with {disagreements} disagreements do not show an agreement of "
                f"{agreement_limit:g} (95%, one-sided): without a disagreement it takes {rows_needed(agreement_limit)}"
            )
    if labels == 1:
        found.append("the reference gives every row the same label; give rows of several")
    if median_cosine is not None and median_cosine > ALIKE:
        found.append(f"the reference's vectors all look alike: the median cosine of two rows is {median_cosine:.4f}")
    if calibrated:
        found.append(f"{calibrated} of the rows calibrated the candidate; validate on others")
    return found


@dataclass(frozen=True, slots=True)
class Neighbours:
    """How alike rows are among themselves, in both models: what a search over the vectors rests on."""

    median_cosine: float
    spearman: float
    top10_overlap: float


def neighbours(candidate: Numbers, reference: Numbers) -> Neighbours | None:
    """Of at most the first 500 rows; ``None`` for fewer than three."""
    if len(reference) < 3 or candidate.shape != reference.shape:
        return None
    ours, theirs = (_cosines(side[:_PAIRS_OF]) for side in (candidate, reference))
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return None
    upper = np.triu_indices(len(theirs), 1)
    k = min(_NEIGHBOURS, len(theirs) - 1)
    overlap = [len(set(a) & set(b)) / k for a, b in zip(_nearest(ours, k), _nearest(theirs, k), strict=True)]
    return Neighbours(float(np.median(theirs[upper])), _spearman(ours[upper], theirs[upper]), float(np.mean(overlap)))


def _cosines(vectors: Numbers) -> Numbers:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(length == 0, 1.0, length)
    return np.asarray(unit @ unit.T, np.float64)


def _nearest(cosines: Numbers, k: int) -> list[list[int]]:
    apart = cosines.copy()
    np.fill_diagonal(apart, -np.inf)
    return [list(map(int, row)) for row in np.argsort(-apart, axis=1, kind="stable")[:, :k]]


def _spearman(a: Numbers, b: Numbers) -> float:
    ranks = [np.argsort(np.argsort(side, kind="stable"), kind="stable").astype(np.float64) for side in (a, b)]
    if len(a) < 2:
        return 1.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
