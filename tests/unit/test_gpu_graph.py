"""The GPU's graph, defined and inspected but not built: its operators and where each runs. Needs no GPU.

DALI keeps the defined graph in private attributes; a release that renames them fails here, not in a user's run.
"""

from __future__ import annotations

import pytest
import torch

from tidali.loading.dali import Placement, Work, define_graph

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def defined(device: torch.device, work: Work) -> tuple[dict[str, str], list[str]]:
    """Operator -> device of a defined graph, and its outputs' devices."""
    pipe = define_graph(Placement.on(device), work, batch_size=8, num_threads=2)
    pipe._build_graph()
    operators = [(getattr(op._op, "schema_name", type(op._op).__name__), op._op.device) for op in pipe._ops]
    assert len(operators) >= 2
    return dict(operators), [node.device for node in pipe._graph_outputs]


@pytest.mark.parametrize("work", ["decode", "resize boxes"])
def test_on_a_gpu_pixels_never_come_back(work: Work) -> None:
    operators, outputs = defined(GPU, work)
    assert operators["decoders__Image"] == "mixed"
    assert operators["ExternalSource"] == "cpu"  # encoded bytes, and named arguments, which DALI takes from the CPU alone
    assert operators.get("Resize", "gpu") == "gpu"
    assert ("Resize" in operators) == (work == "resize boxes")
    assert outputs == ["gpu"]


def test_no_region_is_decoded_on_a_gpu() -> None:
    """nvImageCodec 0.9 crashes there on Hopper (its issue 55)."""
    for work in ("decode", "resize boxes"):
        assert "decoders__ImageSlice" not in defined(GPU, work)[0]
    assert defined(CPU, "decode boxes")[0]["decoders__ImageSlice"] == "cpu"


@pytest.mark.parametrize("work", ["decode", "resize boxes"])
def test_on_a_cpu_the_same_operators_run_there(work: Work) -> None:
    on_cpu, outputs = defined(CPU, work)
    assert on_cpu.keys() == defined(GPU, work)[0].keys()
    assert set(on_cpu.values()) == {"cpu"}
    assert outputs == ["cpu"]


@pytest.mark.parametrize(("index", "device_id"), [(None, 0), (0, 0), (3, 3)])
def test_the_devices_number_reaches_dali(index: int | None, device_id: int) -> None:
    device = torch.device("cuda") if index is None else torch.device("cuda", index)
    assert Placement.on(device).device_id == device_id
    assert Placement.on(CPU).device_id is None
