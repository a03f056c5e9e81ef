"""Which modules a config means: compared with peft's own functions, and with peft's injection into a real model."""

import copy
import json
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

from pomona.adapters.peft_config import parse_config
from pomona.adapters.targets import resolve
from pomona.core.adapter import BaseModules, ResolvedAdapter
from pomona.core.errors import AdapterConfigError

NUM_LAYERS = 11


def _model(*, is_tied: bool) -> Any:
    config = transformers.Qwen3Config(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=NUM_LAYERS, num_attention_heads=1,
        num_key_value_heads=1, head_dim=4, tie_word_embeddings=is_tied, pad_token_id=None,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


MODELS = {is_tied: _model(is_tied=is_tied) for is_tied in (False, True)}


def base_modules(*, is_tied: bool = False) -> BaseModules:
    modules = {name: module for name, module in MODELS[is_tied].named_modules() if name}
    linears = tuple(n for n, m in modules.items() if isinstance(m, torch.nn.Linear) and n != "lm_head")
    norms = tuple(n for n in modules if n.endswith("norm"))
    return BaseModules(names=tuple(modules), linears=linears, norms=norms, is_tied=is_tied)


def resolved(*, is_tied: bool = False, **fields: Any) -> ResolvedAdapter:

    spec = parse_config(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | fields).encode())
    return resolve(spec, base_modules(is_tied=is_tied))


def injected(*, is_tied: bool, **fields: Any) -> dict[str, dict[str, Any]]:
    """What peft makes of a config: {"loras": {name: (rank, scaling)}, "saved": {name}, "tokens": {name: ids}}."""
    model = copy.deepcopy(MODELS[is_tied])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=8, **fields), model)
        loras: dict[str, Any] = {}
        saved: dict[str, Any] = {}
        tokens: dict[str, Any] = {}
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                loras[name] = (module.r["default"], module.scaling["default"])
            elif isinstance(module, ModulesToSaveWrapper):
                saved[name] = True
            elif isinstance(module, TrainableTokensWrapper):
                is_tied_to_another = bool(module.token_adapter.tied_adapter)
                tokens[name] = "tied" if is_tied_to_another else tuple(module.token_adapter.token_indices["default"])
    return {"loras": loras, "saved": saved, "tokens": tokens}


