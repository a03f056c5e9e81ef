"""Routes that only a server with accounts has."""

from typing import Any

from fastapi import FastAPI

from pomona.server import account_types as wire
from pomona.server import admin, batches, files, openapi, usage


def add_to(app: FastAPI) -> None:
    """Add them. Who may use which is in ``auth.RULES``."""
    _add_tenants(app)
    _add_keys(app)
    _add_limits(app)
    _add_usage(app)
    _add_batches(app)


def _add_tenants(app: FastAPI) -> None:
    path, tenant_id = "/v1/admin/tenants", openapi.path_parameter("tenant_id", "The tenant's id.")
    app.post(
        path,
        tags=["accounts"],
        openapi_extra=openapi.request_body(wire.TenantCreateRequest, {"id": "acme"}),
        responses=openapi.answers(wire.TenantCard, 400, 403, 409, 413, 503),
    )(admin.create_tenant)
    app.get(path, tags=["accounts"], responses=openapi.answers(wire.TenantList, 403, 503))(admin.list_tenants)
    app.get(
        path + "/{tenant_id}",
        tags=["accounts"],
        openapi_extra=tenant_id,
        responses=openapi.answers(wire.TenantCard, 403, 404, 503),
    )(admin.get_tenant)
    app.patch(
        path + "/{tenant_id}",
        tags=["accounts"],
        openapi_extra={**tenant_id, **openapi.request_body(wire.TenantUpdateRequest, {"weight": 2.0})},
        responses=openapi.answers(wire.TenantCard, 400, 403, 404, 413, 503),
    )(admin.update_tenant)


def _add_keys(app: FastAPI) -> None:
    path, key_id = "/v1/admin/keys", openapi.path_parameter("key_id", "The key's id or visible prefix.")
    app.post(
        path,
        tags=["accounts"],
        openapi_extra=openapi.request_body(wire.KeyCreateRequest, {"tenant": "acme", "name": "website"}),
        responses=openapi.answers(wire.KeyCard, 400, 403, 404, 413, 503),
    )(admin.create_key)
    app.get(
        path,
        tags=["accounts"],
        openapi_extra=openapi.query_parameters({"tenant": "Only this tenant's keys."}),
        responses=openapi.answers(wire.KeyList, 400, 403, 503),
    )(admin.list_keys)
    app.post(
        path + "/{key_id}/rotate",
        tags=["accounts"],
        openapi_extra={**key_id, **openapi.request_body(wire.KeyRotateRequest, {"overlap_s": 3600.0})},
        responses=openapi.answers(wire.KeyCard, 400, 403, 404, 413, 503),
    )(admin.rotate_key)
    app.delete(
        path + "/{key_id}",
        tags=["accounts"],
        openapi_extra=key_id,
        responses=openapi.answers(wire.KeyCard, 403, 404, 503),
    )(admin.revoke_key)


def _add_limits(app: FastAPI) -> None:
    path = "/v1/admin/limits/{scope}/{scope_id:path}"
    parameters: dict[str, Any] = {
        "parameters": [
            *openapi.path_parameter("scope", "tenant, key or adapter.")["parameters"],
            *openapi.path_parameter("scope_id", "Id of the tenant or key; qualified name of the adapter.")[
                "parameters"
            ],
        ]
    }
    app.get(
        path,
        tags=["accounts"],
        openapi_extra=parameters,
        responses=openapi.answers(wire.LimitsCard, 400, 403, 404, 503),
    )(admin.get_limits)
    app.put(
        path,
        tags=["accounts"],
        openapi_extra={**parameters, **openapi.request_body(wire.LimitsRequest, {"requests_per_minute": 600})},
        responses=openapi.answers(wire.LimitsCard, 400, 403, 404, 413, 503),
    )(admin.set_limits)


