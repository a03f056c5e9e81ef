"""Files and batches in the database: what may be deleted, changed and ended when, whoever else works on them."""

import pytest

from pomona.accounts.batches import BatchStore
from pomona.accounts.tenants import TenantStore
from pomona.core.errors import AccountConflictError


@pytest.fixture
def store(database, tmp_path):
    TenantStore(database).create_tenant("acme")
    return BatchStore(database, tmp_path / "files")


def new_file(store, purpose="batch"):
    file_id = store.new_file_id()
    store.path_of(file_id).touch()
    return store.add_file(file_id, "acme", "in.jsonl", purpose).id


def new_batch(store):
    return store.create_batch("acme", "key", "/v1/completions", new_file(store), None)


@pytest.mark.parametrize("kind", ["output_file_id", "error_file_id"])
def test_what_a_batch_has_written_stays_until_it_has_ended(store, kind):
    batch = new_batch(store)
    assert store.claim("process") is not None
    store.update(batch.id, "process", status="in_progress", **{kind: new_file(store, "batch_output")})
    written = getattr(store.batch(batch.id), kind)
    with pytest.raises(AccountConflictError):  # whoever goes on would do everything again
        store.delete_file(written, "acme")
    store.update(batch.id, "process", status="completed", is_released=True)
    store.delete_file(written, "acme")


def test_what_is_said_late_of_a_batch_that_has_ended_changes_nothing(store):
    batch = new_batch(store)
    assert store.claim("process") is not None
    assert store.update(batch.id, "process", status="completed", num_completed=5, is_released=True) is not None
    assert store.update(batch.id, "process", num_completed=3) is None
    assert store.batch(batch.id).num_completed == 5
