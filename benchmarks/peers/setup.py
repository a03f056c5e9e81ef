"""Makes what the comparison needs: an environment per system, the models and adapters, and their GGUF copies.

    python -m benchmarks.peers.setup                 # everything; half an hour on two cores, most of it one compiler
    python -m benchmarks.peers.setup --only llama

What is there and works is kept, so it may be interrupted and run again. About 7 GB in the cache folder
(POMONA_BENCH_CACHE, default ~/.cache/pomona-bench). Where the default index has torch for CUDA only, a CPU build is
found with PIP_EXTRA_INDEX_URL; either works.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import assets, workload
from benchmarks.peers.systems import ENVIRONMENTS, LLAMA_CPP, VLLM, Environment
from benchmarks.results import ROOT
from benchmarks.shapes import SHAPES

_TCMALLOC = "libtcmalloc-minimal4"


def _log(text: str) -> None:
    print(f"== {text}", flush=True)


def works(environment: Environment) -> bool:
    """True if the environment is there and its packages can be imported."""
    if not environment.python.exists():
        return False
    command = [str(environment.python), "-c", environment.check]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def install(environment: Environment) -> None:
    """Make an environment, politely: at the lowest priority.

    Raises:
        RuntimeError: it does not work; what pip said was shown.
    """
    _log(f"{environment.name}: installing {', '.join(environment.packages)}")
    if not environment.python.exists():
        subprocess.run([sys.executable, "-m", "venv", environment.folder], check=True)
    pip = ["nice", "-n", "19", str(environment.python), "-m", "pip"]
    variables = {**os.environ, **environment.build_environment}
    variables.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    done = subprocess.run([*pip, "install", *environment.packages], env=variables, check=False)
    if done.returncode:
        raise RuntimeError(f"pip failed with exit code {done.returncode}")
    if environment.removed:
        subprocess.run([*pip, "uninstall", "--yes", "--quiet", *environment.removed], check=True)
    if not works(environment):
        raise RuntimeError(f"installed, but `{environment.check}` fails in {environment.folder}")


def fetch_tcmalloc() -> None:
    """Put tcmalloc where the vLLM runner looks for it, if the system lacks it and this is a Debian; needs no root."""
    target = VLLM.folder / "lib"
    found = [*target.glob("libtcmalloc_minimal.so.4"), *Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")]
    if found:
        return
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        _log(f"vllm: {_TCMALLOC} not found; vLLM advises to preload it, so its numbers may come out lower")
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", _TCMALLOC], cwd=folder, check=False)
        for package in Path(folder).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        for library in Path(folder).rglob("libtcmalloc_minimal.so.4*"):
            shutil.copy2(library, target / library.name, follow_symlinks=True)


def make_gguf(shape_name: str) -> None:
    """Write the GGUF copies of a shape's model and adapters."""
    path = workload.cache_dir() / shape_name / "workload.json"
    subprocess.run([LLAMA_CPP.python, "-m", "benchmarks.peers.make_gguf", path], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [environment.name for environment in ENVIRONMENTS]
    parser.add_argument("--only", choices=names, action="append", help="these environments; repeatable")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: the two of the comparison")
    arguments = parser.parse_args()
    failed = []
    for number, environment in enumerate(ENVIRONMENTS, 1):
        if arguments.only and environment.name not in arguments.only:
            continue
        if works(environment):
            _log(f"{number}/{len(ENVIRONMENTS)} {environment.name}: is there")
            continue
        try:
            install(environment)
            _log(f"{number}/{len(ENVIRONMENTS)} {environment.name}: done")
        except (RuntimeError, subprocess.CalledProcessError) as error:  # the others can still be compared
            failed.append(f"{environment.name}: {error}")
            _log(f"{number}/{len(ENVIRONMENTS)} {failed[-1]}")
    if VLLM.python.exists():
        fetch_tcmalloc()
    shapes = arguments.shape or ["smollm2-135m", "qwen2.5-0.5b"]
    assets.make_with_progress([SHAPES[name] for name in shapes])
    if works(LLAMA_CPP):
        for name in shapes:
            make_gguf(name)
    if failed:
        raise SystemExit("all others are ready; " + "; ".join(failed))
    _log(f"ready: {workload.cache_dir()}")


if __name__ == "__main__":
    main()
