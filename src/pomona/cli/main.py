"""``pomona``: the command line. Commands are thin; what they do lives in the modules they import when run, so that
``pomona --help`` is quick.

Exit codes: 0 done, 1 the thing asked for failed (one line says why and what to do), 2 wrong usage, 130 interrupted, 143
terminated.
"""

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import pomona
from pomona.cli.config import AppConfig, format_config
from pomona.cli.flags import with_settings
from pomona.cli.keys import register as register_keys
from pomona.cli.options import DEFAULT_URL, ApiKey, Url
from pomona.cli.tenants import register as register_tenants
from pomona.core.errors import PomonaError

app = typer.Typer(
    name="pomona",
    help="Serve many LoRA adapters of one base model in one batch, behind the OpenAI API.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
adapters_app = typer.Typer(help="Adapters of a running server, and adapter folders.", no_args_is_help=True)
tenants_app = typer.Typer(help="Tenants of a running server with accounts: limits, usage.", no_args_is_help=True)
keys_app = typer.Typer(help="API keys of a server with accounts.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure.", no_args_is_help=True)
app.add_typer(adapters_app, name="adapters")
app.add_typer(tenants_app, name="tenants")
app.add_typer(keys_app, name="keys")
app.add_typer(bench_app, name="bench")


Spawn = Annotated[bool, typer.Option("--spawn", help="Start a server on the bundled model, and stop it afterwards.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the effective settings as TOML and stop.")]


def serve(config: AppConfig, print_config: PrintConfig = False) -> None:  # noqa: FBT002
    """Serve a base model and its adapters behind the OpenAI API.

    Examples:

        pomona serve                                        # the bundled model with its adapters

        pomona serve ./llama-3.2-1b --adapters-dir ./adapters --port 9000

        pomona serve Qwen/Qwen2.5-0.5B-Instruct --adapter legal=./legal-lora --dtype bfloat16
    """
    if print_config:
        typer.echo(format_config(config), nl=False)
        return
    from pomona.cli.serve import run_server

    run_server(config)


def demo(config: AppConfig) -> None:
    """Serve, ask every adapter and the base the same thing at once, show the answers, keep serving.

    Example:

        pomona demo --port 8080
    """
    from pomona.cli.demo import run_demo

    run_demo(config)


def profile(
    config: AppConfig,
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("profile.json"),
    max_seconds: Annotated[float, typer.Option(help="Stop measuring after this long.")] = 300.0,
    max_points: Annotated[int, typer.Option(help="Stop measuring after so many batches.")] = 300,
) -> None:
    """Measure what a step costs here, by batch and adapters, and write it down for `pomona simulate`.

    Stops when predictions no longer get better. Close other programs first. Steps wait for copies of adapters, as
    simulated ones do; settings of the queue, of fairness and --max-step-s play no part.

    Examples:

        pomona profile --output pippin.json

        pomona profile ./llama-3.2-1b --adapters-dir ./adapters --output llama.json
    """
    from pomona.cli.profile import run_profile_command
    from pomona.profiling.profile import ProfileLimits

    run_profile_command(config, ProfileLimits(max_points, max_seconds), output)


app.command("serve")(with_settings(serve))
app.command("demo")(with_settings(demo))
app.command("profile")(with_settings(profile))


@app.command()
def plan(
    spec: Annotated[
        Path, typer.Argument(help="TOML file: workload, adapters, replica, objectives, what may be chosen.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of text.")] = False,  # noqa: FBT002
) -> None:
    """Find the smallest fleet that meets the objectives for a workload, by simulation, and what binds it.

    Needs no model and no server. Every simulation is a line on stderr; the plan goes to stdout. A spec of `pomona
    simulate` with objectives in [slo] will do; docs/simulator.md shows what a section [plan] may say.

    Examples:

        pomona plan cluster.toml

        pomona plan cluster.toml --json > plan.json
    """
    from pomona.cli.plan import run_plan

    run_plan(spec, as_json=as_json)


@app.command()
def chat(
    message: Annotated[str | None, typer.Argument(help="One message; without it, a conversation.")] = None,
    model: Annotated[str | None, typer.Option(help="Base or adapter name; default: the base.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")] = 0.0,
) -> None:
    """Talk to a running server.

    Examples:

        pomona chat --model reverse banana

        pomona chat --url http://127.0.0.1:9000
    """
    from pomona.cli.chat import run_chat

    run_chat(url, api_key, model, message, max_tokens=max_tokens, temperature=temperature)


@adapters_app.command("list")
def adapters_list(url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Show a server's adapters: state, version, rank, size, requests, hits, loads, evictions, last use, last error.

    Example:

        pomona adapters list --url http://127.0.0.1:8000
    """
    from pomona.cli.adapters import list_adapters

    list_adapters(url, api_key)


@adapters_app.command("add")
def adapters_add(
    name: Annotated[str, typer.Argument(help="Name that clients will use as `model`.")],
    source: Annotated[str, typer.Argument(help="Folder on the server's machine, URL, or hub id.")],
    tenant: Annotated[str | None, typer.Option(help="Whose adapter it will be; for administrators.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Load an adapter into a running server, or replace the one of that name. Returns when it can be used.

    The server takes it from its `--adapters-dir` and from every `--allowed-adapter-root` that it was started with, a
    tenant's from the sub-folder there that bears the tenant's id; from the hub only with `--allow-hub-adapters`.

    Examples:

        pomona serve ./llama-3.2-1b --allowed-adapter-root /srv/adapters

        pomona adapters add legal /srv/adapters/legal-v2
    """
    from pomona.cli.adapters import add_adapter

    add_adapter(url, api_key, name, source, tenant)


@adapters_app.command("remove")
def adapters_remove(
    name: Annotated[str, typer.Argument(help="Adapter to unload.")], url: Url = DEFAULT_URL, api_key: ApiKey = None
) -> None:
    """Unload an adapter: running requests finish, then its memory is freed.

    Example:

        pomona adapters remove legal
    """
    from pomona.cli.adapters import remove_adapter

    remove_adapter(url, api_key, name)


@adapters_app.command("inspect")
def adapters_inspect(
    folder: Annotated[Path, typer.Argument(help="PEFT folder with adapter_config.json.")],
    model: Annotated[
        str | None, typer.Option(help="Base model to check it against; without it only the config is read.")
    ] = None,
) -> None:
    """Say what is in an adapter folder, and whether Pomona can serve it. Needs no server.

    Examples:

        pomona adapters inspect ./my-lora

        pomona adapters inspect ./my-lora --model ./llama-3.2-1b
    """
    from pomona.cli.adapters import inspect_adapter

    inspect_adapter(folder, model)


@bench_app.command("serve")
def bench_serve(
    url: Url = DEFAULT_URL,
    spawn: Spawn = False,  # noqa: FBT002
    api_key: ApiKey = None,
    model: Annotated[str | None, typer.Option(help="Base model; default: the server's.")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="Adapter to use, repeatable; default: all.")] = None,
    popularity: Annotated[
        str, typer.Option(help="base, identical, distinct, uniform, zipf-1.5; several by commas, or all.")
    ] = "all",
    num_requests: Annotated[int, typer.Option(help="Requests per popularity.")] = 64,
    rate: Annotated[float, typer.Option(help="Mean arrivals per second; inf sends all at once.")] = float("inf"),
    arrival_cv: Annotated[float, typer.Option(help="Burstiness of arrivals; 1 is Poisson.")] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(help="Most requests in flight; default: no limit.")] = None,
    prompt_tokens: Annotated[str, typer.Option(help="Prompt length, such as 128 or 64-256.")] = "128",
    output_tokens: Annotated[str, typer.Option(help="Output length, such as 64 or 16-128.")] = "64",
    seed: Annotated[int, typer.Option(help="Same seed, same workload.")] = 0,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="Objective: time to first token.")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(help="Objective: time per output token.")] = None,
    output: Annotated[Path | None, typer.Option(help="Append the JSON lines to this file.")] = None,
) -> None:
    """Offer load to a server: open-loop arrivals, adapters of chosen popularity; print TTFT, ITL and throughput.

    The table goes to stderr, one JSON line per popularity to stdout.

    Examples:

        pomona bench serve --spawn

        pomona bench serve --url http://127.0.0.1:9000 --rate 5 --num-requests 200 --popularity base,zipf-1.5
    """
    from pomona.bench.config import ServeBenchConfig, expand_popularities
    from pomona.cli.bench import options_named, read_lengths, run_bench, spawned_server
    from pomona.metrics.slo import Slo

    with options_named():
        slo = Slo(*(None if ms is None else ms / 1000 for ms in (slo_ttft_ms, slo_tpot_ms)))
        config = ServeBenchConfig(
            base_url=url,
            api_key=api_key,
            model=model,
            adapters=tuple(adapter or ()),
            popularities=expand_popularities(popularity),
            num_requests=num_requests,
            request_rate_per_s=rate,
            arrival_cv=arrival_cv,
            max_concurrency=max_concurrency,
            prompt_lengths=read_lengths("--prompt-tokens", prompt_tokens),
            output_lengths=read_lengths("--output-tokens", output_tokens),
            seed=seed,
            slo=None if slo == Slo() else slo,
            output_file=output,
        )
        with spawned_server([], api_key) if spawn else nullcontext(url) as found_url:
            run_bench(replace(config, base_url=found_url))


