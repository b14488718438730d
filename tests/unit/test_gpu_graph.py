"""The GPU's graph, defined and inspected but not built: its operators and where each runs. Needs no GPU.

DALI keeps the defined graph in private attributes; a release that renames them fails here, not in a user's run.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tidali.loading.dali import Placement, ShardFiles, batch_pipeline, decode_pipeline

FILES = ShardFiles(tars=[Path("a.tar")], indexes=[Path("a.idx")], extensions=("jpg", "png"), num_digits=3)


def defined(pipe) -> tuple[dict[str, str], list[str]]:
    """Operator -> device of a defined pipeline, and its outputs' devices."""
    pipe._build_graph()
    operators = [(op._op.schema_name, op._op.device) for op in pipe._ops]
    assert len(operators) >= 3
    return dict(operators), [node.device for node in pipe._graph_outputs]


def training_pipeline(placement: Placement):
    return batch_pipeline(
        FILES,
        batch_size=8,
        res=64,
        resize=True,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        flip=True,
        shuffle_buffer=100,
        rank=0,
        world_size=1,
        seed=0,
        num_threads=2,
        placement=placement,
    )


def test_on_a_gpu_pixels_never_come_back_and_labels_follow() -> None:
    operators, outputs = defined(training_pipeline(Placement.of("cuda", 0)))
    assert operators["readers__Webdataset"] == "cpu"
    assert operators["decoders__Image"] == "mixed"
    assert operators["Resize"] == operators["CropMirrorNormalize"] == "gpu"
    assert operators["random__CoinFlip"] == "cpu"  # a named argument: DALI takes those from the CPU alone
    assert outputs == ["gpu", "gpu"]


def test_on_a_cpu_the_same_operators_run_there() -> None:
    on_gpu, _ = defined(training_pipeline(Placement.of("cuda", 0)))
    on_cpu, outputs = defined(training_pipeline(Placement.of("cpu", None)))
    assert on_cpu.keys() == on_gpu.keys()
    assert set(on_cpu.values()) == {"cpu"}
    assert outputs == ["cpu", "cpu"]


def test_decoding_alone_ends_on_the_device() -> None:
    operators, outputs = defined(
        decode_pipeline(
            FILES, batch_size=8, square=None, rank=0, world_size=1, num_threads=2, placement=Placement.of("cuda", 0)
        )
    )
    assert operators["decoders__Image"] == "mixed"
    assert outputs[0] == "gpu"


@pytest.mark.parametrize(("index", "device_id"), [(None, 0), (0, 0), (3, 3)])
def test_the_devices_number_reaches_dali(index: int | None, device_id: int) -> None:
    pipe = training_pipeline(Placement.of("cuda", index))
    assert pipe.device_id == device_id
    assert Placement.of("cpu", None).device_id is None
