"""``pomona plan`` on the Azure conversation trace of 2023 with 1,000 adapters of mixed ranks, its answer kept as a row.

python -m benchmarks.papers.plan --trace AzureLLMInferenceTrace_conv.csv     # the whole hour
python -m benchmarks.papers.plan                                             # the ten minutes of the package
"""

import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks.papers.published import Report, arguments
from pomona.cli.plan import load_plan_spec, search
from pomona.cli.simulate import read_lines
from pomona.sim.plan_report import plan_fields, plan_text
from pomona.sim.plan_trial import TrialRunner
from pomona.sim.population import AdapterPages

SPEC = Path(__file__).resolve().parent / "specs" / "azure-conv.toml"


def main() -> None:
    parser = arguments(__doc__, "plan")
    parser.add_argument("--trace", type=Path, help="default: the sample of the package")
    options = parser.parse_args()
    report = Report("plan", options.output)
    spec = load_plan_spec(SPEC)
    if options.trace is not None:
        workload = spec.simulation.workload.model_copy(update={"file": str(options.trace.resolve())})
        spec = replace(spec, simulation=spec.simulation.model_copy(update={"workload": workload}))
    runner = TrialRunner(spec, lambda name: read_lines(name, SPEC.parent))
    start_s = time.monotonic()
    plan = search(spec, runner, Console(stderr=True))
    replica = runner.cluster_config(plan.settings).scheduler
    pages = AdapterPages(spec.simulation.replica.rows_per_page)
    row = plan_fields(plan, replica, pages) | {
        "trace": "The whole hour, four times as fast" if options.trace else "Its first ten minutes, four times as fast",
        "num_requests": runner.num_requests,
        "wanted": spec.plan.min_attainment,
        "wall_s": time.monotonic() - start_s,
    }
    report.add("plan", row)
    print(plan_text(plan, replica, pages, spec.plan.min_attainment))


if __name__ == "__main__":
    main()
