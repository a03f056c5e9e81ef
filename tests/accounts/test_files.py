"""Files with OpenAI's own client: what is stored, what is refused, and that nothing is left of what was not."""

import asyncio
import errno
from dataclasses import replace

import openai
import pytest

from support.accounts import serve_accounts
from support.batches import body, lines, start_with


async def test_files_are_stored_read_paged_and_deleted(served, clients):
    client = clients["acme"]
    content = lines(body())
    files = [await client.files.create(file=(f"{n}.jsonl", content), purpose="batch") for n in range(3)]
    assert (files[0].bytes, files[0].filename, files[0].status) == (len(content), "0.jsonl", "processed")
    assert (await client.files.content(files[1].id)).content == content
    page = await client.files.list(limit=2)
    assert [file.id for file in page.data] == [files[2].id, files[1].id]
    assert page.has_more
    assert [file.id async for file in page] == [file.id for file in reversed(files)]
    page = await client.files.list(limit=2, order="asc")
    assert [file.id async for file in page] == [file.id for file in files]
    for path, name in (("files", "order"), ("files", "odd"), ("batches", "order"), ("adapters", "order")):
        refused = await served.call("acme", "GET", f"/v1/{path}?{name}=up")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)
    assert (await client.files.delete(files[0].id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(files[0].id)
    batch = await start_with(client, files[1].id)
    with pytest.raises(openai.ConflictError):
        await client.files.delete(batch.input_file_id)


async def test_a_file_whose_content_is_gone_is_not_there(served, clients):
    client = clients["acme"]
    file = await client.files.create(file=("in.jsonl", lines(body())), purpose="batch")
    served.accounts.batches.path_of(file.id).unlink()
    with pytest.raises(openai.NotFoundError, match=file.id):
        await client.files.content(file.id)


async def test_forms_that_are_wrong_are_refused(served, clients):
    for options, status in (
        ({"files": {"file": b"x"}, "data": {"purpose": "fine-tune"}}, 400),
        ({"files": {"file": b"x"}}, 400),
        ({"data": {"purpose": "batch"}}, 400),
        ({"content": b"junk", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400),
        ({"content": b"junk", "headers": {"content-type": "multipart/form-data"}}, 400),
        ({"files": [("file", b"x"), ("file", b"y")], "data": {"purpose": "batch"}}, 400),
        ({"files": {"file": b"x"}, "data": {"purpose": "batch", "expires_after[seconds]": "3600"}}, 400),
    ):
        headers = {"authorization": f"Bearer {served.keys['acme']}", **options.pop("headers", {})}
        response = await served.served.http.post("/v1/files", headers=headers, **options)
        assert response.status_code == status, response.text
        assert response.json()["error"]["message"]


async def test_a_part_of_a_file_can_be_read_and_parts_that_are_not_there_are_refused(served):
    headers = {"authorization": f"Bearer {served.keys['acme']}"}
    form = {"files": {"file": b"0123456789"}, "data": {"purpose": "batch"}}
    path = (await served.served.http.post("/v1/files", headers=headers, **form)).json()["id"]
    for wanted, status, what in (
        ("bytes=2-4", 206, b"234"),
        ("bytes=0-1,8-", 206, None),
        ("bytes=10-", 416, "invalid_range"),
        ("bytes=4-2", 400, "invalid_value"),
        ("lines=1-2", 400, "invalid_value"),
        ("nonsense", 400, "invalid_value"),
    ):
        url = f"/v1/files/{path}/content"
        response = await served.served.http.get(url, headers={**headers, "range": wanted})
        assert response.status_code == status, wanted
        if status == 206:
            assert what in (None, response.content)
            continue
        assert response.json()["error"]["code"] == what
        assert response.headers.get("content-range") == ("bytes */10" if status == 416 else None)


async def test_files_have_a_limit_together(config, tmp_path):
    async with serve_accounts(tmp_path, replace(config, max_tenant_file_bytes=100)) as served:
        headers = {"authorization": f"Bearer {served.keys['acme']}"}
        statuses = []
        for _ in range(2):
            form = {"files": {"file": b"x" * 150}, "data": {"purpose": "batch"}}
            statuses.append((await served.served.http.post("/v1/files", headers=headers, **form)).status_code)
    assert statuses == [200, 409]


async def test_files_that_come_at_once_have_the_limit_together_too(config, tmp_path):
    async with serve_accounts(tmp_path, replace(config, max_tenant_file_bytes=100)) as served:
        headers = {"authorization": f"Bearer {served.keys['acme']}"}
        form = {"files": {"file": b"x" * 150}, "data": {"purpose": "batch"}}
        answers = await asyncio.gather(
            *(served.served.http.post("/v1/files", headers=headers, **form) for _ in range(8))
        )
        assert sorted(answer.status_code for answer in answers)[1:] == [409] * 7
        assert len(list((served.accounts.config.data_dir / "files").iterdir())) == 1


async def test_a_file_whose_name_the_database_does_not_take_leaves_nothing(served, clients):
    part = b'--x\r\nContent-Disposition: form-data; name="'
    content = part + b'purpose"\r\n\r\nbatch\r\n' + part + b'file"; filename="a\0b"\r\n\r\nlines\r\n--x--\r\n'
    headers = {"authorization": f"Bearer {served.keys['acme']}", "content-type": "multipart/form-data; boundary=x"}
    response = await served.served.http.post("/v1/files", headers=headers, content=content)
    assert response.status_code in (200, 400), response.text
    on_disk = list((served.accounts.config.data_dir / "files").iterdir())
    assert [path.name for path in on_disk] == [file.id async for file in clients["acme"].files.list()]


async def test_a_full_disk_leaves_nothing_of_a_file(served, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pomona.server.files.os.replace", fail)
    form = {"files": {"file": b"x"}, "data": {"purpose": "batch"}}
    headers = {"authorization": f"Bearer {served.keys['acme']}"}
    assert (await served.served.http.post("/v1/files", headers=headers, **form)).status_code == 500
    assert list((served.accounts.config.data_dir / "files").iterdir()) == []
