"""Recorded decode steps answer as steps that are computed one kernel after the other."""

import random
import subprocess
import sys

import pytest

from pomona.core.request import SamplingParams
from pomona.kernels.cpu import binding
from support.adapters import ALL_TARGETS, make_adapter
from support.models import make_checkpoint
from support.runner import TinyEngine
from support.step_cost import counting_native_calls

pytestmark = pytest.mark.skipif(not binding.is_available(), reason=binding.REASON)

ADAPTERS = (
    {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    {"r": 8, "target_modules": ALL_TARGETS},
    {"r": 3, "target_modules": ["down_proj", "o_proj"]},
    {"r": 4, "target_modules": ALL_TARGETS, "use_dora": True},
)


@pytest.fixture(scope="module")
def base_path(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("recorded") / "base", max_position_embeddings=512)


@pytest.fixture(scope="module")
def adapter_paths(base_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(folder / f"{i}", base_path, seed=i, **fields) for i, fields in enumerate(ADAPTERS)]


def serve(base_path, adapter_paths, *, is_recorded: bool, seed: int, num_kv_blocks: int, **settings):
    """Requests that come at random times, of random adapters and lengths; what each was answered, and the engine."""
    engine = TinyEngine(base_path, num_kv_blocks=num_kv_blocks, max_num_seqs=6, **settings)
    if not is_recorded:
        engine.loaded.runner._recorded = None
    ids = [None, *(engine.load_adapter(path) for path in adapter_paths)]
    rng = random.Random(seed)
    requests = []
    for _ in range(40):
        for _ in range(rng.randrange(3)):
            prompt = [rng.randrange(3, 90) for _ in range(rng.randrange(1, 12))]
            sampling = SamplingParams(max_tokens=rng.randrange(1, 15), temperature=rng.choice([0.0, 0.8]), seed=7)
            requests.append(engine.add(prompt, sampling, rng.choice(ids)))
        engine.step()
    engine.run()
    return [engine.tokens(request_id) for request_id in requests], engine


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("num_kv_blocks", [200, 24], ids=["roomy", "preempting"])
@pytest.mark.parametrize("num_adapters", [3, 4], ids=["low-rank parts", "one with more"])
def test_recorded_steps_answer_as_others_do(base_path, adapter_paths, quantization, num_kv_blocks, num_adapters):
    settings = {"num_kv_blocks": num_kv_blocks, "quantization": quantization}
    paths = adapter_paths[:num_adapters]
    expected, _ = serve(base_path, paths, is_recorded=False, seed=num_kv_blocks, **settings)
    with counting_native_calls() as calls:
        answers, engine = serve(base_path, paths, is_recorded=True, seed=num_kv_blocks, **settings)
    assert answers == expected
    assert all(answers)
    assert engine.loaded.runner._recorded._steps
    assert calls["pomona_replay"] >= 5


def test_a_model_with_other_operators_is_not_recorded(base_path, adapter_paths):
    answers, engine = serve(base_path, adapter_paths[:1], is_recorded=True, seed=1, num_kv_blocks=200, dtype="float16")
    assert all(answers)
    assert not engine.loaded.runner._recorded._steps


def test_torchs_compiler_is_not_imported():
    """It would hold up the first decode step, and every full collection of garbage from then on."""
    program = (
        "import sys; from pomona import LLM, SamplingParams\n"
        "LLM().generate(['a b'], sampling=SamplingParams(max_tokens=3), ignore_eos=True)\n"
        "print('torch._dynamo' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False"]
