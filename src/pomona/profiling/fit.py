"""Fitting: from measured steps to a LinearCost. Every seconds-per-unit is non-negative, because more work never makes
a step shorter; relative errors count, because a decode step of 2 ms matters as much as a prefill of 2 s.

Which form the dense part and the adapters' part take (affine, roofline, ramps; sum of ranks or largest rank, CaraServe,
arXiv 2401.11240, section 4) is decided by cross-validation, not by taste.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pomona.sim.cost_model import CostTerm, LinearCost
from pomona.sim.step_work import StepWork

Floats = NDArray[np.float64]

_NUM_FOLDS = 8
_AS_GOOD = 1.02
"""Forms whose error is within this factor of the least predict alike."""
_KNEES = (4, 8, 16, 32, 64, 128, 256)
_ROUGH = (("roofline, knee at 32 rows", "none"), ("roofline, knee at 32 rows", "sum of ranks"))
_MOST_OFF = 3.0
"""A step that took so many times what was predicted was another program's."""
_FEW_ROWS = (8, 16, 32)
_RAMPS = (0, 1, 4, 16, 64, 256, 1024)
_ALWAYS = (
    "num_seqs",
    "num_sampled",
    "num_decode_kv_tokens",
    "num_prefill_kv_tokens",
    "num_prefill_pairs",
    "num_loads",
    "num_loaded_pages",
    "has_extras",
    "num_extra_adapters",
    "is_new_mix",
    "num_new_mix_adapters",
    "is_back_to_decodes",
    "is_afresh",
)


@dataclass(frozen=True, slots=True)
class Sample:
    """A measured step, or the mean of several alike."""

    work: StepWork
    seconds: float
    point_index: int
    """Samples of one point are held out together."""


@dataclass(frozen=True, slots=True)
class FormError:
    """How well a form predicts points that it was not fitted to: |predicted - measured| / measured."""

    dense: str
    adapters: str
    mean: float
    p50: float
    p90: float
    max: float


@dataclass(frozen=True, slots=True)
class Fit:
    """The simplest form of those that predict best, fitted to everything."""

    cost: LinearCost
    error: FormError
    tried: tuple[FormError, ...]
    """Every form, best first."""


def _linear(*quantities: str) -> list[CostTerm]:
    return [CostTerm(quantity, 1.0) for quantity in quantities]


def dense_forms() -> dict[str, list[CostTerm]]:
    """How the base's products grow with rows: in proportion; flat up to a knee (reading weights hides computing); or by
    a slope per range."""
    forms = {"affine": _linear("num_rows")}
    for knee in _KNEES:
        forms[f"roofline, knee at {knee} rows"] = [*_linear("num_rows"), CostTerm("num_rows", 1.0, above=knee)]
    ends = [*_RAMPS[1:], math.inf]
    forms["ramps"] = [CostTerm("num_rows", 1.0, above=low, up_to=high) for low, high in zip(_RAMPS, ends, strict=True)]
    return forms


def _adapter_forms() -> dict[str, list[CostTerm]]:
    sum_of_ranks = _linear("num_adapter_rows", "num_adapters", "sum_row_ranks", "sum_adapter_ranks")
    forms = {
        "none": _linear(),
        "sum of ranks": sum_of_ranks,
        "largest rank": _linear("num_adapter_rows", "num_adapters", "padded_row_ranks", "sum_adapter_ranks"),
    }
    for rows in _FEW_ROWS:
        read = CostTerm("sum_adapter_ranks", 1.0, beside_rows=rows)
        forms[f"sum of ranks, read beside up to {rows} rows"] = [*sum_of_ranks, read]
    return forms


ADAPTER_FORMS = _adapter_forms()
"""Kernels that give each row its own rank (SGMV) pay for the sum, those that pad (BGMV) for the largest. Where many
rows are computed, reading adapters may cost less than where few are."""


def design_terms() -> list[CostTerm]:
    """What points are chosen to tell apart: the terms of all forms together that are not alike."""
    rows = [CostTerm("num_rows", 1.0, up_to=32), CostTerm("num_rows", 1.0, above=32)]
    adapters = ADAPTER_FORMS[f"sum of ranks, read beside up to {_FEW_ROWS[1]} rows"]
    return [*_linear(*_ALWAYS), *rows, *(term for term in adapters if term.quantity != "num_adapter_rows")]


def design_row(work: StepWork, terms: Sequence[CostTerm]) -> Floats:
    """[1 + num_terms] amounts of a step, the step itself first."""
    return np.array([1.0, *(term.amount(work) for term in terms)])


