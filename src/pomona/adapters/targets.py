"""Which modules of a base model an adapter's config means, and with what rank and scaling: PEFT's matching rules,
applied to module names only. No tensors; tests/adapters checks each rule against PEFT's own functions.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

from pomona.adapters.patterns import Patience, match_patterns
from pomona.core.adapter import EMBEDDING_NAME, HEAD_NAME, AdapterSpec, BaseModules, ModuleLora, ResolvedAdapter
from pomona.core.errors import AdapterConfigError

DEFAULT_TARGETS = ("q_proj", "v_proj")
"""What PEFT adapts in the supported architectures if target_modules is null."""
DUMMY_TARGETS = "dummy-target-modules"
"""PEFT's way of writing "no low-rank part at all"."""
_TIED_NAMES = ("embed_tokens", "lm_head")
_NAME_IN_PATH = r"(^|.*\.){}($|\..*)"
_PATTERN_KEY = r"(.*\.)?({})$"
_LAYER_UNDER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
_FIRST_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


@dataclass(frozen=True, slots=True)
class _Request:
    """The config's own lists, after weight tying has rewritten them the way PEFT does."""

    targets: tuple[str, ...] | str
    saved: tuple[str, ...]
    tie: Literal["nothing", "lora", "saved_module"]
    patience: Patience


def resolve(spec: AdapterSpec, base: BaseModules) -> ResolvedAdapter:
    """Apply a config to a base model's module names.

    Raises:
        AdapterConfigError: nothing matches, something matches that cannot be adapted, or two fields contradict.
    """
    request = _request(spec, base)
    matched = set(_matching_targets(spec, request, base)) - _excluded(spec, request, base)
    if request.tie == "lora":
        if EMBEDDING_NAME not in matched:
            raise AdapterConfigError("ensure_weight_tying", "ties lm_head to embed_tokens, which is excluded")
        matched.add(HEAD_NAME)
    _check_adaptable(spec, request, base, matched)
    saved = _saved_modules(request, base)
    tokens, tokens_are_tied = _token_rows(spec, base)
    _check_disjoint(matched, saved, set(tokens))
    if base.is_tied and spec.ensure_weight_tying and len(tokens) > 1:
        raise AdapterConfigError(
            "ensure_weight_tying", "cannot be kept with different trainable_token_indices for tied modules"
        )
    if tokens_are_tied:
        # PEFT puts a tied head's token rows under its low-rank part, unless the head is named for them beside the
        # embedding; it cannot put them under anything else
        is_named = any(name == HEAD_NAME for name, _ in spec.trainable_token_indices)
        _check_disjoint(matched if spec.use_dora or is_named else set(), saved, {HEAD_NAME})
    loras = _ranks(spec, request.patience, tuple(name for name in base.names if name in matched))
    if request.tie == "lora" and loras[HEAD_NAME].lora_rank != loras[EMBEDDING_NAME].lora_rank:
        raise AdapterConfigError("rank_pattern", "gives the tied embed_tokens and lm_head different ranks")
    return ResolvedAdapter(
        spec=spec,
        loras=loras,
        saved_modules=tuple(name for name in base.names if name in saved),
        token_indices={name: tokens[name] for name in base.names if name in tokens},
        head_follows="tokens" if tokens_are_tied else request.tie,
    )


def _request(spec: AdapterSpec, base: BaseModules) -> _Request:
    """Defaults, "all-linear", and what ensure_weight_tying adds and removes."""
    targets = DEFAULT_TARGETS if spec.target_modules is None else spec.target_modules
    saved = spec.modules_to_save
    patience = Patience()
    tie: Literal["nothing", "lora", "saved_module"] = "nothing"
    if spec.ensure_weight_tying and base.is_tied:
        if any(_last_part(name) in _TIED_NAMES for name in saved):
            tie = "saved_module"
            saved = (*(name for name in saved if name != HEAD_NAME), EMBEDDING_NAME)
        elif _names_tied_target(patience, spec.target_modules):
            tie = "lora"
            if not isinstance(targets, str):
                targets = (*(name for name in targets if name != HEAD_NAME), EMBEDDING_NAME)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = base.linears
    return _Request(targets=targets, saved=saved, tie=tie, patience=patience)


def _names_tied_target(patience: Patience, targets: tuple[str, ...] | str | None) -> bool:
    if isinstance(targets, str):
        return any(row is not None for row in _full_match(patience, "target_modules", targets, _TIED_NAMES))
    return any(_last_part(name) in _TIED_NAMES for name in targets or ())


def _matching_targets(spec: AdapterSpec, request: _Request, base: BaseModules) -> list[str]:
    """Names that the targets mean, before exclusions."""
    targets, names = request.targets, base.names
    if isinstance(targets, str):
        if targets == DUMMY_TARGETS:
            return []
        found = _full_match(request.patience, "target_modules", targets, names)
        matched = [name for name, row in zip(names, found, strict=True) if row is not None]
        # with ensure_weight_tying PEFT extends the pattern by the embedding and sets lm_head aside
        if request.tie == "lora":
            return [EMBEDDING_NAME, *(name for name in matched if name not in (EMBEDDING_NAME, HEAD_NAME))]
        return matched
    exact = set(targets)
    suffixes = tuple(f".{target}" for target in targets)
    by_suffix = [name for name in names if name not in exact and name.endswith(suffixes)]
    if spec.layers_to_transform is not None:
        by_suffix = _in_layers(request.patience, spec.layers_to_transform, spec.layers_pattern, by_suffix)
    # a module listed by its full name is adapted whatever layers_to_transform says
    return [name for name in names if name in exact] + by_suffix


