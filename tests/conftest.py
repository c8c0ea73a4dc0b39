"""Shared fixtures: small real models, and where the real data lies if it is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Models of a few thousand weights lose far more to waking threads than they gain, most of all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# From here on every call in visgain is checked against its annotations, shapes and dtypes of arrays included.
install_import_hook("visgain", "runtime_types.checked")

import tiny_models  # noqa: E402
from visgain.vlm.load import VLM, load_vlm  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Recorded predictions with published scores."""
    folder = SHARED / "fixtures"
    if not folder.is_dir():
        pytest.skip("the recorded predictions (../shared/fixtures) are not on this machine")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indexes of datasets are kept in a folder of the tests, and nothing is found there that they did not make."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real datasets beside the checkout; tests that need it skip without it."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the real data (../shared/data) is not on this machine")
    return folder


@pytest.fixture(scope="session")
def blank_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's architecture with random weights."""
    from visgain.world.model import build_blank

    return build_blank(tmp_path_factory.mktemp("blank"), seed=1)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 training rows of the world: data.json, truth.jsonl, images."""
    from visgain.config import WorldConfig
    from visgain.world.dataset import write_world

    out = tmp_path_factory.mktemp("world")
    write_world(WorldConfig(out=out, split="train", rows=60, seed=3))
    return out


@pytest.fixture(scope="session")
def embedded(blank_model: Path) -> VLM:
    """LLaVA with a chat template that marks generation."""
    return load_vlm(str(blank_model))


@pytest.fixture(scope="session")
def llava(blank_model: Path) -> VLM:
    """LLaVA without a chat template, as the original checkpoints."""
    return tiny_models.llava_vicuna(blank_model)


@pytest.fixture(scope="session")
def llava_next() -> VLM:
    """LLaVA-NeXT with a ChatML template without generation marks."""
    return tiny_models.llava_next()


@pytest.fixture(params=["embedded", "llava", "llava_next"])
def family(request: pytest.FixtureRequest) -> VLM:
    return request.getfixturevalue(request.param)
