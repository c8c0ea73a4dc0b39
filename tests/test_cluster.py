"""Scoring on Ray: how many workers, what becomes of the dead, and the real thing (integration), which must give the
same tables as without, whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from visgain.cli import main
from visgain.config import ScoreConfig, WorldConfig
from visgain.errors import ConfigError, VisgainError
from visgain.scoring.cluster import DEATHS, Workers, from_anywhere, n_places, score_on_ray, worker_needs
from visgain.scoring.run import run_score
from visgain.storage import read_scores
from visgain.world.dataset import write_world

# ---------------------------------------------------------------- without Ray


def test_without_ray_the_message_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(SystemExit) as exit_:
        main(["score", "--model", "m", "--data", "d", "--out", str(tmp_path / "out"), "--backend", "ray"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "visgain: --backend ray needs Ray: pip install 'visgain[ray]'\n"
    assert not (tmp_path / "out").exists()


def test_the_default_backend_knows_nothing_of_ray() -> None:
    code = "import sys; import visgain.scoring.run; print([n for n in sys.modules if 'ray' in n.split('.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("device", "machines", "needs", "places"),
    [
        ("auto", [{"CPU": 16, "GPU": 4}, {"CPU": 64}], {"CPU": 1, "GPU": 1}, 4),
        ("auto", [{"CPU": 2, "GPU": 8}], {"CPU": 1, "GPU": 1}, 2),
        ("auto", [{"CPU": 16}, {"CPU": 64}, {}], {"CPU": 8}, 10),
        ("auto", [{"CPU": 3}, {"CPU": 64}], {"CPU": 3}, 22),  # a worker fits on every machine
        ("cpu", [{"CPU": 16, "GPU": 4}], {"CPU": 8}, 2),
        ("cuda", [{"CPU": 16}], {"CPU": 1, "GPU": 1}, 0),  # a cluster may grow
        ("cuda:1", [{"CPU": 16, "GPU": 1.0}], {"CPU": 1, "GPU": 1}, 1),
        ("auto", [], {"CPU": 8}, 0),
    ],
)
def test_a_worker_takes_a_gpu_or_the_cores_of_one_process(
    device: str,
    machines: list[dict[str, float]],
    needs: dict[str, float],
    places: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert worker_needs(device, machines) == needs
    assert n_places(machines, needs) == places


def test_a_worker_elsewhere_gets_full_paths_and_the_gpu_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "data.json").write_text("[]")
    config = ScoreConfig(model="model", data=Path("data.json"), out=Path("out"), device="cuda:1", backend="ray")
    there = from_anywhere(config, {"CPU": 1, "GPU": 1})
    assert (there.model, there.data, there.out) == (
        str(tmp_path / "model"),
        tmp_path / "data.json",
        tmp_path / "out",
    )
    assert (there.image_root, there.device, there.workers, there.backend) == (None, "cuda", None, "local")
    config = ScoreConfig(model="model", data=Path("data.json"), out=Path("out"), image_root=Path("images"))
    assert from_anywhere(config, {"CPU": 1, "GPU": 1}).device == "auto"
    there = from_anywhere(config, {"CPU": 1})
    assert (there.image_root, there.device, there.workers) == (tmp_path / "images", "cpu", 0)
    assert from_anywhere(config, {"CPU": 4}).workers == 1


class FakeRay(ModuleType):
    """Two machines of one core. Tasks run until a test ends them, by returning or by an error."""

    exceptions = SimpleNamespace(
        RayError=type("RayError", (Exception,), {}), RayTaskError=type("RayTaskError", (Exception,), {"cause": None})
    )

    def __init__(self) -> None:
        super().__init__("ray")
        self.running: list[object] = []
        self.cancelled: list[object] = []
        self.ended: dict[object, Exception | None] = {}

    def nodes(self) -> list[dict[str, object]]:
        machines = [{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 1.0}]
        return [{"Alive": k < 2, "Resources": machine} for k, machine in enumerate(machines)]

    def remote(self, **options: object) -> Callable[[object], SimpleNamespace]:
        assert options["num_cpus"] == 1
        return lambda function: SimpleNamespace(remote=self._start)

    def _start(self, config: object, rank: object) -> object:
        self.running.append(task := object())
        return task

    def end(self, error: Exception | None) -> None:
        self.ended[self.running.pop()] = error

    def wait(self, tasks: list[object], timeout: float) -> tuple[list[object], list[object]]:
        return [task for task in tasks if task in self.ended], []

    def get(self, task: object) -> None:
        if error := self.ended[task]:
            raise error

    def cancel(self, task: object, *, force: bool) -> None:
        assert force
        self.cancelled.append(task)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return FakeRay()


@pytest.fixture
def anything(tmp_path: Path) -> ScoreConfig:
    return ScoreConfig(model="embedded", data=tmp_path / "data.json", out=tmp_path / "out", backend="ray")


def test_one_worker_makes_the_plan_then_one_more_than_fit_work_and_never_more_than_parts(
    ray: FakeRay, anything: ScoreConfig
) -> None:
    with Workers(ray, anything) as workers:
        assert len(ray.running) == 1
        workers.keep(None)
        assert len(ray.running) == 1
        workers.keep(2)
        assert len(ray.running) == 2
        workers.keep(100)
        assert len(ray.running) == 3
        assert not workers.finished(seconds=0)
        ray.end(None)
        assert workers.finished(seconds=0)
    assert sorted(map(id, ray.cancelled)) == sorted(map(id, ray.running))


def test_a_finished_run_still_has_one_worker_look_whether_it_is_this_run(ray: FakeRay, anything: ScoreConfig) -> None:
    with Workers(ray, anything) as workers:
        workers.keep(0)
        assert len(ray.running) == 1


def test_a_dead_worker_is_told_in_a_line_and_replaced(
    ray: FakeRay, anything: ScoreConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with Workers(ray, anything) as workers:
        for parts_left in range(50, 0, -1):  # as long as parts get done, any number may die
            workers.keep(parts_left)
            assert len(ray.running) == min(3, parts_left)
            ray.end(ray.exceptions.RayError("Out of memory.\nPages\nmore"))
            assert not workers.finished(seconds=0)
    said = capsys.readouterr().err.splitlines()
    assert said == ["visgain: a worker died, others do its part: Out of memory."] * 50


def test_workers_that_die_and_get_nothing_done_end_the_run(ray: FakeRay, anything: ScoreConfig) -> None:
    def die() -> bool:
        workers.keep(7)
        ray.end(ray.exceptions.RayError("died"))
        return workers.finished(seconds=0)

    with Workers(ray, anything) as workers:
        for _ in range(3 * DEATHS - 1):
            assert not die()
        with pytest.raises(VisgainError, match="15 workers died while no part was finished"):
            die()


def test_a_users_mistake_in_a_worker_is_raised_as_it_was_and_a_defect_as_ray_tells_it(
    ray: FakeRay, anything: ScoreConfig
) -> None:
    mistake, defect = ray.exceptions.RayTaskError("pages"), ray.exceptions.RayTaskError("pages")
    mistake.cause, defect.cause = ConfigError("wrong"), ZeroDivisionError()
    for error, raised in ((mistake, mistake.cause), (defect, defect)):
        with Workers(ray, anything) as workers:
            ray.end(error)
            with pytest.raises(type(raised)) as caught:
                workers.finished(seconds=0)
        assert caught.value is raised


def test_an_address_where_nobody_listens_is_one_clear_message(
    ray: FakeRay, anything: ScoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.is_initialized = lambda: False  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"no Ray cluster at RAY_ADDRESS=ray://127\.0\.0\.1:1: "):
        score_on_ray(anything)


# ---------------------------------------------------------------- with Ray

PART_ROWS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world that takes some seconds to score, so that there is a middle."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'visgain[ray]'")
    out = tmp_path_factory.mktemp("large-world")
    write_world(WorldConfig(out=out, rows=300, seed=4))
    return out


@pytest.fixture(scope="module")
def alone(world: Path, blank_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scores of one process."""
    out = tmp_path_factory.mktemp("alone")
    run_score(ScoreConfig(model=str(blank_model), data=world / "data.json", out=out, part_rows=PART_ROWS))
    return out


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(world: Path, blank_model: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts `visgain score --backend ray` into tmp_path as one does in a terminal: with the process group that
    Ctrl-C reaches."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str, address: str = "local") -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "visgain", "score", "--model", str(blank_model), "--backend", "ray"]
        command += ["--data", str(world / "data.json"), "--out", str(tmp_path), "--part-rows", str(PART_ROWS)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": address, "RAY_worker_niceness": "0"}
        pipe = subprocess.PIPE
        started.append(
            subprocess.Popen(
                [*command, *options], stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)


def wait_for_parts(out: Path, n: int, process: subprocess.Popen[str]) -> None:
    while len(list(out.glob("part-*.parquet"))) < n:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def processes_below(pid: int) -> dict[int, tuple[int, str]]:
    """Process -> its parent and its title, for all children of `pid`, and theirs, and so on."""
    everything: dict[int, tuple[int, str]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        everything[int(folder.name)] = (parent, title)
    below = {pid}
    while more := {child for child, (parent, _) in everything.items() if parent in below} - below:
        below |= more
    return {child: everything[child] for child in below - {pid}}


def workers_below(pid: int) -> list[int]:
    """Ray's workers that score, without the processes that they have forked to prepare pictures."""
    below = processes_below(pid)
    scoring = {child for child, (_, title) in below.items() if title.startswith("ray::work")}
    return [child for child in scoring if below[child][0] not in scoring]


def assert_same(one: Path, other: Path) -> None:
    assert read_scores(one).equals(read_scores(other))
    assert {path.name for path in one.glob("part-*")} == {path.name for path in other.glob("part-*")}
    assert not list(other.glob("*.tmp*"))


@pytest.mark.integration
def test_ray_gives_the_same_tables_and_the_same_words(start: Start, alone: Path, tmp_path: Path) -> None:
    process = start()
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert out.startswith("300 rows: ")
    assert out.splitlines()[1:] == [f"scores: {tmp_path}"]
    assert "300/300" in error
    assert "died" not in error
    assert_same(alone, tmp_path)
    modified = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("part-*"))]
    process = start()  # all is there: nothing is scored again
    assert process.communicate()[0] == out
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("part-*"))] == modified
    process = start("--seed", "1")
    assert "belongs to a run with another configuration" in process.communicate()[1]
    assert process.returncode == 1