def _in_layers(
    patience: Patience, layers: tuple[int, ...], layers_pattern: tuple[str, ...], names: list[str]
) -> list[str]:
    """The names whose layer number, as the first pattern that fits sees it, is one of ``layers``."""
    if layers_pattern:
        table = match_patterns("layers_pattern", layers_pattern, names, patience, wrap=_LAYER_UNDER)
    else:
        table = [[_first_layer(name) for name in names]]
    kept = []
    for column, name in enumerate(names):
        layer = next((row[column] for row in table if row[column] is not None), None)
        if layer and int(layer) in layers:
            kept.append(name)
    return kept


def _first_layer(name: str) -> str | None:
    match = _FIRST_LAYER.match(name)
    return match["idx"] if match else None


def _excluded(spec: AdapterSpec, request: _Request, base: BaseModules) -> set[str]:
    """Names that exclude_modules or modules_to_save keep from being adapted."""
    exclude, names = spec.exclude_modules, base.names
    excluded: set[str] = set()
    if isinstance(exclude, str):
        found = _full_match(request.patience, "exclude_modules", exclude, names)
        excluded.update(name for name, row in zip(names, found, strict=True) if row is not None)
    elif exclude:
        suffixes = tuple(f".{part}" for part in exclude)
        excluded.update(name for name in names if name in exclude or name.endswith(suffixes))
    for row in match_patterns("modules_to_save", request.saved, names, request.patience, wrap=_NAME_IN_PATH):
        excluded.update(name for name, match in zip(names, row, strict=True) if match is not None)
    return excluded


def _check_adaptable(spec: AdapterSpec, request: _Request, base: BaseModules, matched: set[str]) -> None:
    adaptable = {*base.linears, EMBEDDING_NAME, HEAD_NAME}
    for name in base.names:
        if name in matched and name not in adaptable:
            raise AdapterConfigError(
                "target_modules", f"matches {name!r}, which is not a linear or embedding layer and cannot be adapted"
            )
    if spec.lora_bias and EMBEDDING_NAME in matched:
        raise AdapterConfigError("lora_bias", "is not possible on embed_tokens (as in PEFT)")
    if not matched and request.targets != DUMMY_TARGETS:
        shown = list(request.targets) if isinstance(request.targets, tuple) else request.targets
        raise AdapterConfigError(
            "target_modules", f"{shown!r} matches no module of the base model that is not excluded or saved whole"
        )


def _saved_modules(request: _Request, base: BaseModules) -> set[str]:
    """Full names that modules_to_save means: PEFT takes every module whose name ends so, without regard to dots."""
    supported = {*base.linears, *base.norms, EMBEDDING_NAME, HEAD_NAME}
    saved = {name for name in base.names if request.saved and name.endswith(request.saved)}
    for name in base.names:
        if name in saved and name not in supported:
            raise AdapterConfigError(
                "modules_to_save",
                f"matches {name!r}; only embed_tokens, lm_head, norms and the projections can be saved whole",
            )
    if request.tie == "saved_module":
        saved.add(HEAD_NAME)
    return saved


def _token_rows(spec: AdapterSpec, base: BaseModules) -> tuple[dict[str, tuple[int, ...]], bool]:
    """Token ids by full module name, and whether lm_head's rows are the embedding's."""
    field = "trainable_token_indices"
    tokens: dict[str, tuple[int, ...]] = {}
    for written_name, token_ids in spec.trainable_token_indices:
        name = {"embed_tokens": EMBEDDING_NAME}.get(written_name, written_name)
        if name not in (EMBEDDING_NAME, HEAD_NAME):
            raise AdapterConfigError(field, f"names {written_name!r}; only embed_tokens and lm_head have token rows")
        if name in tokens:
            raise AdapterConfigError(field, f"names {name!r} twice")
        tokens[name] = token_ids
    if not base.is_tied or EMBEDDING_NAME not in tokens:
        return tokens, False
    if HEAD_NAME in tokens and tokens[HEAD_NAME] != tokens[EMBEDDING_NAME]:
        return tokens, False
    tokens.pop(HEAD_NAME, None)
    return tokens, True


def _check_disjoint(matched: set[str], saved: set[str], tokens: set[str]) -> None:
    for name in sorted(saved & (matched | tokens)):
        raise AdapterConfigError("modules_to_save", f"saves {name!r} whole, which another field adapts as well")
    for name in sorted(matched & tokens):
        raise AdapterConfigError("trainable_token_indices", f"{name!r} is adapted by target_modules as well")


def _ranks(spec: AdapterSpec, patience: Patience, names: tuple[str, ...]) -> dict[str, ModuleLora]:
    """Own rank and scaling of each module: the first pattern in the file that fits wins."""
    ranks = _first_match(patience, "rank_pattern", spec.rank_pattern, names)
    alphas = _first_match(patience, "alpha_pattern", spec.alpha_pattern, names)
    loras = {}
    for name in names:
        lora_rank = int(ranks.get(name, spec.lora_rank))
        alpha = alphas.get(name, spec.lora_alpha)
        scaling = alpha / math.sqrt(lora_rank) if spec.use_rslora else alpha / lora_rank
        loras[name] = ModuleLora(lora_rank=lora_rank, scaling=scaling)
    return loras


def _first_match(
    patience: Patience, field: str, table: tuple[tuple[str, float], ...], names: tuple[str, ...]
) -> dict[str, float]:
    rows = match_patterns(field, [pattern for pattern, _ in table], names, patience, wrap=_PATTERN_KEY)
    found: dict[str, float] = {}
    for (_, number), row in zip(table, rows, strict=True):
        for name, match in zip(names, row, strict=True):
            if match is not None:
                found.setdefault(name, number)
    return found


def _full_match(patience: Patience, field: str, pattern: str, names: tuple[str, ...]) -> list[str | None]:
    return match_patterns(field, [pattern], names, patience, is_full_match=True)[0]


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]
