import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from pomona.core.ids import RequestId
from pomona.core.output import RequestOutput
from pomona.core.plan import TokenLogprobs
from pomona.core.request import FinishReason
from pomona.driver.outputs import join_by_request, join_outputs


def _story(name: str, num_tokens: int) -> list[RequestOutput]:
    """Outputs of a request from its first step to its last, one token each."""
    return [
        RequestOutput(
            RequestId(name),
            (index,),
            (TokenLogprobs(index, -1.0, 1),),
            (TokenLogprobs(7, -2.0, 1),) if index == 0 else (),
            FinishReason.STOP if index == num_tokens - 1 else None,
            index if index == num_tokens - 1 else None,
            None,
            32,
            None if index == 0 else 4.5,
        )
        for index in range(num_tokens)
    ]


@given(st.integers(1, 20), st.lists(st.integers(0, 20)))
def test_joining_in_any_pieces_tells_the_same_story(num_tokens, cuts):
    story = _story("r", num_tokens)
    edges = sorted({0, num_tokens, *(cut for cut in cuts if cut < num_tokens)})
    pieces = [join_outputs(story[start:end]) for start, end in itertools.pairwise(edges)]
    whole = join_outputs(story)
    assert join_outputs(pieces) == whole
    assert whole == RequestOutput(
        RequestId("r"),
        tuple(range(num_tokens)),
        tuple(TokenLogprobs(index, -1.0, 1) for index in range(num_tokens)),
        (TokenLogprobs(7, -2.0, 1),),
        FinishReason.STOP,
        num_tokens - 1,
        None,
        32,
        4.5 if num_tokens > 1 else None,
    )


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_outputs_of_many_requests_are_joined_each_with_its_own(lengths, rng: random.Random):
    stories = [_story(str(index), length) for index, length in enumerate(lengths)]
    mixed = [name for name, story in enumerate(stories) for _ in story]
    rng.shuffle(mixed)
    left = [iter(story) for story in stories]
    joined = join_by_request(next(left[name]) for name in mixed)
    assert {output.request_id: output for output in joined} == {
        story[0].request_id: join_outputs(story) for story in stories
    }
    assert len(joined) == len(stories)
    assert [output.request_id for output in joined] == list(dict.fromkeys(str(name) for name in mixed))
