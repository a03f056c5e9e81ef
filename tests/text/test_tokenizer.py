import json
import threading
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st

from pomona.core.errors import CheckpointError
from pomona.text.tokenizer import Tokenizer
from support.tokenizers import CORPUS, SPECIALS, make_tokenizer_files

texts = st.text(st.characters(codec="utf-8"), max_size=60)


def _edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


@given(text=texts)
def test_byte_level_round_trip_loses_nothing(byte_level, text):
    assert byte_level.decode(byte_level.encode(text), skip_special_tokens=False) == text


@given(text=texts)
def test_byte_fallback_round_trip_loses_nothing(sentencepiece, text):
    # "▁" itself is how sentencepiece writes a space; special tokens are left out of what is decoded.
    text = text.replace("▁", "")
    assume(not any(token in text for token in ("<unk>", "<s>", *SPECIALS)))
    assert sentencepiece.decode(sentencepiece.encode(text)) == text


@given(token_ids=st.lists(st.integers(0, 511), max_size=30), skip=st.booleans())
def test_byte_level_decoding_equals_the_library(byte_level, folder_of_byte_level, token_ids, skip):
    expected = folder_of_byte_level.decode(token_ids, skip_special_tokens=skip)
    assert byte_level.decode(token_ids, skip_special_tokens=skip) == expected


@given(text=texts)
def test_byte_fallback_decoding_of_text_equals_the_library(sentencepiece, folder_of_sentencepiece, text):
    token_ids = sentencepiece.encode(text)
    assert sentencepiece.decode(token_ids) == folder_of_sentencepiece.decode(token_ids)


@pytest.fixture(scope="session")
def folder_of_byte_level(tmp_path_factory):
    folder = make_tokenizer_files(tmp_path_factory.mktemp("library_byte_level"))
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def folder_of_sentencepiece(tmp_path_factory):
    folder = make_tokenizer_files(tmp_path_factory.mktemp("library_sentencepiece"), kind="sentencepiece")
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_only_broken_bytes_become_replacement_characters(sentencepiece):
    token_ids = [sentencepiece._backend.token_to_id(token) for token in ("<0xE4>", "<0xBD>", "<0xA0>", "<0xFF>")]
    assert sentencepiece.decode(token_ids) == "你\ufffd"


def test_ids_without_a_token_decode_to_nothing(tokenizer):
    assert tokenizer.decode([tokenizer.vocab_size, 10**9]) == ""
    assert tokenizer.token_bytes(-1) == b""


def test_special_tokens_are_left_out_unless_kept(tokenizer):
    token_ids = tokenizer.encode("a b<|im_end|>", add_special_tokens=False)
    assert tokenizer.eos_token_id in token_ids
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == "a b<|im_end|>"
    assert tokenizer.decode(token_ids) == "a b"


def test_the_tokenizers_own_specials_are_added_only_on_request(sentencepiece):
    assert sentencepiece.encode("a")[0] == sentencepiece.bos_token_id
    assert sentencepiece.bos_token_id not in sentencepiece.encode("a", add_special_tokens=False)


def test_special_tokens_are_known_by_name(sentencepiece):
    assert sentencepiece.special_tokens == {
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }


def test_truncation_and_padding_of_the_file_are_switched_off(folder):
    _edit(
        folder / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        },
    )
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode(CORPUS[0]), skip_special_tokens=False) == CORPUS[0]


def test_tokens_that_only_the_config_knows_are_added_at_their_ids(folder):
    size = Tokenizer.load(folder).vocab_size
    _edit(folder / "tokenizer_config.json", added_tokens_decoder={str(size): {"content": "<|tool|>", "special": True}})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("<|tool|>") == [size]
    assert size in tokenizer.special_token_ids


def test_tokens_that_cannot_have_their_ids_are_refused(folder):
    _edit(folder / "tokenizer_config.json", added_tokens_decoder={"99999": {"content": "<|tool|>", "special": True}})
    with pytest.raises(CheckpointError, match=r"added_tokens_decoder: token '<\|tool\|>' has id 99999"):
        Tokenizer.load(folder)


def test_a_plain_vocabulary_entry_named_as_eos_becomes_special(folder):
    word = "the" if Tokenizer.load(folder)._backend.token_to_id("the") is not None else "e"
    _edit(folder / "tokenizer_config.json", eos_token=word)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_token_id in tokenizer.special_token_ids


def _of_transformers(folder: Path) -> transformers.PreTrainedTokenizerFast:
    _edit(folder / "tokenizer_config.json", pad_token="<|endoftext|>")  # as text: it does not take every spelling
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("declared", [False, True])
def test_named_tokens_are_those_that_transformers_takes(folder, declared):
    if declared:
        _edit(folder / "tokenizer_config.json", added_tokens_decoder={})
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|endoftext|>"}, "bos_token": "<|im_start|>"})
    )
    theirs = _of_transformers(folder)
    expected = {name: getattr(theirs, name) for name in ("bos_token", "eos_token")}
    ours = Tokenizer.load(folder).special_tokens
    assert {name: ours.get(name) for name in expected} == expected
    assert expected["eos_token"] == ("<|im_end|>" if declared else "<|endoftext|>")


