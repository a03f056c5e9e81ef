"""The form of API keys, and what of them is kept."""

from pomona.accounts import keys


def test_a_key_shows_its_id_and_nothing_of_its_secret():
    key = keys.new_key()
    assert key.text.startswith(keys.visible_prefix(key.key_id))
    secret = key.text.rsplit("-", 1)[1]
    assert len(secret) == 36
    assert secret not in repr(key)
    assert keys.key_id_of(key.text) == key.key_id


def test_no_two_keys_are_equal():
    assert len({keys.new_key().text for _ in range(1000)}) == 1000


def test_only_the_whole_key_matches_its_digest():
    key = keys.new_key()
    assert keys.is_key(key.text, key.digest)
    assert not keys.is_key(key.text[:-1] + ("a" if key.text[-1] != "a" else "b"), key.digest)
    assert key.text.encode() not in key.digest


def test_what_has_not_the_form_of_a_key_has_no_id():
    key = keys.new_key().text
    for text in ("", "pk-", key + "x", key[:-1], key.replace("pk-", "sk-"), key.upper(), key + "\n", "pk-\0"):
        assert keys.key_id_of(text) is None, text
