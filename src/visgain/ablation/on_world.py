"""Arms on the embedded world: every seed draws a training split that follows the priors and a test that breaks them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from visgain.config import WorldConfig
from visgain.world.dataset import write_world
from visgain.world.evaluate import evaluate_world


@dataclass(frozen=True, kw_only=True)
class World:
    """The two splits of one seed, in `folder`."""

    folder: Path
    seed: int
    rows: int
    test_rows: int

    @property
    def train(self) -> Path:
        return self.folder / "train/data.json"

    def draw(self) -> None:
        """Draw what is not there yet; data.json is a split's last file."""
        for split, rows in (("train", self.rows), ("test", self.test_rows)):
            config = WorldConfig(out=self.folder / split, split=split, rows=rows, seed=self.seed)  # type: ignore[arg-type]
            if not (config.out / "data.json").is_file():
                write_world(config)

    def evaluate(self, model: str, name: str, device: str = "auto") -> dict[str, Any]:
        """WorldMetrics of `model` on the test split; progress calls it `name`."""
        return asdict(evaluate_world(model, self.folder / "test", description=f"evaluating {name}", device=device))
