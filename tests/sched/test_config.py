"""Settings of the scheduler are checked when built."""

import pytest

from pomona.core.errors import ConfigError
from support.engine import make_config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_num_batched_tokens", 0),
        ("max_num_seqs", 0),
        ("max_model_len", 1),
        ("block_size", 0),
        ("num_kv_blocks", 0),
        ("num_adapter_pages", -1),
        ("max_waiting", 0),
        ("max_prefill_chunk", 0),
        ("min_prefix_wait_tokens", -1),
        ("reserve_steps", -1),
        ("adapter_wait_limit_s", -0.1),
        ("adapter_wait_limit_s", float("nan")),
        ("adapter_wait_limit_s", float("inf")),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        make_config(**{name: value})


def test_the_smallest_replica_is_allowed():
    make_config(
        max_num_batched_tokens=1, max_num_seqs=1, max_model_len=2, block_size=1, num_kv_blocks=1, num_adapter_pages=0
    )
