import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomona.core.plan import TokenLogprobs
from pomona.core.request import FinishReason
from pomona.server.choice import Choice, Piece, PromptEcho, TextRules
from pomona.text.stop import StopStrings
from pomona.text.tokenizer import Tokenizer
from support.server import output
from support.tokenizers import make_tokenizer_files

EOS = 2


def _rules(*stops: str, **fields) -> TextRules:
    return TextRules(stops=StopStrings(stops) if stops else None, **fields)


def _logprobs(token_ids) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(token_id, -0.5, 1) for token_id in token_ids)


def _run(tokenizer, rules, parts, finish_reason=FinishReason.LENGTH, **last) -> tuple[Piece, Choice]:
    """Feed parts of an output; the last one ends it. Returns everything joined, and the choice."""
    choice = Choice(tokenizer, rules, [EOS])
    whole = Piece()
    for index, token_ids in enumerate(parts):
        fields = dict(finish_reason=finish_reason, **last) if index == len(parts) - 1 else {}
        piece = choice.advance(output(*token_ids, logprobs=_logprobs(token_ids), **fields))
        whole.text += piece.text
        whole.logprobs.extend(piece.logprobs)
        if piece.finish_reason is not None:
            whole.finish_reason, whole.stop_reason = piece.finish_reason, piece.stop_reason
            break
    return whole, choice


@given(data=st.data())
def test_the_answer_does_not_depend_on_how_tokens_come(tokenizer, data):
    token_ids = data.draw(st.lists(st.integers(3, 400), min_size=1, max_size=20))
    stops = data.draw(st.lists(st.sampled_from(["e", "th", " a", "\ufffd", "xyz"]), max_size=3, unique=True))
    rules = _rules(
        *stops, has_logprobs=True, include_stop=data.draw(st.booleans()), min_tokens=data.draw(st.integers(0, 4))
    )
    cuts = sorted(data.draw(st.sets(st.integers(1, len(token_ids)))) | {len(token_ids)})
    parts = [token_ids[start:end] for start, end in zip([0, *cuts], cuts, strict=False)]
    one_by_one, choice = _run(tokenizer, rules, [[token_id] for token_id in token_ids])
    in_parts, choice_in_parts = _run(tokenizer, rules, parts)
    assert in_parts == one_by_one
    assert choice_in_parts.num_output_tokens == choice.num_output_tokens


@given(token_ids=st.lists(st.integers(3, 400), min_size=1, max_size=20))
def test_without_stop_strings_every_token_has_its_log_probability_at_its_place(tokenizer, token_ids):
    whole, choice = _run(tokenizer, _rules(has_logprobs=True), [token_ids])
    assert [entry.token_id for entry in whole.logprobs] == token_ids
    assert choice.num_output_tokens == len(token_ids)
    offsets = [entry.text_offset for entry in whole.logprobs]
    assert offsets == sorted(offsets)
    assert whole.text == tokenizer.decode(token_ids)


def test_text_offsets_count_characters(tokenizer):
    token_ids = tokenizer.encode("é 你 fox")
    whole, _ = _run(tokenizer, _rules(has_logprobs=True), [token_ids])
    starts = {len(tokenizer.decode(token_ids[:index]).replace("\ufffd", "")) for index in range(len(token_ids))}
    assert {entry.text_offset for entry in whole.logprobs} == starts


def test_a_stop_string_ends_text_usage_and_log_probabilities(tokenizer):
    token_ids = tokenizer.encode("The quick brown fox jumps")
    whole, choice = _run(tokenizer, _rules("wn f", has_logprobs=True), [token_ids])
    assert whole.text == "The quick bro"
    assert (whole.finish_reason, whole.stop_reason) == (FinishReason.STOP, "wn f")
    kept = [tokenizer.token_text(entry.token_id) for entry in whole.logprobs]
    assert "".join(kept).startswith("The quick bro") and " fox" not in kept
    completed_at = next(n for n in range(len(token_ids)) if "wn f" in tokenizer.decode(token_ids[:n]))
    assert choice.num_output_tokens == completed_at


def test_tokens_of_a_possible_stop_string_wait_with_their_log_probabilities(tokenizer):
    choice = Choice(tokenizer, _rules("lazy cat", has_logprobs=True), [EOS])
    lazy, dog = tokenizer.encode(" lazy"), tokenizer.encode(" dog")
    first = [choice.advance(output(token_id, logprobs=_logprobs([token_id]))) for token_id in lazy]
    assert "".join(piece.text for piece in first) == " "
    # A token waits only if all of its characters do.
    assert sum(len(piece.logprobs) for piece in first) == 1
    rest = choice.advance(output(*dog, logprobs=_logprobs(dog), finish_reason=FinishReason.LENGTH))
    assert rest.text == "lazy dog"
    assert len(rest.logprobs) == len(lazy) - 1 + len(dog)


