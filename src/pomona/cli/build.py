"""Where concrete classes meet: settings in, a running engine out. Used by the command line, ``LLM`` and tests."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pomona.adapters.layout import CONFIG_FILE
from pomona.adapters.remote import is_url
from pomona.adapters.sources import AdapterSources
from pomona.cli.config import BUNDLED_MODEL, AppConfig
from pomona.cli.hub import bundled_dir, checkpoint_dir
from pomona.core.engine_info import EngineInfo
from pomona.core.errors import AdapterError, ConfigError, InvalidRequestError
from pomona.core.interfaces import Executor, LaunchingExecutor
from pomona.driver.loop import EngineParts
from pomona.engine.engine import Engine
from pomona.runner.config import RunnerConfig
from pomona.sched.config import SchedulerConfig
from pomona.sched.fairness import FairnessConfig, ServicePrices

_LOGGER = logging.getLogger(__name__)


def _as_it_is(executor: Executor) -> Executor:
    return executor


@dataclass(frozen=True, slots=True)
class BuildEngine:
    """Builds the engine, in whichever process it is called. Picklable."""

    config: AppConfig
    model_path: str
    wrap: Callable[[Executor], Executor] = _as_it_is
    """Puts something between scheduler and runner, to watch."""

    def __call__(self, report_progress: Callable[[str], None] = lambda text: None) -> EngineParts:
        """Load the model and put a scheduler in front of it.

        Raises:
            PomonaError: a checkpoint or setting is wrong.
        """
        # The server's process builds no engine: without PyTorch it starts seconds earlier, and is smaller.
        from pomona.runner.loading import load_runner

        config = self.config
        loaded = load_runner(runner_config(config, self.model_path), report_progress)
        limits = SchedulerConfig(
            num_kv_blocks=loaded.capacity.num_kv_blocks,
            num_adapter_pages=loaded.capacity.num_adapter_pages,
            blocks_per_page=loaded.capacity.blocks_per_page,
            max_model_len=loaded.max_model_len,
            vocab_size=loaded.spec.vocab_size,
            block_size=config.block_size,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            max_waiting=config.max_waiting,
            enable_prefix_cache=config.prefix_cache,
            adapter_loading=config.adapter_loading,
            adapter_wait_limit_s=config.adapter_wait_limit_s,
            fairness=fairness_config(config),
            max_step_s=config.max_step_s,
        )
        info = EngineInfo(
            max_model_len=loaded.max_model_len,
            vocab_size=loaded.spec.vocab_size,
            block_size=config.block_size,
            num_kv_blocks=loaded.capacity.num_kv_blocks,
            num_adapter_pages=loaded.capacity.num_adapter_pages,
            dtype=str(loaded.dtype).removeprefix("torch."),
            quantization=config.quantization,
            eos_token_ids=loaded.spec.eos_token_ids,
            device=loaded.device_name,
        )
        executor = self.wrap(loaded.runner)
        overlap_steps = loaded.device.type == "cuda" if config.overlap_steps is None else config.overlap_steps
        engine = Engine(
            limits,
            executor,
            # Whoever watches steps sees them one at a time.
            overlap_steps=overlap_steps and isinstance(executor, LaunchingExecutor),
        )
        return EngineParts(engine=engine, adapter_host=loaded.adapters, info=info)


def fairness_config(config: AppConfig) -> FairnessConfig:
    """The scheduler's part of the settings that is about tenants."""
    return FairnessConfig(
        policy=config.fairness,
        prices=ServicePrices(
            per_input_token=config.input_token_price,
            per_cached_token=config.cached_token_price,
            per_output_token=config.output_token_price,
            per_page_loaded=config.page_load_price,
            per_page_second=config.page_second_price,
        ),
        prediction=config.fairness_prediction,
        requests_per_minute=config.fairness_requests_per_minute,
        max_lead=config.fairness_max_lead,
        has_seats=config.fairness_seats,
    )


