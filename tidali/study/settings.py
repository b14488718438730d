"""Settings of a study."""

from __future__ import annotations

from dataclasses import dataclass

from tidali.config import AmpChoice, Arch, CacheChoice, CompileChoice, DeviceChoice
from tidali.errors import UsageError
from tidali.study.rows import ROWS


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Settings of a study."""

    data: str
    """Folder of a packed data set."""
    out: str
    """Folder of the study."""
    rows: tuple[str, ...] = ()
    """Names of the rows to run, besides the rows whose weights they start from; empty for all."""
    seeds: int = 1
    """Runs of each row, with seeds 0, 1, ...; a run starts from the weights of the run with the same seed."""
    epochs_scale: float = 1.0
    """Factor on the number of epochs of every row, for a quick look."""
    arch: Arch = "resnet18"
    """The network of every row."""
    imagenet_weights: str | None = None
    """A file to use instead of torchvision's ImageNet weights."""
    device: DeviceChoice = "auto"
    amp: AmpChoice = "auto"
    compile: CompileChoice = "auto"
    cache: CacheChoice = "auto"

    def __post_init__(self) -> None:
        known = [row.name for row in ROWS]
        for name in self.rows:
            if name not in known:
                raise UsageError(f"--rows {name}: choose from {', '.join(known)}")
        if self.seeds < 1:
            raise UsageError(f"--seeds {self.seeds}: at least 1")
        if not 0 < self.epochs_scale < float("inf"):
            raise UsageError(f"--epochs-scale {self.epochs_scale}: must be above 0 and finite")
