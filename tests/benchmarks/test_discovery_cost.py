"""What discovery costs. Run with ``pytest tests/benchmarks -m slow -k discovery``."""

import pytest
from helpers.processes import run

LLAMA_70B = """
import json, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from helpers.processes import peak_megabytes
from mlu_lightning import discover

with torch.device("meta"):
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=128256,
        )
    )
before, start = peak_megabytes(), time.perf_counter()
structure = discover(model, {"input_ids": torch.zeros(1, 16, dtype=torch.long)})
print(
    json.dumps(
        {
            "parameters": sum(p.numel() for p in model.parameters()),
            "depth": structure.depth,
            "unassigned": len(structure.unassigned),
            "seconds": time.perf_counter() - start,
            "megabytes": peak_megabytes() - before,
        }
    )
)
"""


@pytest.mark.slow
def test_discovery_of_70_billion_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    """On meta tensors; the aim is 10 s and 1 GB."""
    found = run(LLAMA_70B)
    assert 70e9 < found["parameters"] < 71e9
    assert (found["depth"], found["unassigned"]) == (160, 0)
    assert found["megabytes"] < 1000
    with capsys.disabled():
        print(f"\ndiscovery of 70B parameters: {found['seconds']:.2f} s, {found['megabytes']:.0f} MB")
