"""``pomona adapters``: a server's adapters, and what is in an adapter folder."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.table import Table

from pomona.adapters.digest import adapter_digest
from pomona.adapters.peft_config import parse_config
from pomona.adapters.sources import read_files
from pomona.cli.api import Api
from pomona.cli.options import plain_console, print_table
from pomona.core.adapter import AdapterFiles, AdapterSpec

_COLUMNS = (
    "name", "state", "version", "rank", "MiB", "requests", "hits", "loads", "load s", "evicted", "last use", "why",
)  # fmt: skip


def list_adapters(url: str, api_key: str | None) -> None:
    """Print a table of a server's adapters."""
    table = Table(*_COLUMNS, box=None, header_style="bold")
    for adapter in _all_adapters(Api(url, api_key)):
        num_bytes = adapter["num_host_bytes"]
        table.add_row(
            adapter["name"] + (" (pinned)" if adapter["pinned"] else ""),
            adapter["state"],
            str(adapter["version"]),
            _text(adapter["lora_rank"]),
            "" if num_bytes is None else f"{num_bytes / 2**20:.2f}",
            str(adapter["num_requests"]) + (f" ({adapter['num_waiting']} wait)" if adapter["num_waiting"] else ""),
            str(adapter["num_hits"]),
            str(adapter["num_loads"]),
            f"{adapter['fetch_s'] + adapter['stage_s']:.3f}" if adapter["num_loads"] else "",
            str(adapter["num_evictions"]),
            "" if adapter["last_used"] is None else time.strftime("%d %b %H:%M", time.localtime(adapter["last_used"])),
            _text(adapter["error"]),
        )
    print_table(table, if_empty="No adapters are loaded. Add one: pomona adapters add NAME FOLDER")


def _all_adapters(api: Api) -> Iterator[dict[str, Any]]:
    """Cards of all adapters, page by page."""
    page = api.call("GET", "/v1/adapters")
    yield from page["data"]
    while page["has_more"]:
        page = api.call("GET", f"/v1/adapters?after={quote(page['data'][-1]['name'], safe='')}")
        yield from page["data"]


def _text(value: object) -> str:
    return "" if value is None else str(value)


def add_adapter(url: str, api_key: str | None, name: str, source: str, tenant: str | None = None) -> None:
    """Load or replace an adapter, a tenant's if one is given, and say what was loaded."""
    is_local = Path(source).expanduser().exists()
    source = str(Path(source).expanduser().resolve()) if is_local else source
    body = {"name": name, "source": source} | ({} if tenant is None else {"tenant": tenant})
    adapter = Api(url, api_key).call("POST", "/v1/adapters", body)
    plain_console().print(
        f"{adapter['name']}: {adapter['state']}, rank {adapter['lora_rank']}, id {adapter['id'][:12]}"
    )


def remove_adapter(url: str, api_key: str | None, name: str) -> None:
    """Unload an adapter."""
    Api(url, api_key).call("DELETE", f"/v1/adapters/{quote(name)}")
    plain_console().print(f"{name}: unloaded")


def inspect_adapter(folder: Path, model: str | None) -> None:
    """Print what an adapter folder holds; with a model, convert it as the server would.

    Raises:
        AdapterError: it cannot be served; says why.
    """
    files = read_files(str(folder))
    spec = parse_config(files.config_bytes)
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    for name, value in _facts(files, spec).items():
        table.add_row(name, value)
    if model is not None:
        for name, value in _checked_facts(folder, model).items():
            table.add_row(name, value)
    print_table(table)


def _facts(files: AdapterFiles, spec: AdapterSpec) -> dict[str, str]:
    facts = {
        "digest": adapter_digest(files),
        "rank, alpha": f"{spec.lora_rank}, {spec.lora_alpha:g}",
        "targets": _shown(spec.target_modules),
        "base model": spec.base_model_name or "(not named)",
        "weights": f"{len(files.weights_bytes) / 2**20:.2f} MiB, {files.weights_format}",
    }
    optional = {
        "excluded": _shown(spec.exclude_modules),
        "rsLoRA": "yes" if spec.use_rslora else "",
        "DoRA": "yes" if spec.use_dora else "",
        "rank pattern": ", ".join(f"{key}: {value}" for key, value in spec.rank_pattern),
        "alpha pattern": ", ".join(f"{key}: {value:g}" for key, value in spec.alpha_pattern),
        "bias": "" if spec.bias == "none" else spec.bias,
        "saved modules": ", ".join(spec.modules_to_save),
    }
    return facts | {name: value for name, value in optional.items() if value}


def _shown(names: tuple[str, ...] | str | None) -> str:
    return names if isinstance(names, str) else ", ".join(names or ())


def _checked_facts(folder: Path, model: str) -> dict[str, str]:
    """Convert the adapter for a base model, as the server would."""
    from pomona.cli.hub import checkpoint_dir
    from pomona.runner.config import RunnerConfig
    from pomona.runner.loading import load_adapter_host

    info = load_adapter_host(RunnerConfig(model_path=str(checkpoint_dir(model)), device="cpu")).stage(str(folder))
    return {
        "fits": model,
        "adapts": ", ".join(info.modules),
        "features": ", ".join(info.features) or "(none)",
        "in memory": f"{info.num_host_bytes / 2**20:.2f} MiB, {info.num_pages} pages",
    }
