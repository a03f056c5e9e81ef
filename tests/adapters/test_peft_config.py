"""adapter_config.json: every key honoured, harmless, or refused by name."""

import dataclasses
import json
import warnings
from typing import Any

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomona.adapters.peft_config import ACCEPTED_FIELDS, HONOURED_FIELDS, REFUSED_FIELDS, parse_config
from pomona.core.adapter import AdapterSpec
from pomona.core.errors import AdapterConfigError


def parse(**fields: Any) -> AdapterSpec:
    return parse_config(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]} | fields).encode())


def refusal(**fields: Any) -> AdapterConfigError:
    with pytest.raises(AdapterConfigError) as caught:
        parse(**fields)
    return caught.value


def test_every_field_of_the_installed_peft_is_classified_exactly_once() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields <= HONOURED_FIELDS | set(ACCEPTED_FIELDS) | set(REFUSED_FIELDS)
    assert not HONOURED_FIELDS & set(ACCEPTED_FIELDS)
    assert not HONOURED_FIELDS & set(REFUSED_FIELDS)
    assert not set(ACCEPTED_FIELDS) & set(REFUSED_FIELDS)


def test_missing_keys_take_the_defaults_of_peft() -> None:
    spec = parse_config(b'{"peft_type": "LORA"}')
    default = peft.LoraConfig()
    assert (spec.lora_rank, spec.lora_alpha, spec.target_modules) == (default.r, default.lora_alpha, None)
    assert (spec.bias, spec.use_rslora, spec.use_dora) == (default.bias, default.use_rslora, default.use_dora)


def test_what_peft_writes_is_read_back(tmp_path) -> None:
    config = peft.LoraConfig(
        r=16,
        lora_alpha=12.5,
        target_modules=["v_proj", "q_proj"],
        exclude_modules="model.layers.0.*",
        use_rslora=True,
        rank_pattern={"b": 3, "a": 4},
        alpha_pattern={"a": 1.5},
        layers_to_transform=[3, 1],
        layers_pattern="layers",
        bias="lora_only",
        modules_to_save=["norm", "lm_head"],
        trainable_token_indices={"embed_tokens": [4, 2]},
        lora_dropout=0.1,
        task_type="CAUSAL_LM",
        base_model_name_or_path="org/base",
    )
    config.save_pretrained(str(tmp_path))
    assert parse_config((tmp_path / "adapter_config.json").read_bytes()) == AdapterSpec(
        lora_rank=16,
        lora_alpha=12.5,
        target_modules=("q_proj", "v_proj"),
        exclude_modules="model.layers.0.*",
        use_rslora=True,
        rank_pattern=(("a", 4), ("b", 3)),  # peft writes keys sorted, and matches in the order of the file
        alpha_pattern=(("a", 1.5),),
        layers_to_transform=(1, 3),
        layers_pattern=("layers",),
        bias="lora_only",
        modules_to_save=("lm_head", "norm"),
        trainable_token_indices=(("embed_tokens", (4, 2)),),
        base_model_name="org/base",
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0), ("r", -4), ("r", True), ("r", 4.0), ("r", float("nan")), ("r", "8"), ("r", None), ("r", 2**20),
        ("lora_alpha", float("nan")), ("lora_alpha", float("inf")), ("lora_alpha", True), ("lora_alpha", "16"),
        ("lora_alpha", 10**40), ("rank_pattern", {"q_proj": 0}), ("rank_pattern", {"q_proj": 1.5}),
        ("rank_pattern", ["q_proj"]), ("rank_pattern", {"": 4}), ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", {"q_proj": float("inf")}), ("target_modules", 3), ("target_modules", [3]),
        ("target_modules", [""]), ("target_modules", {"q_proj": 1}), ("target_modules", "q" * 5000),
        ("exclude_modules", [None]), ("layers_to_transform", [-1]), ("layers_to_transform", [True]),
        ("layers_to_transform", "1"), ("layers_to_transform", 1.0), ("layers_pattern", "layers"),
        ("bias", "some"), ("bias", None), ("bias", []), ("use_dora", 1), ("use_rslora", "true"),
        ("fan_in_fan_out", "no"), ("lora_bias", 0), ("ensure_weight_tying", "yes"), ("modules_to_save", "lm_head"),
        ("modules_to_save", [3]), ("modules_to_save", ["(a+)+"]), ("trainable_token_indices", [1, 1]),
        ("trainable_token_indices", [-1]), ("trainable_token_indices", []), ("trainable_token_indices", [1.0]),
        ("trainable_token_indices", {"embed_tokens": 3}), ("trainable_token_indices", {"em*": [3]}),
        ("trainable_token_indices", 3), ("base_model_name_or_path", 3), ("lora_dropout", 1.5),
        ("lora_dropout", "0.1"), ("peft_type", "IA3"), ("peft_type", None), ("peft_type", ["LORA"]),
        ("task_type", "SEQ_CLS"), ("task_type", 3), ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"), ("init_lora_weights", "olora"), ("init_lora_weights", "OLoRA"),
        ("init_lora_weights", "corda"), ("init_lora_weights", "loftq"), ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "something"), ("init_lora_weights", 3), ("layer_replication", [[0, 2]]),
        ("megatron_config", {"a": 1}), ("target_parameters", ["experts.weight"]), ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}), ("alora_invocation_tokens", [1, 2]), ("arrow_config", {}),
        ("velora_config", {}), ("kasa_config", {}), ("monteclora_config", {}), ("enable_lora", [True]),
    ],
)  # fmt: skip
def test_a_wrong_or_unsupported_value_is_refused_naming_its_field(field: str, value: Any) -> None:
    error = refusal(**{field: value})
    assert error.field == field
    assert str(error).startswith(f"adapter_config.json: {field}: ")


