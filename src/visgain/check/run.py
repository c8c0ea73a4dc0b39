"""`visgain check`: one stage after the other. A stage that cannot be done is a finding, and so the last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from visgain.check import data_checks, label_checks, run_checks
from visgain.check.checked import Checked
from visgain.check.estimate import Estimate, device_bytes, estimate, parameters
from visgain.check.findings import Finding, findings, in_bytes
from visgain.check.measure import Measured, measure
from visgain.check.reading import Reading, read, sample_rows, told
from visgain.check.run_checks import Trial
from visgain.check.scan import Scan, scan
from visgain.config import CheckConfig
from visgain.data import Dataset
from visgain.errors import ConfigError, ModelError, VisgainError
from visgain.scoring import run
from visgain.vlm.load import VLM, pick_device
from visgain.vlm.profiles import find_profile

T = TypeVar("T")


def run_check(config: CheckConfig) -> Checked:
    """Find out what `score` with the same options would do. Raises ConfigError for options that contradict themselves.

    Whatever else is wrong, with the dataset or with the model, is a finding.
    """
    run.blind_condition(config)
    find_profile(config.template)
    stages = _Stages()
    dataset = stages.do("data", lambda: run.scored_dataset(config), mend=_right_root(config))
    seen = None if dataset is None else stages.do("data", lambda: _scan(config, dataset))
    stages.found += [] if seen is None else findings(data_checks.CHECKS, seen)
    vlm = stages.do("model", lambda: _load(config)) if seen is not None and seen.rows else None
    if dataset is None or seen is None or vlm is None:
        return stages.end(config, seen, vlm)
    rows = sample_rows(seen, config.sample)
    reading = stages.do(
        "template",
        lambda: read(vlm, dataset, seen, rows, config.template, config.max_length),
        mend=label_checks.ITS_OWN,
    )
    if reading is None:
        return stages.end(config, seen, vlm)
    stages.found += findings(label_checks.CHECKS, reading)
    if not any(one.cut is not None and one.sample.images for one in reading.rows):
        return stages.end(config, seen, vlm, reading)
    measured = measure(config, vlm, dataset, reading)
    whole = estimate(config, vlm, reading, measured)
    stages.found += findings(run_checks.CHECKS, Trial(measured=measured, estimate=whole))
    return stages.end(config, seen, vlm, reading, measured, whole)


class _Stages:
    def __init__(self) -> None:
        self.found: list[Finding] = []

    def do(self, name: str, stage: Callable[[], T], mend: str = "") -> T | None:
        """What `stage` returns, or None and a finding called `name` if it cannot be done."""
        try:
            return stage()
        except ConfigError:
            raise
        except VisgainError as error:
            self.found.append(Finding(check=name, severity="error", what=str(error), mend=mend))
        except Exception as error:  # files and models are other people's; told as what score would stop with
            self.found.append(Finding(check=name, severity="error", what=told(error), mend=mend))
        return None

    def end(
        self,
        config: CheckConfig,
        seen: Scan | None,
        vlm: VLM | None,
        reading: Reading | None = None,
        measured: Measured | None = None,
        whole: Estimate | None = None,
    ) -> Checked:
        return Checked(
            config=config,
            scan=seen,
            vlm=vlm,
            reading=reading,
            measured=measured,
            estimate=whole,
            findings=self.found,
        )


def _right_root(config: CheckConfig) -> str:
    """What to say instead of an image folder that does not exist; "" if that is not what is wrong, or nobody knows."""
    if config.image_root is None or config.image_root.is_dir():
        return ""
    try:
        dataset = run.scored_dataset(replace(config, image_root=None))
        pictures = _scan(config, dataset).pictures
    except VisgainError:
        return ""
    root = pictures.better_root if pictures.unusable else dataset.image_root
    return "" if root is None else f"the pictures lie there: --image-root {root}"


def _scan(config: CheckConfig, dataset: Dataset) -> Scan:
    return scan(dataset, min(len(dataset), config.limit or len(dataset)))


def _load(config: CheckConfig) -> VLM:
    """The model, if it fits: one that does not would take the machine down with it. Raises ModelError."""
    device, dtype = pick_device(config.device), run.run_dtype(config)
    needed, there = (4 if dtype == "float32" else 2) * parameters(config.model), device_bytes(device)
    if there and needed > there:
        raise ModelError(
            f"{config.model} takes {in_bytes(needed)} in {dtype}, and {device} has {in_bytes(there)}: "
            "use a smaller --dtype, another --device, or a larger machine"
        )
    return run.load_model(config, dtype)