def test_the_stop_token_counts_but_is_not_shown(tokenizer):
    token_ids = [*tokenizer.encode("fox"), EOS]
    whole, choice = _run(tokenizer, _rules(has_logprobs=True), [token_ids], FinishReason.STOP, stop_token_id=EOS)
    assert (whole.text, whole.stop_reason) == ("fox", None)
    assert choice.num_output_tokens == len(token_ids)
    assert [entry.token_id for entry in whole.logprobs] == token_ids[:-1]


def test_a_stop_token_of_the_request_is_the_reason_and_may_be_kept(tokenizer):
    token_ids = tokenizer.encode("The lazy dog")
    for include, text in ((False, tokenizer.decode(token_ids[:-1])), (True, "The lazy dog")):
        rules = _rules(include_stop=include)
        whole, _ = _run(tokenizer, rules, [token_ids], FinishReason.STOP, stop_token_id=token_ids[-1])
        assert (whole.text, whole.stop_reason) == (text, token_ids[-1])


def test_stop_strings_are_not_looked_for_before_min_tokens(tokenizer):
    token_ids = tokenizer.encode("aaaaaaaa b")
    whole, choice = _run(tokenizer, _rules("a", min_tokens=len(token_ids)), [token_ids])
    assert whole.text == "aaaaaaaa b"
    assert choice.num_output_tokens == len(token_ids)


def test_what_was_held_back_comes_out_at_the_end(tokenizer):
    whole, _ = _run(tokenizer, _rules("fox!"), [tokenizer.encode("fox")])
    assert (whole.text, whole.finish_reason) == ("fox", FinishReason.LENGTH)


def test_an_echoed_prompt_has_an_entry_per_token_and_none_for_the_first(tokenizer):
    token_ids = tokenizer.encode("The quick")
    echo = PromptEcho(tokenizer, token_ids, "The quick", _rules(has_logprobs=True))
    assert not echo.is_complete(len(token_ids) - 2)
    assert echo.is_complete(len(token_ids) - 1)
    piece = echo.piece(_logprobs(token_ids[1:]))
    assert piece.text == "The quick"
    assert [entry.token_id for entry in piece.logprobs] == token_ids
    assert [entry.values is None for entry in piece.logprobs] == [True] + [False] * (len(token_ids) - 1)


def test_control_tokens_written_in_an_echoed_prompt_take_their_place_in_its_text(tokenizer):
    text = "é<|im_start|>dog<|im_end|>!"
    token_ids = tokenizer.encode(text)
    piece = PromptEcho(tokenizer, token_ids, text, _rules(has_logprobs=True)).piece(_logprobs(token_ids[1:]))
    assert all(text[entry.text_offset :].startswith(tokenizer.token_text(entry.token_id)) for entry in piece.logprobs)
    ids_only = PromptEcho(tokenizer, token_ids, None, _rules(has_logprobs=True)).piece(_logprobs(token_ids[1:]))
    assert (ids_only.text, ids_only.logprobs[-1].text_offset) == ("édog!", 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The quick", ["", "The ", "qu", "ick"]),
        ("<s>The quick", ["", "<s>", "The ", "qu", "ick"]),
        ("<s><s> The quick", ["", "<s>", "<s>", " ", "The ", "qu", "ick"]),
        ("The <s>quick", ["", "The ", "<s>", "", "qu", "ick"]),
        ("<s>", ["", "<s>"]),
    ],
)
def test_what_a_tokenizer_adds_to_an_echoed_prompt_takes_no_place_in_its_text(tmp_path, text, words):
    """A beginning-of-sequence token, also before one that is written there, and spaces behind control tokens."""
    tokenizer = Tokenizer.load(make_tokenizer_files(tmp_path, kind="sentencepiece"))
    token_ids = tokenizer.encode(text)
    piece = PromptEcho(tokenizer, token_ids, text, _rules(has_logprobs=True)).piece(_logprobs(token_ids[1:]))
    offsets = [entry.text_offset for entry in piece.logprobs]
    assert [text[start:end] for start, end in zip(offsets, [*offsets[1:], None], strict=True)] == words
