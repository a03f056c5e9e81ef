"""An adapter's identity is its bytes."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from pomona.adapters.digest import adapter_digest
from pomona.core.adapter import AdapterFiles

FILES = st.builds(
    AdapterFiles,
    config_bytes=st.binary(max_size=6),
    weights_bytes=st.binary(max_size=6),
    weights_format=st.sampled_from(["safetensors", "bin"]),
)


@given(FILES, FILES)
def test_two_adapters_share_an_id_only_if_their_bytes_are_equal(first: AdapterFiles, second: AdapterFiles) -> None:
    assert (adapter_digest(first) == adapter_digest(second)) == (first == second)


@given(FILES, st.binary(min_size=1, max_size=3))
def test_bytes_moved_between_config_and_weights_change_the_id(files: AdapterFiles, moved: bytes) -> None:
    first = dataclasses.replace(files, config_bytes=files.config_bytes + moved)
    second = dataclasses.replace(files, weights_bytes=moved + files.weights_bytes)
    assert adapter_digest(first) != adapter_digest(second)


def test_an_id_is_64_hex_digits() -> None:
    adapter_id = adapter_digest(AdapterFiles(b"{}", b"", "bin"))
    assert len(adapter_id) == 64
    assert set(adapter_id) <= set("0123456789abcdef")