@pytest.mark.parametrize("is_added", [None, False, True])
@pytest.mark.parametrize("is_special", [False, True])
def test_tokens_are_what_the_config_declares_as_in_transformers(folder, is_added, is_special):
    """Whether tokenizer.json has the token as an ordinary entry of the vocabulary, or as added, special or not."""
    content = json.loads((folder / "tokenizer.json").read_text())
    (token,) = [token for token in content["added_tokens"] if token["content"] == "<|im_start|>"]
    content["added_tokens"] = [other for other in content["added_tokens"] if other is not token]
    if is_added is not None:
        content["added_tokens"].append({**token, "special": is_added})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    entry = {name: value for name, value in token.items() if name != "id"}
    declared = {str(token["id"]): {**entry, "special": is_special, "lstrip": True}}
    _edit(folder / "tokenizer_config.json", added_tokens_decoder=declared)
    ours, theirs = Tokenizer.load(folder), _of_transformers(folder)
    token_ids = theirs.encode("a <|im_start|>b")
    assert ours.encode("a <|im_start|>b") == token_ids
    assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"additional_special_tokens": ["<|user|>", "<|tool|>"]}},
        {"tokenizer_config": {"extra_special_tokens": ["<|tool|>", "<|im_end|>"], "sep_token": "<|user|>"}},
        {"tokenizer_config": {"extra_special_tokens": {"tool_token": "<|tool|>"}, "audio_token": "<|user|>"}},
        {"tokenizer_config": {"added_tokens_decoder": {"435": {"content": "<|tool|>"}}, "cls_token": "<|tool|>"}},
        {"tokenizer_config": {"added_tokens_decoder": {"435": {"content": "<|tool|>"}}}},
        {"tokenizer_config": {"tool_token": {"__type": "AddedToken", "content": "<|tool|>", "lstrip": True}}},
        {"special_tokens_map": {"unk_token": {"content": "e", "rstrip": True}, "mask_token": "<|tool|>"}},
        {"special_tokens_map": {"additional_special_tokens": ["<|tool|>"]}, "added_tokens": {"<|user|>": 435}},
    ],
)
def test_tokens_that_only_the_config_names_are_added_as_in_transformers(folder, files):
    assert Tokenizer.load(folder).vocab_size == 435
    for name, fields in files.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **fields}))
    ours, theirs = Tokenizer.load(folder), _of_transformers(folder)
    token_ids = theirs.encode("a <|tool|>b e c<|user|> d")
    assert ours.encode("a <|tool|>b e c<|user|> d") == token_ids
    assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)
    assert ours.special_tokens == {name: str(token) for name, token in theirs.special_tokens_map.items()}


def test_a_checkpoint_without_tokenizer_json_says_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json.*save_pretrained"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 1}'])
def test_a_broken_tokenizer_json_is_named(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"added_tokens_decoder": ["<|tool|>"]},
        {"added_tokens_decoder": {"last": {"content": "<|tool|>"}}},
        {"additional_special_tokens": 5},
        {"extra_special_tokens": "<|tool|>"},
    ],
)
def test_tokens_of_a_config_that_are_no_list_or_object_are_named(folder, fields):
    _edit(folder / "tokenizer_config.json", **fields)
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: {next(iter(fields))}: must be"):
        Tokenizer.load(folder)


def test_an_added_token_may_be_its_text_alone(folder):
    size = Tokenizer.load(folder).vocab_size
    _edit(folder / "tokenizer_config.json", added_tokens_decoder={str(size): "<|tool|>"})
    assert Tokenizer.load(folder).encode("<|tool|>", add_special_tokens=False) == [size]


def test_a_broken_tokenizer_config_is_named(folder):
    (folder / "tokenizer_config.json").write_text("[1")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: cannot be read as JSON"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    "decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}, {"type": "BPEDecoder", "suffix": "</w>"}]
)
def test_decoders_that_cannot_be_streamed_are_refused_by_name(folder, decoder):
    _edit(folder / "tokenizer.json", decoder=decoder)
    with pytest.raises(CheckpointError, match=f"decoder {decoder['type'] if decoder else 'none'} is not supported"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True},
        {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]},
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    ],
)
def test_word_mark_decoders_of_other_kinds_decode_as_the_library_does(tmp_path, decoder):
    folder = make_tokenizer_files(tmp_path, kind="sentencepiece")
    _edit(folder / "tokenizer.json", decoder=decoder)
    tokenizer, library = Tokenizer.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    token_ids = tokenizer.encode("q brown fox", add_special_tokens=False)
    assert tokenizer.decode(token_ids) == library.decode(token_ids)


def test_many_threads_may_encode_and_decode_at_once(tokenizer):
    expected = [tokenizer.encode(text) for text in CORPUS]
    wrong: list[str] = []

    def work() -> None:
        for text, token_ids in zip(CORPUS, expected, strict=True):
            if tokenizer.encode(text) != token_ids or tokenizer.decode(token_ids) != text:
                wrong.append(text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