@pytest.mark.integration
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_worker_that_is_killed_costs_a_part_and_changes_nothing(
    workers: str, start: Start, alone: Path, tmp_path: Path
) -> None:
    process = start("--workers", workers)
    wait_for_parts(tmp_path, 5, process)
    os.kill(workers_below(process.pid)[0], signal.SIGKILL)
    wait_for_parts(tmp_path, 15, process)
    os.kill(workers_below(process.pid)[0], signal.SIGKILL)
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert out.startswith("300 rows: ")
    assert "visgain: a worker died" in error
    assert "Traceback" not in error
    assert_same(alone, tmp_path)


@pytest.mark.integration
def test_ctrl_c_stops_the_workers_and_one_process_resumes(
    start: Start, alone: Path, world: Path, blank_model: Path, tmp_path: Path
) -> None:
    process = start()
    wait_for_parts(tmp_path, 5, process)
    workers = workers_below(process.pid)
    assert workers
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 1
    assert "visgain: interrupted; the same command resumes" in error
    assert "Traceback" not in error
    until = time.monotonic() + 30
    while [worker for worker in workers if Path(f"/proc/{worker}").exists()]:
        assert time.monotonic() < until, "a worker outlives the run"
        time.sleep(0.1)
    assert 5 <= len(list(tmp_path.glob("part-*.parquet"))) < 50
    run_score(ScoreConfig(model=str(blank_model), data=world / "data.json", out=tmp_path, part_rows=PART_ROWS))
    assert_same(alone, tmp_path)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_machines_come_and_go_while_a_plain_process_helps(
    start: Start, alone: Path, world: Path, blank_model: Path, tmp_path: Path
) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        # What Ray takes for GPUs here are none: the workers find no CUDA and compute on the CPU.
        first = cluster.add_node(num_cpus=2, num_gpus=1)
        process = start(address=cluster.address)
        wait_for_parts(tmp_path, 3, process)
        cluster.add_node(num_cpus=2, num_gpus=1)
        wait_for_parts(tmp_path, 6, process)
        cluster.remove_node(first, allow_graceful=False)
        command = [sys.executable, "-m", "visgain", "score", "--model", str(blank_model), "--out", str(tmp_path)]
        helper = subprocess.run(
            [*command, "--data", str(world / "data.json")], capture_output=True, text=True, check=False
        )
        out, error = process.communicate()
    finally:
        cluster.shutdown()
    assert process.returncode == helper.returncode == 0, error + helper.stderr
    assert out == helper.stdout
    assert "visgain: a worker died" in error
    assert_same(alone, tmp_path)


@pytest.mark.integration
def test_a_mistake_that_shows_in_a_worker_is_one_line(start: Start, tmp_path: Path) -> None:
    process = start("--image-root", "/no/such/folder")
    out, error = process.communicate()
    assert (process.returncode, out) == (1, "")
    assert error.startswith("visgain: on ")
    assert "image folder /no/such/folder does not exist" in error
    assert len(error.splitlines()) == 1
