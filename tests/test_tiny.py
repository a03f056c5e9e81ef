"""The tour: a tiny model, two tenants, three adapters and the base, one batch. Read this first."""

from pomona.core.request import FinishReason, SamplingParams
from support.adapters import make_adapter
from support.models import make_checkpoint
from support.runner import TinyEngine

PROMPT = [5, 17, 42, 9, 11, 3, 8, 30, 2, 77]


def test_a_tour_of_the_engine(tmp_path):
    # A base model of two layers with random weights, and three adapters of different ranks and targets.
    base = make_checkpoint(tmp_path / "base")
    paths = [
        make_adapter(tmp_path / "small", base, r=2),
        make_adapter(tmp_path / "large", base, r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
        make_adapter(tmp_path / "dora", base, r=4, use_dora=True),
    ]

    # Staging reads, verifies and converts an adapter; its id is the digest of its weights and config.
    tiny = TinyEngine(base)
    adapters = [tiny.load_adapter(path) for path in paths]
    assert len(set(adapters)) == 3

    # Four requests, one per adapter and one for the base, go into one batch.
    greedy = SamplingParams(max_tokens=8, temperature=0.0)
    requests = [tiny.add(PROMPT, greedy, adapter_id, salt=b"tenant a") for adapter_id in (None, *adapters)]
    tiny.step()
    assert tiny.engine.stats().num_running == 4
    assert tiny.engine.stats().num_resident_adapters == 3

    # A step computes what is to be computed: here all prompts at once, then one token of each sequence.
    tiny.run()
    answers = [tiny.tokens(request_id) for request_id in requests]
    assert tiny.engine.stats().num_steps == 8 + 1  # the last one only tells the runner what to forget
    assert all(tiny.finish_reason(request_id) is FinishReason.LENGTH for request_id in requests)

    # Each adapter has its own answer, and the same one when it is alone.
    assert len({tuple(answer) for answer in answers}) == 4
    assert [tiny.generate(PROMPT, greedy, adapter_id) for adapter_id in (None, *adapters)] == answers

    # Cached blocks are found again by the same tenant with the same adapter, and by nobody else.
    hits = tiny.engine.stats().num_prefix_hits
    for adapter_id, salt, is_hit in ((adapters[0], b"tenant a", True), (adapters[0], b"tenant b", False)):
        request_id = tiny.add(PROMPT, greedy, adapter_id, salt=salt)
        tiny.run()
        assert tiny.tokens(request_id) == answers[1]
        assert (tiny.engine.stats().num_prefix_hits > hits) is is_hit
        hits = tiny.engine.stats().num_prefix_hits

    # When all is done nothing is held.
    stats = tiny.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_kv_blocks_used, stats.num_pinned_adapters) == (0, 0, 0, 0)
