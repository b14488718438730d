"""Reused memory: never handed out while anything of it is held."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tidali.hardware.cpu_memory import ReusedMemory


def test_memory_is_used_again_as_soon_as_its_tensor_is_gone() -> None:
    memory = ReusedMemory()
    tensor = memory.empty((4, 8), torch.float32)
    address = tensor.data_ptr()
    del tensor
    assert memory.empty((2, 3), torch.bfloat16).data_ptr() == address


@pytest.mark.parametrize(
    "hold", [lambda t: t[1:], lambda t: t.permute(1, 0), lambda t: t.numpy(), lambda t: t.untyped_storage()]
)
def test_a_view_holds_it(hold) -> None:
    memory = ReusedMemory()
    tensor = memory.empty((4, 8), torch.float32)
    address, view = tensor.data_ptr(), hold(tensor)
    del tensor
    gc.collect()
    other = memory.empty((4, 8), torch.float32)
    assert other.data_ptr() != address
    del view
    gc.collect()
    assert memory.empty((4, 8), torch.float32).data_ptr() == address


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5)), max_size=60))
def test_held_tensors_keep_their_values(plan: list[tuple[int, int]]) -> None:
    memory, held = ReusedMemory(), {}
    for value, (count, place) in enumerate(plan):
        held.pop(place, None)
        held[place] = (memory.empty((count,), torch.int64).fill_(value), value)
        assert all((tensor == expected).all() for tensor, expected in held.values())
    held.clear()
    assert len(memory._free) <= 6 * 50


def test_a_tensor_that_autograd_saved_keeps_its_memory() -> None:
    memory, weight = ReusedMemory(), torch.ones(8, requires_grad=True)
    images = memory.empty((8,), torch.float32).fill_(3.0)
    loss = (images * weight).sum()
    del images
    memory.empty((8,), torch.float32).fill_(-1.0)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [3.0] * 8


def test_another_dtype_and_shape() -> None:
    tensor = ReusedMemory().empty((3, 5, 7), torch.bfloat16)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((3, 5, 7), torch.bfloat16, True)
