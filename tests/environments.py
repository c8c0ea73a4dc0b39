"""Foreign packages in environments of their own, for tests marked `integration`.

tests/requirements/NAME.txt pins everything that a package needs. An environment is made once, inside of ours, and found
again for as long as neither its requirements nor ours change. It sees nothing of ours but what a test gives it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

TORCH = "torch==2.13.0"
REQUIREMENTS = Path(__file__).parent / "requirements"

SPY = """\
import functools, json, os
import transformers.trainer

def write(batch):
    kept = {name: batch[name].tolist() for name in ("input_ids", "labels", "loss_scale") if name in batch}
    with open(os.environ["SPY"], "a") as file:
        print(json.dumps(kept), file=file)

def spied(inner):
    @functools.wraps(inner)
    def get_batch_samples(*args, **kwargs):
        samples, count = inner(*args, **kwargs)
        for batch in samples:
            write(batch)
        return samples, count
    return get_batch_samples

def spied_step(inner):
    @functools.wraps(inner)
    def training_step(self, model, inputs, *args, **kwargs):
        write(inputs)
        return inner(self, model, inputs, *args, **kwargs)
    return training_step

trainer = transformers.trainer.Trainer
if hasattr(trainer, "get_batch_samples"):
    trainer.get_batch_samples = spied(trainer.get_batch_samples)
else:  # before transformers 4.46
    trainer.training_step = spied_step(trainer.training_step)
"""
"""A sitecustomize.py: writes down every collated batch that a Trainer is about to train on, and changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A virtual environment. `home` is where its packages may keep what they keep."""

    folder: Path
    home: Path

    def run(
        self, command: Sequence[str | Path], *, spy: Path | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, off line. `spy`: a file for the batches that are trained on."""
        program, *rest = map(str, command)
        variables = {
            "HF_HUB_OFFLINE": "1",
            "HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
        }
        if spy is not None:
            (self.home / "spy").mkdir(exist_ok=True)
            (self.home / "spy" / "sitecustomize.py").write_text(SPY)
            variables |= {"PYTHONPATH": str(self.home / "spy"), "SPY": str(spy)}
        return subprocess.run(
            [str(self.folder / "bin" / program), *rest],
            capture_output=True,
            text=True,
            check=False,
            env=variables,
            cwd=cwd or self.home,
        )


def environment(name: str, home: Path, stubs: Mapping[str, str] | None = None) -> Environment:
    """The environment of tests/requirements/NAME.txt. `stubs`: modules that it imports and never uses, as source."""
    requirements = REQUIREMENTS / f"{name}.txt"
    wanted = json.dumps([TORCH, requirements.read_text(), dict(stubs or {}), sys.version])
    folder = Path(sys.prefix) / "environments" / f"{name}-{hashlib.blake2b(wanted.encode(), digest_size=6).hexdigest()}"
    folder.parent.mkdir(exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            venv.create(folder, with_pip=True, clear=True)
            pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
            # By itself: with others beside it, pip would look for a build of its own choice.
            subprocess.run([*pip, TORCH], check=True, env=_clean())
            subprocess.run([*pip, "--no-deps", "-r", str(requirements)], check=True, env=_clean())
            packages = next((folder / "lib").glob("python*/site-packages"))
            for module, source in (stubs or {}).items():
                (packages / f"{module}.py").write_text(source)
            (folder / "complete").touch()
    return Environment(folder=folder, home=home)


def _clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def batches(spy: Path) -> list[dict[str, Any]]:
    """What the spy wrote down, in order."""
    return [json.loads(line) for line in spy.read_text().splitlines()]


# ---------------------------------------------------------------- guides


def blocks(guide: Path, language: str) -> list[str]:
    """The code blocks of a guide in one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", guide.read_text(), re.M | re.S)


def commands(guide: Path) -> list[list[str]]:
    """The commands of a guide's sh blocks as arguments."""
    lines = "\n".join(blocks(guide, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    """A guide's text with each first string, which must be there, replaced by the second."""
    for old, new in pairs:
        assert old in text, f"{old!r} is not in the guide any more"
        text = text.replace(old, new)
    return text