def engine_builder(config: AppConfig) -> BuildEngine:
    """Find the checkpoint (downloading it if need be) and return what builds an engine of it.

    Raises:
        CheckpointError: there is no such model.
    """
    return BuildEngine(config, str(checkpoint_dir(config.model)))


def runner_config(config: AppConfig, model_path: str) -> RunnerConfig:
    """The runner's part of the settings."""
    return RunnerConfig(
        model_path=model_path,
        dtype=config.dtype,
        quantization=config.quantization,
        device=config.device,
        block_size=config.block_size,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        kv_cache_bytes=config.kv_cache_bytes,
        adapter_bytes=config.adapter_bytes,
        adapter_link_bytes_per_s=config.adapter_link_bytes_per_s,
        gpu_memory_fraction=config.gpu_memory_fraction,
        num_threads=config.num_threads,
        decode_graphs=config.decode_graphs,
        graph_batch_sizes=config.graph_batch_sizes,
        graph_max_lora_rank=config.graph_max_lora_rank,
    )


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """An adapter to load at start."""

    name: str
    source: str
    is_required: bool
    """True if asked for by name: the server does not start without it. Folders found in a directory may be broken."""


def named_adapters(config: AppConfig) -> list[AdapterSource]:
    """Adapters that the settings name one by one, in their order.

    Raises:
        ConfigError: malformed NAME=SOURCE, or the same name twice.
    """
    found: dict[str, AdapterSource] = {}
    for item in config.adapter:
        name, separator, source = item.partition("=")
        if not separator or not name or not source:
            raise ConfigError(f"adapter {item!r}: must be NAME=PATH_OR_HUB_ID")
        if name in found:
            raise ConfigError(f"adapter {name!r} is given twice: {found[name].source} and {source}")
        found[name] = AdapterSource(name, os.path.expanduser(source), is_required=True)
    return list(found.values())


def sources_of_operator(source: str) -> AdapterSources:
    """What ``source`` may be if whoever runs this process names it: a folder anywhere, or a hub id."""
    return AdapterSources((str(Path(source).resolve().parent),), allow_hub=True)


def load_all(config: AppConfig, load: Callable[[str, str], object]) -> None:
    """Load every adapter of the settings. One that was only found in an adapters dir may be broken: then it is left
    out, with a warning.

    Args:
        config: settings.
        load: called with a name and a local folder.

    Raises:
        ConfigError: as ``startup_adapters``, or an adapter that was named cannot be used; names it.
    """
    for adapter in startup_adapters(config):
        try:
            load(adapter.name, sources_of_operator(adapter.source).resolve(adapter.source))
        except (AdapterError, InvalidRequestError) as error:
            if adapter.is_required:
                raise ConfigError(f"adapter {adapter.name!r} from {adapter.source!r}: {error}") from error
            _LOGGER.warning("Adapter %r from %r is left out: %s", adapter.name, adapter.source, error)


def startup_adapters(config: AppConfig) -> list[AdapterSource]:
    """Every adapter of the settings, for who loads all at once: those named, then those found in adapters dirs.

    Raises:
        ConfigError: malformed NAME=SOURCE, the same name twice, a URL, or a directory that does not exist.
    """
    found = {adapter.name: adapter for adapter in named_adapters(config)}
    for directory in adapters_dirs(config):
        path = Path(directory).expanduser()
        if is_url(directory) or not path.is_dir():
            raise ConfigError(f"adapters_dir {directory!r}: no such folder")
        for folder in sorted(path.iterdir()):
            if not (folder / CONFIG_FILE).is_file():
                continue
            if folder.name in found:
                raise ConfigError(f"adapter {folder.name!r} is given twice: {found[folder.name].source} and {folder}")
            found[folder.name] = AdapterSource(folder.name, str(folder), is_required=False)
    return list(found.values())


def adapters_dirs(config: AppConfig) -> list[str]:
    """The adapters dirs of the settings; for the bundled model without any, the bundled adapters."""
    if config.model == BUNDLED_MODEL and not config.adapter and not config.adapters_dir:
        return [str(bundled_dir() / "adapters")]
    return list(config.adapters_dir)
