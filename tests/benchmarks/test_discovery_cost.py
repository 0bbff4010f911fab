"""What discovery costs. Run with ``pytest tests/benchmarks -m slow -k discovery``."""

import pytest
from helpers.processes import run

LLAMA_70B = """
import json, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from helpers.processes import peak_megabytes
from mlu_lightning import discover

width = {"hidden_size": 8192, "intermediate_size": 28672, "vocab_size": 128256}
heads = {"num_attention_heads": 64, "num_key_value_heads": 8}
with torch.device("meta"):
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=80, **width, **heads))
before, start = peak_megabytes(), time.perf_counter()
structure = discover(model, {"input_ids": torch.zeros(1, 16, dtype=torch.long)})
costs = {"seconds": time.perf_counter() - start, "megabytes": peak_megabytes() - before}
parameters = sum(p.numel() for p in model.parameters())
print(json.dumps({"shape": [parameters, structure.depth, len(structure.unassigned)], **costs}))
"""


@pytest.mark.slow
def test_discovery_of_70_billion_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    """On meta tensors; the aim is 10 s and 1 GB."""
    found = run(LLAMA_70B)
    parameters, depth, unassigned = found["shape"]
    assert 70e9 < parameters < 71e9 and (depth, unassigned) == (160, 0)
    assert found["megabytes"] < 1000
    with capsys.disabled():
        print(f"\ndiscovery of 70B parameters: {found['seconds']:.2f} s, {found['megabytes']:.0f} MB")
