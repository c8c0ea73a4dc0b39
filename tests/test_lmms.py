"""lmms-eval's own evaluator asks our model: the real package, in an environment of its own, on a task of local data."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from visgain.config import WorldConfig
from visgain.data import open_dataset
from visgain.evaluation.generate import generate_answers
from visgain.types import Sample
from visgain.vlm.load import load_vlm
from visgain.vlm.template import make_encoder
from visgain.world.dataset import write_world

pytestmark = pytest.mark.integration

# What it imports of its 144 requirements to evaluate a task; the rest comes from our own environment.
PACKAGES = ("loguru", "sacrebleu", "evaluate", "pytz", "tenacity", "datasets")

TASK = """\
task: kinds
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: !function utils.question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 24
  until: ["."]
process_results: !function utils.results
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""

UTILS = """\
import io
from PIL import Image

def pictures(doc):
    return [Image.open(io.BytesIO(doc["picture"]))]

def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, found):
    return {"right": float(found[0] == doc["answer"])}
"""

RUN = """\
import json, sys
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from visgain.evaluation.lmms import VisgainModel

manager = TaskManager(include_path=sys.argv[1], include_defaults=False)
found = simple_evaluate(
    model=VisgainModel("embedded", device="cpu", batch_size=5), tasks=["kinds"], task_manager=manager, log_samples=True
)
samples = {sample["doc_id"]: sample["filtered_resps"][0] for sample in found["samples"]["kinds"]}
print(json.dumps({"right": found["results"]["kinds"]["right,none"], "said": samples}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lmms") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "--no-deps", "lmms-eval==0.7.3"], check=True)
    subprocess.run([*install, *PACKAGES], check=True)
    ours = Path(sysconfig.get_paths()["purelib"])
    theirs = next((folder / "lib").glob("python*/site-packages"))
    (theirs / "ours.pth").write_text(f"{ours}\n{Path(__file__).parents[1] / 'src'}\n")
    return folder / "bin" / "python"


def test_lmms_eval_gets_the_answers_that_visgain_gives(python: Path, tmp_path: Path) -> None:
    world = write_world(WorldConfig(out=tmp_path / "world", split="test", rows=12, seed=5))
    dataset = open_dataset(world)
    samples = [sample for row in range(12) if isinstance(sample := dataset[row], Sample)]
    vlm = load_vlm("embedded", device="cpu")
    said = [text.split(".")[0] for text in generate_answers(vlm, make_encoder(vlm), samples, max_new_tokens=24)]
    questions = [sample.turns[0].text.replace("<image>\n", "") for sample in samples]
    targets = [answer if n % 3 else "something else" for n, answer in enumerate(said)]
    pictures = [(tmp_path / "world" / "images" / f"{sample.row:06d}.png").read_bytes() for sample in samples]
    data = tmp_path / "data.parquet"
    pq.write_table(pa.table({"picture": pictures, "question": questions, "answer": targets}), data)
    task = tmp_path / "task"
    task.mkdir()
    (task / "kinds.yaml").write_text(TASK.format(data=data))
    (task / "utils.py").write_text(UTILS)
    done = subprocess.run(
        [str(python), "-c", RUN, str(task)],
        capture_output=True,
        text=True,
        check=False,
        env={"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [found["said"][str(n)] for n in range(len(samples))] == said
    assert found["right"] == pytest.approx(sum(n % 3 > 0 for n in range(len(samples))) / len(samples))