NAMES = st.sampled_from(
    [
        "q_proj", "v_proj", "self_attn.k_proj", "model.layers.1.mlp.up_proj", "layers.1.self_attn.q_proj", "down_proj",
        "proj", "1.mlp.gate_proj", "o_proj", "lm_head", "embed_tokens", "model.embed_tokens", "mlp", "norm", "nothing",
    ]
)  # fmt: skip
REGEXES = st.sampled_from(
    [
        r".*_proj", r".*\.(q|v)_proj", r"model\.layers\.1?0\..*proj", "all-linear", "All-Linear", "q_proj", "lm_head",
        r".*(?<!o)_proj", r"(lm_head|.*up_proj)", r"nothing", r".*embed_tokens", r".*", r"model\.layers\.[0-3]\.mlp",
        r"(?:.*\.)?(?:embed_tokens|q_proj)",
    ]
)  # fmt: skip
PATTERN_KEYS = st.sampled_from(
    ["q_proj", r"layers\.1\..*", r".*v_proj", "proj", r"^model\.layers\.0\.self_attn\.q_proj", "lm_head",
     r"1\d.*up_proj", "self_attn.q_proj", "model.layers.1.mlp.up_proj", "q_proj|v_proj", ".*"]
)  # fmt: skip
CONFIGS = st.fixed_dictionaries(
    {"target_modules": st.lists(NAMES, max_size=3) | REGEXES | st.none()},
    optional={
        "exclude_modules": st.lists(NAMES, max_size=2) | REGEXES,
        "layers_to_transform": st.lists(st.integers(0, 13), max_size=3) | st.integers(0, 10),
        "layers_pattern": st.sampled_from(["layers", ["h", "layers"], "nothing", "l.*s", []]),
        "rank_pattern": st.dictionaries(PATTERN_KEYS, st.integers(1, 9), max_size=3),
        "alpha_pattern": st.dictionaries(PATTERN_KEYS, st.integers(1, 9) | st.floats(0.5, 9), max_size=3),
        "use_rslora": st.booleans(),
        "modules_to_save": st.lists(
            st.sampled_from(["lm_head", "embed_tokens", "norm", "layernorm", "q_proj", "model.norm", "nothing", "mlp"]),
            max_size=2,
        ),
        "trainable_token_indices": st.sampled_from(
            [[1, 2], {"embed_tokens": [2, 1]}, {"lm_head": [3]}, {"embed_tokens": [1], "lm_head": [1]},
             {"lm_head": [2], "embed_tokens": [1]}]
        ),
        "ensure_weight_tying": st.booleans(),
    },
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(CONFIGS, st.booleans())
def test_what_is_adapted_and_how_strongly_equals_pefts_injection(config: dict[str, Any], is_tied: bool) -> None:
    try:
        ours = resolved(is_tied=is_tied, **copy.deepcopy(config))
    except AdapterConfigError:
        return  # refusals are compared below
    theirs = injected(is_tied=is_tied, **copy.deepcopy(config))
    assert {name: (lora.lora_rank, lora.scaling) for name, lora in ours.loras.items()} == theirs["loras"]
    assert set(ours.saved_modules) == set(theirs["saved"])
    their_tokens = {name.removesuffix(".base_layer"): ids for name, ids in theirs["tokens"].items()}
    tied = {"lm_head": "tied"} if ours.head_follows == "tokens" else {}
    assert dict(ours.token_indices) | tied == their_tokens


def _refusal(*, is_tied: bool, **config: Any) -> AdapterConfigError | None:
    try:
        resolved(is_tied=is_tied, **copy.deepcopy(config))
    except AdapterConfigError as error:
        return error
    return None


def _is_possible_in_peft(*, is_tied: bool, **config: Any) -> bool:
    try:
        injected(is_tied=is_tied, **copy.deepcopy(config))
    except (ValueError, AttributeError, KeyError, TypeError):
        return False
    return True


TWICE = {
    "target_modules": ["q_proj"],
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": {"lm_head": [2], "embed_tokens": [1]},
    "ensure_weight_tying": True,
}
"""lm_head saved whole, which peft wraps in its token rows, and these different from the embedding's."""


@settings(max_examples=40, deadline=None)
@given(CONFIGS, st.booleans())
@example(TWICE, True)
def test_only_what_peft_cannot_do_or_we_do_not_support_is_refused(config: dict[str, Any], is_tied: bool) -> None:
    error = _refusal(is_tied=is_tied, **config)
    if error is not None and _is_possible_in_peft(is_tied=is_tied, **config):
        saves_a_container = error.field == "modules_to_save" and "can be saved whole" in str(error)
        # peft wraps one part in another here and fails in the forward pass instead
        adapts_twice = error.field in ("modules_to_save", "trainable_token_indices") and "as well" in str(error)
        ties_different_ranks = error.field == "rank_pattern" and "tied" in str(error)
        assert saves_a_container or adapts_twice or ties_different_ranks, error


def test_every_module_of_all_linear_is_adapted_except_the_head() -> None:
    adapter = resolved(target_modules="all-linear")
    assert len(adapter.loras) == 7 * NUM_LAYERS
    assert "lm_head" not in adapter.loras


@pytest.mark.parametrize("is_tied", [False, True])
def test_names_are_in_the_models_order(is_tied: bool) -> None:
    names = base_modules(is_tied=is_tied).names
    adapter = resolved(is_tied=is_tied, target_modules=["v_proj", "q_proj", "lm_head"], modules_to_save=["norm"])
    assert list(adapter.loras) == [name for name in names if name in adapter.loras]
    assert list(adapter.saved_modules) == [name for name in names if name in adapter.saved_modules]


def test_the_first_pattern_in_the_file_wins() -> None:
    adapter = resolved(target_modules=["q_proj"], rank_pattern={"0.self_attn.q_proj": 2, ".*q_proj": 3})
    assert adapter.loras["model.layers.0.self_attn.q_proj"].lora_rank == 2
    assert adapter.loras["model.layers.10.self_attn.q_proj"].lora_rank == 3  # "0." must follow a dot, not a digit


def test_a_target_that_matches_nothing_is_named() -> None:
    with pytest.raises(AdapterConfigError, match=r"target_modules: \['c_attn'\] matches no module"):
        resolved(target_modules=["c_attn"])


def test_a_target_that_is_no_layer_is_named() -> None:
    with pytest.raises(AdapterConfigError, match=r"target_modules: matches 'model.layers.0.mlp'"):
        resolved(target_modules=["mlp"])


def test_a_saved_container_is_named() -> None:
    with pytest.raises(AdapterConfigError, match=r"modules_to_save: matches 'model.layers.0.self_attn'"):
        resolved(target_modules=["up_proj"], modules_to_save=["self_attn"])


def test_a_saved_name_that_matches_nothing_is_ignored_as_in_peft() -> None:
    assert resolved(target_modules=["q_proj"], modules_to_save=["classifier"]).saved_modules == ()


@pytest.mark.parametrize(
    ("fields", "blamed"),
    [
        ({"trainable_token_indices": {"q_proj": [1]}}, "trainable_token_indices"),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"trainable_token_indices": [1], "target_modules": ["embed_tokens"]}, "trainable_token_indices"),
        ({"trainable_token_indices": {"embed_tokens": [1], "lm_head": [1]}, "target_modules": ["lm_head"]},
         "trainable_token_indices"),
        ({"lora_bias": True, "target_modules": ["embed_tokens"]}, "lora_bias"),
        ({"target_modules": ["embed_tokens"], "exclude_modules": ["embed_tokens"], "ensure_weight_tying": True},
         "ensure_weight_tying"),
        ({"target_modules": "(", }, "target_modules"),
        ({"exclude_modules": "[", }, "exclude_modules"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern"),
        ({"layers_to_transform": [0], "layers_pattern": "("}, "layers_pattern"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_naming_a_field(fields: dict[str, Any], blamed: str) -> None:
    with pytest.raises(AdapterConfigError) as caught:
        resolved(is_tied=True, **({"target_modules": ["q_proj"]} | fields))
    assert caught.value.field == blamed