def _add_usage(app: FastAPI) -> None:
    example = {"adapter": "acme/legal", "input_per_million": 0.5, "output_per_million": 1.5}
    app.get("/v1/admin/prices", tags=["accounts"], responses=openapi.answers(wire.PriceList, 403, 503))(
        admin.list_prices
    )
    app.put(
        "/v1/admin/prices",
        tags=["accounts"],
        openapi_extra=openapi.request_body(wire.PriceRequest, example),
        responses=openapi.answers(wire.PriceCard, 400, 403, 413, 503),
    )(admin.set_price)
    app.put(
        "/v1/shares",
        tags=["adapters"],
        openapi_extra=openapi.request_body(wire.ShareRequest, {"name": "legal", "tenants": ["bolt"]}),
        responses=openapi.answers(wire.ShareCard, 400, 403, 404, 413, 503),
    )(admin.share_adapter)
    parameters = {
        "tenant": "Only this tenant's rows (for administrators).",
        "key": "Only this key's rows.",
        "adapter": "Only rows of this adapter (qualified name).",
        "start": "Ended then or later: Unix time or date, UTC unless it says otherwise.",
        "end": "Ended before: the same.",
        "group_by": "Of sums: columns by commas: tenant, key, adapter, adapter_version, outcome, day, month.",
        "format": "json (sums), csv or parquet (rows).",
    }
    responses = openapi.answers(wire.UsageReport, 400, 403, 503)
    responses[200]["content"]["text/csv"] = {"schema": {"type": "string"}}
    responses[200]["content"]["application/vnd.apache.parquet"] = {"schema": {"type": "string", "format": "binary"}}
    app.get("/v1/usage", tags=["accounts"], openapi_extra=openapi.query_parameters(parameters), responses=responses)(
        usage.get_usage
    )


def _add_batches(app: FastAPI) -> None:
    file_id = openapi.path_parameter("file_id", "The file's id.")
    paging = {"after": "Id of the last one already seen.", "limit": "Most of them in the answer."}
    order = "desc, the newest first (the default), or asc."
    properties = {"purpose": {"type": "string", "enum": ["batch"]}, "file": {"type": "string", "format": "binary"}}
    form = {"schema": {"type": "object", "required": ["purpose", "file"], "properties": properties}}
    app.post(
        "/v1/files",
        tags=["batch"],
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": form}}},
        responses=openapi.answers(wire.FileCard, 400, 403, 409, 413, 503),
    )(files.upload_file)
    app.get(
        "/v1/files",
        tags=["batch"],
        openapi_extra=openapi.query_parameters({"purpose": "Only files of this purpose.", "order": order, **paging}),
        responses=openapi.answers(wire.FileList, 400, 403, 404, 503),
    )(files.list_files)
    found = openapi.answers(wire.FileCard, 403, 404, 503)
    app.get("/v1/files/{file_id}", tags=["batch"], openapi_extra=file_id, responses=found)(files.get_file)
    app.delete(
        "/v1/files/{file_id}",
        tags=["batch"],
        openapi_extra=file_id,
        responses=openapi.answers(wire.FileDeleted, 403, 404, 409, 503),
    )(files.delete_file)
    content = openapi.answers(wire.FileCard, 400, 403, 404, 416, 503)
    content[200] = {"description": "The content.", "content": {"application/octet-stream": {}}}
    app.get("/v1/files/{file_id}/content", tags=["batch"], openapi_extra=file_id, responses=content)(files.get_content)
    example = {"input_file_id": "file-...", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    app.post(
        "/v1/batches",
        tags=["batch"],
        openapi_extra=openapi.request_body(wire.BatchCreateRequest, example),
        responses=openapi.answers(wire.BatchCard, 400, 403, 404, 409, 413, 503),
    )(batches.create_batch)
    app.get(
        "/v1/batches",
        tags=["batch"],
        openapi_extra=openapi.query_parameters(paging),
        responses=openapi.answers(wire.BatchList, 400, 403, 404, 503),
    )(batches.list_batches)
    batch_id = openapi.path_parameter("batch_id", "The batch's id.")
    card = openapi.answers(wire.BatchCard, 403, 404, 503)
    app.get("/v1/batches/{batch_id}", tags=["batch"], openapi_extra=batch_id, responses=card)(batches.get_batch)
    app.post("/v1/batches/{batch_id}/cancel", tags=["batch"], openapi_extra=batch_id, responses=card)(
        batches.cancel_batch
    )
