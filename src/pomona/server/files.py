"""/v1/files: upload, list, show, read and delete a tenant's files, in OpenAI's shapes."""

import os
import shutil
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, MalformedRangeHeader, RangeNotSatisfiable, Response

from pomona.accounts.batches import StoredFile
from pomona.core.errors import AccountNotFoundError, InvalidRequestError
from pomona.server import account_types as wire
from pomona.server.admin import accounts_of, json_answer
from pomona.server.errors import BodyError, BodyTooLargeError, RangeError
from pomona.server.paging import check_names, page_of
from pomona.server.tenant import principal_of

_MAX_FORM_BYTES = 16 * 1024
"""Of everything in the form but the file."""
_MAX_NAME_CHARS = 200


class _Content(FileResponse):
    """A file whose errors are like all others."""

    @classmethod
    def _parse_range_header(cls, http_range: str, file_size: int) -> list[tuple[int, int]]:
        try:
            return super()._parse_range_header(http_range, file_size)
        except MalformedRangeHeader as error:
            raise InvalidRequestError(
                "Range", f"Range is {http_range[:_MAX_NAME_CHARS]!r}: must read like bytes=0-99"
            ) from error
        except RangeNotSatisfiable as error:
            raise RangeError(file_size) from error


def tenant_of(request: Request) -> str:
    """Return the tenant on whose files and batches the request works."""
    principal = principal_of(request)
    assert principal is not None, "every request has a key"
    assert principal.tenant_id is not None, "auth.RULES let in tenants only"
    return principal.tenant_id


async def upload_file(request: Request) -> Response:
    """Take a file for a batch."""
    accounts = accounts_of(request)
    config = accounts.config
    await accounts.database.run(accounts.batches.check_room, tenant_of(request), config.max_tenant_file_bytes)
    upload, purpose = await _read_form(request, config.max_file_bytes)
    try:
        if purpose != "batch":
            raise InvalidRequestError.out_of_range("purpose", purpose[:_MAX_NAME_CHARS], "batch")
        filename = Path(upload.filename or "upload.jsonl").name[:_MAX_NAME_CHARS]
        tenant_id = tenant_of(request)

        def store() -> StoredFile:
            file_id = accounts.batches.new_file_id()
            path = accounts.batches.path_of(file_id)
            _copy(upload, path)
            try:
                # Others may have come while this one was read.
                return accounts.batches.add_file(file_id, tenant_id, filename, "batch", config.max_tenant_file_bytes)
            except BaseException:  # also what the database does not take as a name
                path.unlink()
                raise

        return json_answer(_card(await accounts.database.run_long(store)))
    finally:
        await upload.close()


async def list_files(request: Request) -> Response:
    """List the tenant's files, the newest first, or with ``order=asc`` the oldest."""
    accounts = accounts_of(request)
    after, limit = page_of(request, default=1000, most=10_000, others=("purpose", "order"))
    purpose, order = request.query_params.get("purpose"), request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequestError.out_of_range("order", order[:_MAX_NAME_CHARS], "asc or desc")
    found = await accounts.database.run(
        accounts.batches.files, tenant_of(request), purpose, after, limit + 1, is_oldest_first=order == "asc"
    )
    cards = [_card(file) for file in found[:limit]]
    ends = (cards[0].id, cards[-1].id) if cards else (None, None)
    return json_answer(wire.FileList(cards, len(found) > limit, *ends))


async def get_file(request: Request) -> Response:
    """Show a file."""
    return json_answer(_card(await _file(request)))


async def get_content(request: Request) -> Response:
    """Send a file's content."""
    file, accounts = await _file(request), accounts_of(request)
    path = accounts.batches.path_of(file.id)
    try:
        found = await accounts.database.run(path.stat)
    except FileNotFoundError as error:
        raise AccountNotFoundError(f"The content of the file {file.id} is gone.") from error
    headers = {"cache-control": "no-store"}
    return _Content(path, headers=headers, media_type="application/octet-stream", stat_result=found)


async def delete_file(request: Request) -> Response:
    """Remove a file."""
    accounts, file_id = accounts_of(request), request.path_params["file_id"]
    await accounts.database.run(accounts.batches.delete_file, file_id, tenant_of(request))
    return json_answer(wire.FileDeleted(file_id))


async def _file(request: Request) -> StoredFile:
    accounts = accounts_of(request)
    return await accounts.database.run(accounts.batches.file, request.path_params["file_id"], tenant_of(request))


async def _read_form(request: Request, max_file_bytes: int) -> tuple[UploadFile, str]:
    """Read a multipart form; the file goes to a temporary file on the way."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise BodyError("The request body must be multipart/form-data with the fields purpose and file.")
    stream = _bounded(request, max_file_bytes + _MAX_FORM_BYTES)
    parser = MultiPartParser(request.headers, stream, max_files=1, max_fields=8, max_part_size=_MAX_FORM_BYTES)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise BodyError("The request body is not a well-formed multipart form.") from error
    except ClientDisconnect as error:
        raise BodyError("The client went away before its request was complete.") from error
    try:
        check_names(form, ("file", "purpose"))
        upload, purpose = form.get("file"), form.get("purpose")
        if not isinstance(upload, UploadFile):
            raise InvalidRequestError("file", "file is missing")
        if not isinstance(purpose, str):
            raise InvalidRequestError("purpose", "purpose is missing")
    except InvalidRequestError:
        await form.close()
        raise
    return upload, purpose


async def _bounded(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise BodyTooLargeError(f"The file is larger than the limit of {max_bytes - _MAX_FORM_BYTES} bytes.")
        yield chunk


def _copy(upload: UploadFile, path: Path) -> None:
    """Write the content beside its place and move it there, so that it is there whole or not at all."""
    upload.file.seek(0)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with open(descriptor, "wb") as file:
            shutil.copyfileobj(upload.file, file, 2**20)
        os.replace(name, path)
    except BaseException:  # such as a full disk
        os.unlink(name)
        raise


def _card(file: StoredFile) -> wire.FileCard:
    return wire.FileCard(file.id, file.num_bytes, int(file.created_s), file.filename, file.purpose)
