"""``pomona serve`` with a stamped engine. Started by benchmarks/server.py.

python -m benchmarks.stamped_server STAMPS.json MODEL_FOLDER SETTINGS_JSON
"""

import json
import sys

from benchmarks.stamped_engine import StampedBuild
from pomona.cli import serve
from pomona.cli.build import BuildEngine, engine_builder
from pomona.cli.config import AppConfig, load_config


def main() -> None:
    stamps_path, model, settings = sys.argv[1:]

    def stamped_builder(config: AppConfig) -> BuildEngine:
        plain = engine_builder(config)
        return StampedBuild(plain.config, plain.model_path, stamps_path=stamps_path)

    serve.engine_builder = stamped_builder  # type: ignore[attr-defined]
    serve.run_server(load_config({"model": model, **json.loads(settings)}))


if __name__ == "__main__":
    main()