@pytest.mark.parametrize(
    ("fields", "blamed"),
    [
        ({"lora_bias": True, "use_dora": True}, "lora_bias"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias"),
        ({"use_dora": True, "init_lora_weights": "mica"}, "use_dora"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [1]}, "layers_to_transform"),
    ],
)
def test_a_combination_that_peft_refuses_is_refused(fields: dict[str, Any], blamed: str) -> None:
    assert refusal(**fields).field == blamed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_dropout", 0.3), ("inference_mode", False), ("revision", "main"), ("auto_mapping", {"a": "b"}),
        ("peft_version", "0.21.0"), ("init_lora_weights", False), ("init_lora_weights", "gaussian"),
        ("init_lora_weights", "eva"), ("init_lora_weights", "orthogonal"), ("loftq_config", {"loftq_bits": 4}),
        ("runtime_config", {"ephemeral_gpu_offload": True}), ("megatron_core", "megatron.core"),
        ("qalora_group_size", 32), ("merge_weights", True), ("task_type", "CAUSAL_LM"), ("layer_replication", None),
        ("target_parameters", []), ("use_qalora", False), ("alora_invocation_tokens", None),
        ("a_feature_of_tomorrow", None),
    ],
)  # fmt: skip
def test_a_value_that_cannot_change_inference_is_accepted_and_changes_nothing(field: str, value: Any) -> None:
    assert parse(**{field: value}) == parse()


@pytest.mark.parametrize("value", [True, False, 0, "", [], {}])
def test_an_unknown_key_is_refused_by_name(value: Any) -> None:
    error = refusal(a_feature_of_tomorrow=value)
    assert error.field == "a_feature_of_tomorrow"
    assert "unknown key; this version of Pomona does not know it" in str(error)


def test_refused_initializations_say_how_to_convert_the_adapter() -> None:
    assert "path_initial_model_for_weight_conversion" in str(refusal(init_lora_weights="pissa"))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"3", b'"LORA"', b"\xff\xfe{}", b'{"peft_type": "LORA",}', b"[" * 100_000,
        b'{"a":' * 100_000, b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", b" " * (2**20 + 1),
        b'\xef\xbb\xbf{"peft_type": "LORA"}',
    ],
)  # fmt: skip
def test_a_file_that_is_no_small_json_object_is_refused(content: bytes) -> None:
    with pytest.raises(AdapterConfigError, match=r"adapter_config\.json: \(file\): "):
        parse_config(content)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=6,
)
_KEYS = st.sampled_from(sorted(HONOURED_FIELDS | set(ACCEPTED_FIELDS) | set(REFUSED_FIELDS)))


@given(st.dictionaries(_KEYS, _JSON, max_size=4))
def test_any_json_is_parsed_or_refused_with_a_message(fields: dict[str, Any]) -> None:
    try:
        blamed = None if parse(**fields).lora_rank >= 1 else "r"
    except AdapterConfigError as error:
        blamed = error.field
    assert blamed is None or blamed in fields


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_with_a_message(content: bytes) -> None:
    with pytest.raises(AdapterConfigError):
        parse_config(content)


@given(st.fixed_dictionaries({}, optional={
    "lora_bias": st.booleans(), "use_dora": st.booleans(), "target_modules": st.sampled_from(["q", ["q"], None]),
    "layers_to_transform": st.sampled_from([None, [0], 1]), "layers_pattern": st.sampled_from([None, "layers", ["h"]]),
    "init_lora_weights": st.sampled_from([True, False, "gaussian", "eva", "mica"]),
}))  # fmt: skip
def test_combinations_that_peft_refuses_are_refused(fields: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            peft.LoraConfig(**fields)
        except ValueError:
            refusal(**fields)
