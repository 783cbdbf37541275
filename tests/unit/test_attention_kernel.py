"""The kernel that a run says it uses is the one that runs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fvtitan.models.wan.attention import attend, chosen_kernel, pinned_kernels
from tests.helpers import causal_model, make_cache, random_transformer, small_config

FLASH = "_scaled_dot_product_flash_attention_for_cpu"


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_the_one_that_runs(dtype, deterministic):
    shape, device = (2, 12, 4, 32), torch.device("cpu")
    q = torch.randn(shape, dtype=dtype)
    with pinned_kernels(deterministic) as words, Calls() as calls:
        assert chosen_kernel(shape, dtype, device) == "flash" and "flash" in words.split(" > ")
        attend(q, q, q)
    assert FLASH in calls.names
    with sdpa_kernel(SDPBackend.MATH), Calls() as calls:
        assert chosen_kernel(shape, dtype, device) == "math"
        attend(q, q, q)
    assert FLASH not in calls.names


def test_a_causal_role_names_both(tmp_path):
    cfg = small_config(make_cache(tmp_path / "cache"), tmp_path)
    model = causal_model(random_transformer(), 1, attention_backend="flex")
    assert model.attention_kernel(cfg) == "flex over whole videos, flash in streams"
    assert causal_model(random_transformer(), 1, attention_backend="sdpa").attention_kernel(cfg) == "flash"
