"""LLM and text: stop strings, and what is no text."""

from dataclasses import replace

import pytest

from pomona import LLM, SamplingParams
from pomona.core.errors import InvalidRequestError
from pomona.core.request import FinishReason
from support.models import make_checkpoint
from support.tokenizers import make_tokenizer_files

PARAMS = SamplingParams(max_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = make_checkpoint(tmp_path_factory.mktemp("text") / "tiny", vocab_size=400, max_position_embeddings=256)
    return LLM(str(make_tokenizer_files(path, vocab_size=400)), dtype="float32", kv_cache_bytes="8MiB")


def test_a_stop_string_is_cut_off_and_ends_the_answer(llm):
    free = llm.generate("The quick", sampling=PARAMS, ignore_eos=True)[0].text
    middle = free[len(free) // 2 : len(free) // 2 + 2]
    stopped = llm.generate("The quick", sampling=PARAMS, stop=[middle], ignore_eos=True)[0]
    assert stopped.text == free[: free.index(middle)]
    assert stopped.finish_reason is FinishReason.STOP


def test_one_stop_string_is_taken_whole_and_an_empty_one_is_refused(llm):
    listed = llm.generate("The quick", sampling=PARAMS, stop=["\x00never"], ignore_eos=True)[0]
    assert listed.finish_reason is FinishReason.LENGTH
    stop = "\x00" + listed.text  # holds every character of the answer
    assert llm.generate("The quick", sampling=PARAMS, stop=stop, ignore_eos=True)[0].text == listed.text
    for empty in ("", ["a", ""]):
        with pytest.raises(InvalidRequestError, match="stop holds an empty string"):
            llm.generate("The quick", sampling=PARAMS, stop=empty)


def test_stop_strings_end_no_answer_before_min_tokens(llm):
    free = llm.generate("The quick", sampling=PARAMS, ignore_eos=True)[0]
    sampling = replace(PARAMS, min_tokens=PARAMS.max_tokens)
    kept = llm.generate("The quick", sampling=sampling, stop=[free.text[0]], ignore_eos=True)[0]
    assert kept.token_ids == free.token_ids


def test_a_stop_string_of_an_incomplete_last_character_is_one_too(llm):
    broken = next(token_id for token_id in range(400) if llm.tokenizer.token_bytes(token_id) == b"\xc3")
    sampling = SamplingParams(max_tokens=1, temperature=0.0, logit_bias=((broken, 100.0),))
    assert llm.generate("The quick", sampling=sampling)[0].text == "\ufffd"
    stopped = llm.generate("The quick", sampling=sampling, stop="\ufffd")[0]
    assert (stopped.text, stopped.finish_reason) == ("", FinishReason.STOP)


def test_a_lone_surrogate_is_refused_as_no_text(llm):
    with pytest.raises(InvalidRequestError, match=r"prompt: is not valid Unicode: .* surrogates not allowed"):
        llm.generate("The \ud800 quick", sampling=PARAMS)