@bench_app.command("accuracy")
def bench_accuracy(
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    quantization: Annotated[str, typer.Option(help="none or int8.")] = "none",
    update: Annotated[Path | None, typer.Option(help="Markdown file whose accuracy table to replace.")] = None,
) -> None:
    """Count the exact answers of the bundled adapters on held-out words, and of the base without them.

    Examples:

        pomona bench accuracy

        pomona bench accuracy --update README.md
    """
    from pomona.cli.accuracy import run_accuracy

    run_accuracy(dtype, quantization, update)


@bench_app.command("ceilings")
def bench_ceilings(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    num_threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
    runs: Annotated[int, typer.Option(help="Runs of each test; their median counts.")] = 5,
    seconds: Annotated[float, typer.Option(help="Length of a run.")] = 0.3,
    small: Annotated[bool, typer.Option("--small", help="Tiny sizes, to see that it works.")] = False,  # noqa: FBT002
    output: Annotated[Path | None, typer.Option(help="Append the JSON line to this file.")] = None,
) -> None:
    """Measure what this machine can do at most: dense products, reading memory; on a GPU also copies and launches.

    The table goes to stderr, one JSON line to stdout. Close other programs first.

    Example:

        pomona bench ceilings --output ceilings.jsonl
    """
    from pomona.cli.ceilings import CeilingsConfig, run_ceilings

    config = CeilingsConfig(device=device, num_threads=num_threads, num_runs=runs, run_s=seconds, is_small=small)
    run_ceilings(config, output)


