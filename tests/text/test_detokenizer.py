import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomona.text.detokenizer import Detokenizer

texts = st.text(st.characters(codec="utf-8"), max_size=60)
id_lists = st.lists(st.integers(0, 800), max_size=40)


def _pieces(tokenizer, token_ids, **options) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **options)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


@given(text=texts)
def test_the_pieces_of_a_text_are_the_text(tokenizer, text):
    token_ids = tokenizer.encode(text)
    assert "".join(_pieces(tokenizer, token_ids)) == tokenizer.decode(token_ids)


@given(text=texts)
def test_no_piece_of_a_text_holds_half_a_character(tokenizer, text):
    text = text.replace("\ufffd", "")
    assert "\ufffd" not in "".join(_pieces(tokenizer, tokenizer.encode(text)))


@given(token_ids=id_lists, skip=st.booleans())
def test_the_pieces_of_any_ids_are_their_decoding(tokenizer, token_ids, skip):
    pieces = _pieces(tokenizer, token_ids, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=skip)


@given(token_ids=id_lists)
def test_a_character_is_given_up_only_when_nothing_can_complete_it(tokenizer, token_ids):
    """Whatever is written so far must stay the beginning of the text, also when the best continuation follows."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    written, raw = "", b""
    for token_id in token_ids:
        written += detokenizer.push(token_id)
        raw += tokenizer.token_bytes(token_id)
        completed = max((raw + tail for tail in (b"", b"\x80", b"\x80\x80", b"\x80\x80\x80")), key=_num_valid)
        whole = completed.decode("utf-8", "replace")
        cut = min(tokenizer.num_leading_spaces_cut, len(whole) - len(whole.lstrip(" ")))
        assert whole[cut:].startswith(written)


def _num_valid(raw: bytes) -> int:
    return -raw.decode("utf-8", "replace").count("\ufffd")


@pytest.mark.parametrize("character", ["é", "你", "🙂"])
def test_the_bytes_of_a_character_come_out_together(byte_level, character):
    token_ids = [byte_level._backend.token_to_id(_byte_token(byte_level, byte)) for byte in character.encode()]
    pieces = _pieces(byte_level, token_ids)
    assert pieces == [""] * (len(token_ids) - 1) + [character, ""]


def _byte_token(tokenizer, byte: int) -> str:
    return next(
        token
        for token in tokenizer._backend.get_vocab()
        if len(token) == 1 and tokenizer.token_bytes(tokenizer._backend.token_to_id(token)) == bytes([byte])
    )


def test_an_incomplete_character_at_the_end_is_one_replacement_character(byte_level):
    token_ids = [byte_level._backend.token_to_id(_byte_token(byte_level, byte)) for byte in b"\xf0\x9f\x99"]
    assert _pieces(byte_level, token_ids) == ["", "", "", "\ufffd"]


def test_the_space_before_a_first_word_is_cut_at_the_start_and_kept_in_a_continuation(sentencepiece):
    token_ids = sentencepiece.encode("model", add_special_tokens=False)
    assert "".join(_pieces(sentencepiece, token_ids)) == "model"
    assert "".join(_pieces(sentencepiece, token_ids, is_continuation=True)) == " model"


def test_special_tokens_do_not_hide_the_start_of_the_text(sentencepiece):
    token_ids = [sentencepiece.bos_token_id, *sentencepiece.encode("model", add_special_tokens=False)]
    assert "".join(_pieces(sentencepiece, token_ids)) == "model"
