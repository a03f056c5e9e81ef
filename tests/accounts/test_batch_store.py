"""Files and batches in the database: what may be deleted, changed and ended when, whoever else works on them."""

import pytest

from pomona.accounts.batches import BatchStore
from pomona.accounts.tenants import TenantStore
from pomona.core.errors import AccountConflictError, InvalidRequestError


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


def test_a_batch_that_nobody_has_begun_is_cancelled_at_once(store):
    busy, waiting = new_batch(store), new_batch(store)
    claimed = store.claim("process")
    assert claimed is not None and claimed.id == busy.id
    assert store.claim("process", ("acme",)) is None  # the tenant's next one waits, for a day if need be
    cancelled = store.cancel(waiting.id, "acme")
    assert (cancelled.status, cancelled.ended_s is None) == ("cancelled", False)
    assert store.cancel(busy.id, "acme").status == "cancelling"
    store.delete_file(waiting.input_file_id, "acme")


def test_a_batch_that_somebody_had_begun_is_ended_by_whoever_takes_it_over(store, monkeypatch):
    """Its files are there."""
    monkeypatch.setattr("pomona.accounts.batches.LEASE_S", -1.0)
    batch = new_batch(store)
    assert store.claim("dead") is not None
    assert store.cancel(batch.id, "acme").status == "cancelling"
    taken = store.claim("process")
    assert taken is not None and taken.output_file_id is not None


def test_a_tenant_has_so_many_batches_that_have_not_ended(store, monkeypatch):
    monkeypatch.setattr("pomona.accounts.batches._MAX_UNENDED", 2)
    batches = [new_batch(store) for _ in range(2)]
    with pytest.raises(AccountConflictError, match="2 batches"):
        new_batch(store)
    store.cancel(batches[0].id, "acme")
    new_batch(store)


def test_empty_files_take_room_too(store):
    for _ in range(2):
        new_file(store)
    with pytest.raises(AccountConflictError):
        store.check_room("acme", 8192)
    store.check_room("acme", 8193)


def test_only_files_for_batches_are_input(store):
    answers = new_file(store, "batch_output")
    with pytest.raises(InvalidRequestError, match="batch_output") as refused:
        store.create_batch("acme", "key", "/v1/completions", answers, None)
    assert refused.value.field == "input_file_id"