register_tenants(tenants_app)
register_keys(keys_app)


@app.command()
def simulate(
    spec: Annotated[Path, typer.Argument(help="TOML file that describes replicas, workload, router and objectives.")],
    as_json: Annotated[bool, typer.Option("--json", help="Results as one JSON object to stdout.")] = False,  # noqa: FBT002
    html: Annotated[Path | None, typer.Option(help="Write one page with charts.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a trace of a window for ui.perfetto.dev.")] = None,
    trace_window: Annotated[str, typer.Option(help="That window, seconds: START-END.")] = "0-10",
) -> None:
    """Simulate a cluster in virtual time: the same scheduler, adapters and router, with costs measured or computed.

    The table goes to stderr. docs/simulator.md shows a spec; docs/reference/simulation.md has every key.

    Examples:

        pomona simulate cluster.toml --html cluster.html

        pomona simulate cluster.toml --json > results.json

        pomona simulate cluster.toml --trace trace.json --trace-window 60-70
    """
    from pomona.cli.simulate import SimulateOutputs, read_window, run_simulate

    start_s, end_s = read_window(trace_window)
    run_simulate(spec, SimulateOutputs(as_json, html, trace, start_s, end_s))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(pomona.__version__)


def main() -> None:
    """Run the command line; errors that a person can mend are one line, not a traceback."""
    try:
        app()
    except PomonaError as error:
        Console(stderr=True, highlight=False, emoji=False).print(
            f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True
        )
        sys.exit(1)