def fit(samples: Sequence[Sample], *, is_rough: bool = False) -> Fit:
    """Find the form that predicts held-out points best, and fit it to all.

    Args:
        samples: at least two points.
        is_rough: try one form only, the one that is right most often: good enough to choose the next point by.
    """
    tried: list[tuple[FormError, list[CostTerm]]] = []
    has_adapters = any(sample.work.num_adapters for sample in samples)
    for (dense, dense_terms), (adapters, adapter_terms) in itertools.product(
        dense_forms().items(), ADAPTER_FORMS.items()
    ):
        if has_adapters == (adapters == "none") or (is_rough and (dense, adapters) not in _ROUGH):
            continue
        terms = _linear(*_ALWAYS) + dense_terms + adapter_terms
        errors = _held_out_errors(samples, terms)
        p50, p90 = np.quantile(errors, (0.5, 0.9))
        error = FormError(dense, adapters, float(errors.mean()), float(p50), float(p90), float(errors.max()))
        tried.append((error, terms))
    # The first, which is the simplest, of those that predict about as well as any.
    least = min(error.mean for error, _ in tried)
    best, terms = next(item for item in tried if item[0].mean <= _AS_GOOD * least + 1e-6)
    return Fit(
        fit_terms(samples, terms), best, tuple(sorted((error for error, _ in tried), key=lambda error: error.mean))
    )


def fit_terms(samples: Sequence[Sample], terms: Sequence[CostTerm]) -> LinearCost:
    """The non-negative coefficients of least relative error; terms that turn out to cost nothing are left out."""
    rows = np.stack([design_row(sample.work, terms) for sample in samples])
    coefficients = _fit(rows, np.array([sample.seconds for sample in samples]))
    kept = tuple(
        replace(term, seconds_each=float(seconds))
        for term, seconds in zip(terms, coefficients[1:], strict=True)
        if seconds > 0.0
    )
    return LinearCost(float(coefficients[0]), kept)


def _held_out_errors(samples: Sequence[Sample], terms: Sequence[CostTerm]) -> Floats:
    """[num_samples] relative error of each sample, predicted from the other folds' points."""
    rows = np.stack([design_row(sample.work, terms) for sample in samples])
    seconds = np.array([sample.seconds for sample in samples])
    folds = np.array([sample.point_index % _NUM_FOLDS for sample in samples])
    errors = np.zeros(len(samples))
    for fold in np.unique(folds):
        held_out = folds == fold
        if held_out.all():
            continue
        coefficients = _fit(rows[~held_out], seconds[~held_out])
        errors[held_out] = np.abs(rows[held_out] @ coefficients / seconds[held_out] - 1.0)
    return errors


def _fit(rows: Floats, seconds: Floats) -> Floats:
    """Non-negative least relative squares; then again with samples that lie far off counting less (Huber): a machine
    that does something else for a moment makes a step longer and never shorter, and should not decide what grows with
    what. That is what steps typically take. Waiting and throughput follow from what they take on average, slow moments
    included, so at last the least squares relative to that prediction are taken of all samples but those that are
    hardly the program's own."""
    relative = rows / seconds[:, None]
    ones = np.ones(len(seconds))
    coefficients = non_negative_least_squares(relative, ones)
    for _ in range(3):
        residuals = np.abs(relative @ coefficients - 1.0)
        limit = max(2.0 * float(np.median(residuals)), 1e-6)
        weights = np.sqrt(np.minimum(1.0, limit / np.maximum(residuals, 1e-12)))
        coefficients = non_negative_least_squares(relative * weights[:, None], weights)
    for _ in range(2):
        typical = np.maximum(rows @ coefficients, 1e-9)
        is_own = seconds < _MOST_OFF * typical
        if not is_own.any():
            break
        weights = 1.0 / typical[is_own]
        coefficients = non_negative_least_squares(rows[is_own] * weights[:, None], seconds[is_own] * weights)
    return coefficients


def non_negative_least_squares(matrix: Floats, target: Floats) -> Floats:
    """argmin over x >= 0 of |matrix x - target|, by active sets (Lawson and Hanson, 1974, chapter 23).

    Args:
        matrix: [num_samples, num_columns].
        target: [num_samples].
    """
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0.0] = 1.0
    matrix = matrix / scale
    # All that is needed of the samples; columns are few.
    gram, moment = matrix.T @ matrix, matrix.T @ target
    x = np.zeros(len(moment))
    is_free = np.zeros(len(x), dtype=bool)
    tolerance = 1e-10 * max(1.0, float(np.abs(moment).max(initial=0.0)))
    for _ in range(10 * len(x)):
        gradient = np.where(is_free, -math.inf, moment - gram @ x)
        if is_free.all() or gradient.max() <= tolerance:
            break
        is_free[int(gradient.argmax())] = True
        while True:
            step = np.zeros_like(x)
            step[is_free] = np.linalg.lstsq(gram[np.ix_(is_free, is_free)], moment[is_free], rcond=None)[0]
            blocked = is_free & (step <= 0.0)
            if not blocked.any():
                x = step
                break
            share = float(np.min(x[blocked] / np.maximum(x[blocked] - step[blocked], 1e-300)))
            x = x + share * (step - x)
            is_free &= x > 1e-12
            x[~is_free] = 0.0
    return np.asarray(x / scale)
