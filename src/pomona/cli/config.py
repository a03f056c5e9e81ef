"""AppConfig: every setting of ``pomona serve``, in one place; flags, file and docs are derived from its fields.

Precedence: flags, then POMONA_* environment variables, then the TOML file of ``--config``, then the defaults. Settings
are read from the environment here only; commands that talk to a server have options that may come from it, too.
Components never see this object: ``cli.build`` hands each its own part.

A setting that is a list takes one value for a list of one; in the environment it is one value, or a JSON list.
"""

import json
import os
import tomllib
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, ByteSize, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from pomona.core.errors import ConfigError
from pomona.core.machine import MAX_THREADS
from pomona.sched.adapter_arrivals import AdapterLoading

BUNDLED_MODEL = "pippin"
"""Name of the base model that ships in the package; its adapters come with it unless others are named."""

_ENV_PREFIX = "POMONA_"
_BENCH_PREFIX = "POMONA_BENCH_"
"""Variables of the scripts in benchmarks/, which are no settings of a server."""


def _listed(value: object) -> object:
    """One value stands for a list of one. Text may also be a JSON list; empty text is no value, as in environments."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError('must be one value, or a JSON list such as ["a", "b"]') from error
    if isinstance(value, str | int):
        return () if value == "" else (value,)
    return value


# NoDecode: the text of an environment variable comes here as it is.
Texts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed)]
Counts = Annotated[tuple[int, ...], NoDecode, BeforeValidator(_listed)]


class AppConfig(BaseSettings):
    """Settings of one server."""

    model_config = SettingsConfigDict(env_prefix=_ENV_PREFIX, extra="forbid", frozen=True)

    model: str = Field(BUNDLED_MODEL, description="Base model: a folder, a Hugging Face hub id, or 'pippin' (bundled).")
    served_model_name: str | None = Field(
        None, description="Name of the base model in the API; default: last part of MODEL."
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_key: SecretStr | None = Field(
        None, description="Bearer token that every route but /health and /ready asks for (better set by env)."
    )

    accounts: bool = Field(
        default=False, description="Tenants with API keys, limits and a ledger of usage; see `pomona keys admin`."
    )
    data_dir: str = Field("pomona-data", description="Folder of the accounts' database and journal.")
    database_url: SecretStr | None = Field(
        None, description="postgresql://... of the accounts (better set by env); default: SQLite in the data dir."
    )
    when_database_is_down: Literal["answer", "refuse"] = Field(
        "answer", description="Without the accounts database: answer known keys and journal their usage, or refuse."
    )

    adapter: Texts = Field((), description="NAME=PATH_OR_HUB_ID of an adapter to load at start; repeatable.")
    adapters_dir: Texts = Field(
        (),
        description="Folder or URL whose sub-folders are adapters under their own names; a URL may have an index.json "
        "instead; each is brought in when a request names it; repeatable.",
    )
    allowed_adapter_root: Texts = Field(
        (),
        description="Folder or URL from which the API may load adapters, besides the adapters dirs; repeatable.",
    )
    host_adapter_bytes: ByteSize | None = Field(
        None, description="Host memory for adapters, such as 8GiB; default: a quarter of the machine's or container's."
    )
    adapter_cache_dir: str | None = Field(
        None, description="Folder that keeps adapters fetched from URLs (s3://...), over restarts; URLs need it."
    )
    adapter_cache_bytes: ByteSize = Field(ByteSize(32 * 2**30), description="Disk space for it.")
    adapter_load_wait_s: float = Field(
        30.0, gt=0, description="A request waits this long for its adapter to be brought in; then 503 with Retry-After."
    )
    allow_hub_adapters: bool = Field(default=False, description="Let the API load adapters from the Hugging Face hub.")

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Weights and activations.")
    quantization: Literal["none", "int8"] = Field(
        "none", description="Store the base's matrices as int8: half the memory of bfloat16. Adapters keep the dtype."
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    max_model_len: int | None = Field(
        None, ge=1, description="Longest prompt + output, in tokens; default: the model's."
    )
    max_num_seqs: int = Field(256, ge=1, description="Most requests running at once.")
    max_num_batched_tokens: int = Field(2048, ge=1, description="Token budget of one step.")
    max_waiting: int = Field(1024, ge=1, description="Most requests waiting; more are answered with 429.")
    block_size: int = Field(16, ge=1, description="Token positions per KV block.")
    kv_cache_bytes: ByteSize | None = Field(
        None,
        description="Memory of the KV cache's own, such as 2GiB; default: what ADAPTER_BYTES leaves of the memory for "
        "both, at most MAX_NUM_SEQS full contexts.",
    )
    adapter_bytes: ByteSize | None = Field(
        None,
        description="Device memory that adapters may take, and KV while they do not; default: a fifth, at most 8GiB, "
        "of the memory for both: half of the free host memory, or on a GPU what is left of GPU_MEMORY_FRACTION.",
    )
    gpu_memory_fraction: float = Field(0.9, gt=0, le=1, description="Share of GPU memory to use.")
    num_threads: int | None = Field(
        None,
        ge=1,
        le=MAX_THREADS,
        description="CPU threads of the model step; default: all cores, or a container's share of them.",
    )
    overlap_steps: bool | None = Field(
        None, description="Prepare the next step while one runs. Default: on CUDA; a CPU has no time to hide."
    )
    decode_graphs: bool | None = Field(
        None, description="Replay decode steps from captured graphs. Default: on CUDA; on a CPU it only tests them."
    )
    graph_batch_sizes: Counts = Field(
        (), description="Rows of a captured step, ascending; repeatable. Default: a choice up to MAX_NUM_SEQS."
    )
    graph_max_lora_rank: int = Field(64, ge=1, description="Steps with an adapter of larger rank are not replayed.")
    prefix_cache: bool = Field(default=True, description="Reuse KV blocks of equal prompt beginnings.")
    adapter_loading: AdapterLoading = Field(
        "assist",
        description="How an adapter comes to the device: on_demand (the step waits for the copy), join (the request "
        "waits, the steps do not) or assist (its prompt is computed from the host copy meanwhile).",
    )
    adapter_link_bytes_per_s: float | None = Field(
        None, gt=0, description="Copy adapters no faster, to rehearse a slow link; default: as fast as it goes."
    )
    adapter_wait_limit_s: float = Field(
        2.0, gt=0, description="After this long, a request waiting for adapter memory is the next to get some."
    )

    fairness: Literal["fcfs", "rpm", "lcf", "vtc", "wvtc", "drr"] = Field(
        "wvtc",
        description="Whose request is next: first come first served, that with a limit per tenant and minute, least "
        "service first, virtual token counter, the same with weights, deficit round robin.",
    )
    fairness_requests_per_minute: int = Field(60, ge=1, description="With rpm: requests of one tenant per minute.")
    fairness_prediction: Literal["none", "mean", "max_tokens"] = Field(
        "none", description="Output charged in advance: none, the mean of the tenant's last five, or max_tokens."
    )
    fairness_max_lead: float | None = Field(
        None, gt=0, description="Service a tenant may be ahead of one that waits; default: what the KV cache holds."
    )
    fairness_seats: bool = Field(
        default=True, description="A waiting tenant with nothing running may take the place of others' latest requests."
    )
    input_token_price: float = Field(1.0, ge=0, description="Service charged per prompt token computed.")
    cached_token_price: float = Field(0.0, ge=0, description="The same per prompt token found in the prefix cache.")
    output_token_price: float = Field(2.0, ge=0, description="The same per output token.")
    page_load_price: float = Field(0.0, ge=0, description="The same per adapter page copied to the device.")
    page_second_price: float = Field(0.0, ge=0, description="The same per adapter page and second in use there.")
    max_step_s: float | None = Field(
        None, gt=0, description="Keep steps to this many seconds, for the sake of who comes next; default: no limit."
    )
    target: Texts = Field(
        (),
        description="TENANT=TTFT_S,TPOT_S: requests that would miss the first are refused, steps keep to the second; "
        "* stands for all tenants; repeatable.",
    )
    priority_tenant: Texts = Field(
        (), description="With accounts: who may ask for service_tier priority; * for all; repeatable."
    )

    max_body_bytes: ByteSize = Field(ByteSize(4 * 2**20), description="Largest request body.")
    step_timeout_s: float = Field(300.0, gt=0, description="A step longer than this counts as a hung engine.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe log to print.")

    @field_validator("api_key")
    @classmethod
    def _check_key(cls, key: SecretStr | None) -> SecretStr | None:
        """Refuse a key that no client could send: an empty one would be none, and the server open to everybody."""
        text = "key" if key is None else key.get_secret_value()
        if not text or not text.isascii() or not text.isprintable() or text != text.strip():
            raise ValueError("must be printable ASCII without a space at either end; leave it out for none")
        return key

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, environment, file; no dotenv, no secrets folder."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, _config_file.get())


# pydantic-settings asks the class, not the call, for its sources; this hands the call's file to the class.
_config_file: ContextVar[Path | None] = ContextVar("config_file", default=None)


def load_config(flags: dict[str, Any], config_file: Path | None = None) -> AppConfig:
    """Merge flags, environment and file.

    Args:
        flags: only those that were given.
        config_file: TOML file with AppConfig's field names as keys.

    Raises:
        ConfigError: names the setting, the value and where it came from.
    """
    if config_file is not None and not config_file.is_file():
        raise ConfigError(f"--config {config_file}: no such file")
    unknown = [
        key
        for key in os.environ
        if key.startswith(_ENV_PREFIX)
        and not key.startswith(_BENCH_PREFIX)
        and key.removeprefix(_ENV_PREFIX).lower() not in AppConfig.model_fields
    ]
    if unknown:
        raise ConfigError(f"environment variable {unknown[0]} is not a setting; see `pomona serve --help`")
    token = _config_file.set(config_file)
    try:
        return AppConfig(**flags)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        is_secret = (
            SecretStr in get_args(AppConfig.model_fields[name].annotation) if name in AppConfig.model_fields else False
        )
        shown = "" if is_secret else f" (got {first['input']!r})"
        where = _origin(str(first["loc"][0]), flags, config_file)
        if first["type"] == "extra_forbidden":  # its value is not shown: it may be a misspelt secret's
            raise ConfigError(f"{name}{where} is not a setting; see `pomona serve --help`") from error
        what = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{name}{where}: {what}{shown}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {config_file}: {error}") from error
    finally:
        _config_file.reset(token)


def _origin(field: str, flags: dict[str, Any], config_file: Path | None) -> str:
    """Where a setting came from, if not from the caller's own flags."""
    if field in flags:
        return ""
    variable = f"{_ENV_PREFIX}{field.upper()}"
    if any(key.upper() == variable for key in os.environ):
        return f" (environment variable {variable})"
    return f" (--config {config_file})"


def format_config(config: AppConfig) -> str:
    """The effective settings as TOML that ``--config`` accepts; secrets are never shown."""
    lines = []
    for name, field in AppConfig.model_fields.items():
        value = getattr(config, name)
        lines.append(f"# {field.description}")
        if value is None:
            lines.append(f"# {name} =")
        elif isinstance(value, SecretStr):
            lines.append(f'# {name} = "(set, not shown)"')
        else:
            lines.append(f"{name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    """A value as TOML: JSON's spelling, but for infinity, and for characters that JSON writes as two halves."""
    return str(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
