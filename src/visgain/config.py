"""One frozen dataclass for each verb of the command line: a field is a flag, its docstring the help, its name the key.

Imports nothing heavy, so that `visgain --help` is instant. Nouns mean the same in every verb. Values are checked in
`__post_init__`, so that a YAML file, a flag and a Python caller meet the same rules and the same message.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from visgain.errors import ConfigError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_length(max_length: int | None) -> None:
    _require(max_length is None or max_length >= 8, f"--max-length is {max_length}; it must be at least 8 tokens")


def _require_training(device: str, flag: str, seeds: Iterable[int]) -> None:
    """A GPU by its number is nothing that Trainer takes, and other seeds numpy does not. `flag`: what says `seeds`."""
    _require(
        device in ("auto", "cpu", "cuda"),
        f"--device is {device!r}; training takes auto, cpu or cuda, the GPUs that it sees: choose among several by "
        "CUDA_VISIBLE_DEVICES",
    )
    for seed in seeds:
        _require(0 <= seed < 1 << 32, f"{flag} is {seed}; it must be from 0 to {(1 << 32) - 1:,}")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Where to read, what to measure, and how."""

    model: str
    """Model folder or hub name; `embedded` is the small model that ships with visgain."""
    data: Path
    """Dataset: a file, a folder, or a name on the hub."""
    out: Path
    """Folder for the scores; the same command resumes there."""
    image_root: Path | None = None
    """Folder that the dataset's image paths are relative to [default: the dataset's folder]."""
    columns: str | None = None
    """What the dataset's fields are called, as in messages=dialog,images=pictures [default: found by their names]."""
    format: str | None = None
    """Data format or layout of rows, by a name of `visgain list` [default: recognised]."""
    counterfactual: str = "blur"
    """What becomes of the real image: blur, mean, noise, shuffle, swap or none in its place, with options as in
    blur:sigma=0.2; drop leaves it out, and mask cuts the attention to it."""
    per_image: bool = False
    """Also replace each of several images on its own: gain per image, for n + 2 forward passes over n images, not 2."""
    projector: Path | None = None
    """Projector to put into the model, of the original LLaVA's pre-training stage: mm_projector.bin or .safetensors."""
    template: str = "auto"
    """Conversation template and image preparation: auto, chat or a profile, see `visgain list`; auto takes the
    processor's chat template if it can."""
    max_length: int | None = None
    """Longest sequence in tokens, image tokens included; longer samples are cut at the end and flagged
    [default: the profile's, else 2048]."""
    end_of_turn: Literal["score", "ignore"] = "score"
    """Whether each answer's end-of-turn token counts as an answer token."""
    seed: int = 0
    """Seed of counterfactuals that draw random numbers."""
    batch_tokens: int | None = None
    """Tokens in one forward pass, halved where memory runs out [default: 1024 on a CPU, 8192 on a GPU]."""
    way: Literal["auto", "shared", "mutual", "cached", "packed", "single"] = "auto"
    """How conversations are packed; auto takes the fastest that agrees with the model's own forward at the start."""
    backend: Literal["local", "ray"] = "local"
    """local: this process, beside any others in the same --out; ray: as many workers as a Ray cluster has room for."""
    workers: int | None = None
    """Processes that prepare pictures and text; 0 does it in between [default: up to 4 with a GPU, else
    1 if the model leaves it a core]."""
    part_rows: int = 512
    """Rows in one part: what an interruption can lose."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float8"] = "auto"
    """Precision of the model; auto is float32 on a CPU, on a GPU float16 with bfloat16 where numbers grow too large.
    Log-probabilities are float32 always. float8 is a rough draft; it says how rough at the end."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."""
    max_pixels: int = 100_000_000
    """Refuse to decode larger pictures (decompression bombs)."""
    follow_links: bool = False
    """Allow symbolic links in the image folder to lead out of it."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    limit: int | None = None
    """Only the first rows of the dataset."""

    def __post_init__(self) -> None:
        _require_length(self.max_length)
        _require(
            self.batch_tokens is None or self.batch_tokens >= 1,
            f"--batch-tokens is {self.batch_tokens}; it must be positive",
        )
        _require(self.workers is None or self.workers >= 0, f"--workers is {self.workers}; it must not be negative")
        _require(self.part_rows >= 1, f"--part-rows is {self.part_rows}; it must be positive")
        _require(self.max_pixels >= 1, f"--max-pixels is {self.max_pixels}; it must be positive")
        _require(self.limit is None or self.limit >= 1, f"--limit is {self.limit}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class CheckConfig(ScoreConfig):
    """The options of `score`, and how much to look at and show."""

    out: Path = Path("scores")
    """Where the scores would go: is there room?"""
    sample: int = 64
    """Rows to read as the model would, spread over the whole dataset."""
    show: int = 2
    """Conversations to show in full, labels marked."""
    json: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None
    """File for the findings and the numbers behind them; - prints them in place of everything else."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.sample >= 1, f"--sample is {self.sample}; it must be positive")
        _require(self.show >= 0, f"--show is {self.show}; it must not be negative")


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Which samples and tokens to train on."""

    scores: Path
    """Folder that `visgain score` wrote."""
    out: Path
    """Folder for the selection."""
    keep: float = 70.0
    """Percent of the multimodal samples to keep, above 0 and up to 100."""
    by: str = "sample+token"
    """The rule: sample+token (the paper's), sample, token, random, or column:NAME."""
    keep_tokens: float | None = None
    """Percent of the kept samples' answer tokens to keep, by a threshold of their own [default: one tau for both]."""
    table: Path | None = None
    """For column:NAME, a parquet, csv or jsonl file with the columns row and NAME, or the table that was scored
    [default: a column of the scores]."""
    end_of_turn: Literal["select", "keep", "drop"] = "select"
    """Treat end-of-turn tokens like any other, or always keep or always drop them."""
    weights: str = "hard"
    """How much kept tokens weigh: hard (1 each), or clamp:low=1,high=5,window=3 (the gain clamped, then averaged)."""
    skipped: Literal["drop", "error"] = "drop"
    """Rows that could not be scored: leave them out and report them, or refuse."""
    seed: int = 0
    """Seed of the random rule."""

    def __post_init__(self) -> None:
        _require(0 < self.keep <= 100, f"--keep is {self.keep}; it must be above 0 and at most 100 percent")
        if self.keep_tokens is not None:
            _require(
                0 < self.keep_tokens <= 100, f"--keep-tokens is {self.keep_tokens}; it must be above 0 to 100 percent"
            )
        known = ("sample+token", "sample", "token", "random")
        _require(
            self.by in known or (self.by.startswith("column:") and len(self.by) > len("column:")),
            f"--by is {self.by!r}; it must be one of {', '.join(known)} or column:NAME",
        )
        _require(
            self.keep_tokens is None or self.by in ("sample+token", "token"),
            f"--keep-tokens does not go with --by {self.by}, which sets no threshold on tokens; use --by sample+token",
        )
        _require(
            self.table is None or self.by.startswith("column:"),
            f"--table does not go with --by {self.by}; use --by column:NAME",
        )
        _require(self.seed >= 0, f"--seed is {self.seed}; it must not be negative")


@dataclass(frozen=True, kw_only=True)
class AssembleConfig:
    """Which parts to join to a vision-language model, and how it looks at pictures."""

    vision: str
    """Folder or hub name of a vision tower, of a whole CLIP or SigLIP, or of a vision-language model that has one."""
    language: str
    """Folder or hub name of a causal language model, or of a vision-language model that has one."""
    out: Path
    """Folder for the model, which must not exist."""
    vision_feature_layer: int = -2
    """Hidden state of the tower that is looked at, -1 being the last; LLaVA takes the one before."""
    vision_feature_select: Literal["auto", "default", "full"] = "auto"
    """default leaves the class token out, full keeps all; auto leaves it out where there is one."""
    image_size: int | None = None
    """Side of the square that pictures become, in pixels; positions are stretched to it [default: the tower's]."""
    pictures: Literal["pad", "crop", "squash"] = "pad"
    """How a picture becomes a square: padded as in LLaVA's tuning, its centre, or out of shape as Open-Qwen2VL's."""
    template: Literal["auto", "llava-1.5"] = "auto"
    """Chat template: auto takes the language model's own, and LLaVA-1.5's where it has none."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the saved weights; auto is that of the parts, and where they differ one that holds both."""
    seed: int = 0
    """Seed of the projector's random weights."""

    def __post_init__(self) -> None:
        _require(
            self.image_size is None or self.image_size >= 1, f"--image-size is {self.image_size}; it must be positive"
        )
        _require(self.seed >= 0, f"--seed is {self.seed}; it must not be negative")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, and how. Values left out come from the recipe."""

    model: str
    """Model folder or hub name to start from."""
    data: Path
    """The dataset that was scored."""
    out: Path
    """Folder for checkpoints and the trained model; the same command resumes there."""
    selection: Path | None = None
    """Folder that `visgain select` wrote; without it every answer token carries loss."""
    refresh_every: int | None = None
    """Select anew while training: before every so many steps the rows to come are scored with the model as it is then,
    and the rule of --selection chooses among them."""
    image_root: Path | None = None
    """Folder that the dataset's image paths are relative to [default: the dataset's folder]."""
    columns: str | None = None
    """What the dataset's fields are called, as in messages=dialog,images=pictures [default: as scored, or found]."""
    format: str | None = None
    """Data format or layout of rows, by a name of `visgain list` [default: as scored, or recognised]."""
    recipe: str = "tune"
    """Name of a recipe that ships with visgain, or a YAML file."""
    parts: Annotated[
        tuple[Literal["vision", "projector", "language"], ...] | None, Parameter(consume_multiple=(1, None))
    ] = None
    """Parts of the model to train, as in --parts vision projector; the others are frozen."""
    lora_rank: int | None = None
    """Train low-rank adapters of this rank on the language part instead of its weights; alpha stays in the recipe's
    ratio to it, else is twice the rank."""
    epochs: float | None = None
    """Passes over the selected rows."""
    max_steps: int | None = None
    """Optimiser steps; overrides the epochs, so that arms of different size can train equally long."""
    learning_rate: float | None = None
    """Peak learning rate; parts that the recipe gives one of their own keep that."""
    batch_size: int | None = None
    """Rows in one optimiser step, on all devices together."""
    micro_batch: int | None = None
    """Rows that --loss-reduction micro-batch averages over, and rows of a forward pass where nothing is packed."""
    packing: Literal["auto", "on", "off"] | None = None
    """Conversations side by side without padding: auto does so where the model gives the same loss for them."""
    pack_tokens: int | None = None
    """Tokens in one forward pass on one device [default: 1024 on a CPU, 8192 on a GPU]."""
    loss_reduction: Literal["global", "micro-batch"] | None = None
    """Mean over the active tokens of the whole optimiser step, or of each micro-batch and then over those."""
    projector: Path | None = None
    """Projector to put into the model, of the original LLaVA's pre-training stage: mm_projector.bin or .safetensors."""
    template: str | None = None
    """Conversation template and image preparation; must be the one that was scored with [default: the recipe's]."""
    max_length: int | None = None
    """Longest sequence in tokens, image tokens included [default: the recipe's, else the template's]."""
    save_steps: int | None = None
    """Optimiser steps between checkpoints to resume from."""
    seed: int = 0
    """Seed of the data order and of everything drawn."""
    gradient_checkpointing: bool | None = None
    """Compute activations a second time in the backward pass instead of keeping them: less memory, more time."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the forward pass and of the saved model; what is trained, and its optimiser, are float32."""
    parallel: str = "ddp"
    """How processes share the model: ddp (each has it whole), fsdp, zero2, zero3, or a file of their settings."""
    device: str = "auto"
    """cpu, cuda (a GPU for each process), or auto, which takes GPUs if there are any."""
    report_to: Annotated[tuple[str, ...], Parameter(consume_multiple=(1, None))] = ()
    """Experiment trackers of the Hugging Face Trainer, e.g. tensorboard."""
    max_pixels: int = 100_000_000
    """Refuse to decode larger pictures (decompression bombs)."""
    follow_links: bool = False
    """Allow symbolic links in the image folder to lead out of it."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    def __post_init__(self) -> None:
        _require_length(self.max_length)
        counts = ("lora_rank", "max_steps", "batch_size", "micro_batch", "pack_tokens", "save_steps", "refresh_every")
        for name in counts:
            value = getattr(self, name)
            _require(value is None or value >= 1, f"--{name.replace('_', '-')} is {value}; it must be positive")
        _require(
            self.epochs is None or 0 < self.epochs < math.inf,
            f"--epochs is {self.epochs}; it must be a finite number above 0",
        )
        _require(
            self.learning_rate is None or 0 <= self.learning_rate < math.inf,
            f"--learning-rate is {self.learning_rate}; it must be a finite number from 0 on",
        )
        _require_training(self.device, "--seed", [self.seed])


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which selection, of what data, for which trainer."""

    selection: Path
    """Folder that `visgain select` wrote."""
    data: Path
    """The dataset that was scored."""
    to: str
    """The trainer or format, see `visgain list`; with options as in finevision:levels=10."""
    out: Path
    """Folder for the files; a former export there is replaced."""
    image_root: Path | None = None
    """Folder that the dataset's image paths are relative to [default: the dataset's folder]."""
    columns: str | None = None
    """What the dataset's fields are called, as in messages=dialog,images=pictures [default: as scored, or found]."""
    format: str | None = None
    """Data format or layout of rows, by a name of `visgain list` [default: as scored, or recognised]."""
    scores: Path | None = None
    """Folder that `visgain score` wrote, for exporters that write numbers and not only what is kept."""
    max_pixels: int = 100_000_000
    """Refuse to decode larger pictures (decompression bombs)."""
    follow_links: bool = False
    """Allow symbolic links in the image folder to lead out of it."""

    def __post_init__(self) -> None:
        _require(bool(self.to.strip()), "--to names no trainer; `visgain list` shows them")


STAGES = ("generate", "judge", "score")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Which benchmarks, on what data, of which model or answers."""

    benchmarks: str
    """Names with commas between them, e.g. pope,chair; `visgain list` shows them."""
    data: Path
    """A benchmark's official file or folder; with several benchmarks, a folder that holds one named like each."""
    out: Path
    """Folder with a folder for each benchmark; the same command resumes there."""
    model: str | None = None
    """Model folder or hub name to ask; not needed where answers exist."""
    answers: Path | None = None
    """Score these answers (JSON lines: split, id, prediction; or the benchmark's own format) and ask no model."""
    image_root: Path | None = None
    """Folder that image names are relative to [default: the data's folder]."""
    stages: str = "generate,judge,score"
    """What to do, with commas between; each stage begins with the files that the one before left."""
    variant: str = ""
    """Parser or protocol variant: a name for one benchmark, or pope=opera,chair=wordnet [default: the official]."""
    decoding: str = "greedy"
    """How tokens are chosen, with options as in vcd:alpha=1,beta=0.1; `visgain list` shows the names."""
    max_new_tokens: int | None = None
    """Longest answer in tokens [default: the benchmark's]."""
    batch_size: int = 16
    """Prompts answered side by side, halved where memory runs out."""
    template: str = "auto"
    """Conversation template and image preparation."""
    max_length: int | None = None
    """Longest prompt in tokens, image tokens included [default: the template's]."""
    judge: str | None = None
    """Grade with MODEL@URL, an OpenAI-compatible endpoint (its key in OPENAI_API_KEY), or with recorded reviews."""
    judge_prompt: Path | None = None
    """The official wording of the judge's question in place of ours."""
    judge_runs: int = 1
    """How often the judge grades every answer; published tables often average several runs."""
    judge_concurrency: int = 8
    """Requests to the judge at the same time."""
    judge_per_minute: float | None = None
    """Most requests to the judge in a minute."""
    judge_price: str = ""
    """US dollars for a million tokens in and out, as 2.5,10, for the estimate before it starts."""
    export: str = ""
    """Also write the answers for other scorers, with commas between: llava, vlmevalkit, rrc."""
    force: bool = False
    """Print a score even if more than 2 % of the judge's replies cannot be read."""
    limit: int | None = None
    """Ask only the first questions of each benchmark; the result says so."""
    seed: int = 0
    """Seed of decoding that draws."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    def __post_init__(self) -> None:
        _require(bool(self.names), "--benchmarks names none")
        for stage in self.stages.split(","):
            _require(stage in STAGES, f"--stages holds {stage!r}; the stages are {', '.join(STAGES)}")
        _require(
            self.answers is None or len(self.names) == 1,
            f"--answers goes with one benchmark, and --benchmarks names {len(self.names)}",
        )
        _require(
            self.answers is None or self.model is None, "--answers and --model are two sources of answers; give one"
        )
        _require(
            set(self.variants) <= {"", *self.names} and ("" not in self.variants or len(self.names) == 1),
            f"--variant is {self.variant!r}; say BENCHMARK=VARIANT for benchmarks of --benchmarks",
        )
        for name in ("max_new_tokens", "batch_size", "max_length", "limit"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"--{name.replace('_', '-')} is {value}; it must be positive")

    @property
    def names(self) -> list[str]:
        """The benchmarks, each once."""
        return list(dict.fromkeys(name for part in self.benchmarks.split(",") if (name := part.strip())))

    @property
    def exports(self) -> list[str]:
        return [name for part in self.export.split(",") if (name := part.strip())]

    @property
    def variants(self) -> dict[str, str]:
        """Benchmark -> variant; the key is empty where only a variant was said."""
        said = (part.strip().rpartition("=") for part in self.variant.split(",") if part.strip())
        return {name: variant for name, _, variant in said}


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig:
    """What to look into: scores that exist, or a model on a dataset or on benchmarks."""

    out: Path
    """Folder for the tables (JSON) and figures (SVG)."""
    scores: Path | None = None
    """Folder that `visgain score` wrote: gain by source, by class of word, by position."""
    model: str | None = None
    """Model folder or hub name: how much it attends to the picture in --data, or what --benchmarks need of it."""
    data: Path | None = None
    """The dataset to look at; with --benchmarks, their data as for `eval`; with --scores, the dataset if it moved."""
    image_root: Path | None = None
    """Folder that image paths are relative to [default: the data's folder]."""
    benchmarks: str = ""
    """Score the questions and right answers of these benchmarks, with commas between: does one need to look?"""
    part_of_speech: str | None = None
    """Classes of words by this spaCy pipeline, e.g. en_core_web_sm [default: lists of words]."""
    rows: int = 200
    """Rows that attention is measured on, spread evenly over the dataset."""
    counterfactual: str = "blur"
    """With --benchmarks: what becomes of the real image."""
    template: str = "auto"
    """Conversation template and image preparation; `visgain list` shows the names."""
    max_length: int | None = None
    """Longest sequence in tokens, image tokens included [default: the template's]."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    def __post_init__(self) -> None:
        _require(
            (self.scores is None) != (self.model is None),
            "give either --scores, to look into what was measured, or --model with --data, to measure",
        )
        _require(self.model is None or self.data is not None, "--model needs --data, what to measure it on")
        _require(not self.benchmarks or self.model is not None, "--benchmarks needs --model")
        _require(self.rows >= 1, f"--rows is {self.rows}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What to show in one self-contained HTML file."""

    scores: Path
    """Folder that `visgain score` wrote."""
    out: Path = Path("report.html")
    """The HTML file."""
    selection: Path | None = None
    """Folder that `visgain select` wrote, to show what was kept."""
    data: Path | None = None
    """The dataset, if it moved since it was scored."""
    image_root: Path | None = None
    """The image folder, if it moved since the dataset was scored."""
    truth: Path | None = None
    """Ground truth of the embedded world (truth.jsonl), for the ROC curve [default: beside the dataset]."""
    evals: Path | None = None
    """Folder that `visgain eval` wrote, to show its results."""
    analyses: Path | None = None
    """Folder that `visgain analyze` wrote, to show its tables."""
    results: Path | None = None
    """demo.json of a demo run, to show its table of arms."""
    ablation: Path | None = None
    """Folder that `visgain ablate` wrote, to show its tables and figure."""
    samples: int = 24
    """Samples to show with their pictures."""

    def __post_init__(self) -> None:
        _require(self.samples >= 0, f"--samples is {self.samples}; it must not be negative")


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Where the scores are."""

    scores: Path
    """Folder that `visgain score` wrote."""
    data: Path | None = None
    """The dataset, if it moved since it was scored."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Size of the demonstration on the embedded world."""

    out: Path = Path("visgain-demo")
    """Folder for everything the demo makes."""
    seed: int = 0
    """Seed of the world and of the training."""
    rows: int = 2000
    """Training conversations."""
    test_rows: int = 400
    """Questions of the bias-breaking test."""
    steps: int = 150
    """Optimiser steps of each arm."""

    def __post_init__(self) -> None:
        for name in ("rows", "test_rows", "steps"):
            value = getattr(self, name)
            _require(value >= 8, f"--{name.replace('_', '-')} is {value}; it must be at least 8")


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """Which arms to compare, on what, and how long each is trained."""

    out: Path
    """Folder for everything; the same command resumes there, and may name more arms and seeds."""
    arms: str = ""
    """Arms with commas between them, as in vanilla,random@70,vig@30,vig@70; `visgain list` shows the kinds [default: a
    grid of all kinds]."""
    seeds: str = "0,1,2"
    """Seeds with commas between them; each draws its own data or held-out rows and its own order of training."""
    equal: Literal["steps", "epochs"] = "steps"
    """What all arms have alike: optimiser steps, or passes over their own rows."""
    steps: int | None = None
    """With --equal steps: optimiser steps of each arm [default: 150 on the embedded world, else what the recipe takes
    for all rows]."""
    model: str = "embedded"
    """Model folder or hub name that every arm starts from, and that scores."""
    recipe: str | None = None
    """Name of a recipe that ships with visgain, or a YAML file [default: embedded-tune on the embedded world, else
    tune]."""
    counterfactual: str = "blur"
    """What replaces the real image, save in arms that say otherwise, and in the measure of held-out rows."""
    rows: int = 2000
    """Training conversations to draw of the embedded world, for each seed."""
    test_rows: int | None = None
    """Questions that test [default: 1000 on the embedded world; of --data a tenth, at most 1000]."""
    data: Path | None = None
    """Your dataset [default: the embedded world]."""
    image_root: Path | None = None
    """Folder that the image paths of --data and --eval-data are relative to [default: the folder of either]."""
    eval_data: Path | None = None
    """Dataset to test on [default: rows held out of --data by seed]."""
    benchmarks: str = ""
    """Also ask every model the questions of these benchmarks, with commas between; such as need no judge."""
    benchmark_data: Path | None = None
    """The benchmarks' official files, as --data of `visgain eval`."""
    columns: str | None = None
    """What the dataset's fields are called, as in messages=dialog,images=pictures [default: found by their names]."""
    format: str | None = None
    """Data format or layout of rows, by a name of `visgain list` [default: recognised]."""
    template: str | None = None
    """Conversation template and image preparation [default: the recipe's]."""
    max_length: int | None = None
    """Longest sequence in tokens, image tokens included [default: the recipe's, else the template's]."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the forward pass in training [default: the recipe's]."""
    device: str = "auto"
    """cpu, cuda, or auto, which takes a GPU if there is one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    keep_models: bool = False
    """Keep every arm's trained model; else it is deleted when it was tested."""

    def __post_init__(self) -> None:
        _require_length(self.max_length)
        for name in ("steps", "rows", "test_rows"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"--{name.replace('_', '-')} is {value}; it must be positive")
        _require(self.steps is None or self.equal == "steps", "--steps does not go with --equal epochs; leave one out")
        _require(
            self.data is not None or (self.eval_data is None and self.image_root is None),
            "--eval-data and --image-root go with --data",
        )
        _require(
            bool(self.benchmarks) == (self.benchmark_data is not None),
            "--benchmarks and --benchmark-data go together",
        )
        _require(len(set(self.seed_list)) == len(self.seed_list), f"--seeds names a seed twice: {self.seeds}")
        _require_training(self.device, "one of --seeds", self.seed_list)

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds as numbers."""
        names = [name for part in self.seeds.split(",") if (name := part.strip())]
        _require(
            bool(names) and all(name.isascii() and name.isdecimal() for name in names),
            f"--seeds is {self.seeds!r}; it must be whole numbers from 0 on with commas between them, as in 0,1,2",
        )
        return tuple(map(int, names))


SplitName = Literal[
    "train", "test", "easy", "align", "notes", "ask", "questions", "relate", "far", "everything", "count"
]
"""What the embedded world can draw."""


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """What to draw."""

    out: Path
    """Folder for data.json, truth.jsonl and images/."""
    split: SplitName = "train"
    """train: follows the priors; test: breaks them; the others: no priors, for the embedded model."""
    rows: int = 2000
    """Conversations to draw."""
    bias: float | None = None
    """Language bias from 1 (priors always hold) over 0 (independent) to -1 (always broken) [default: the split's]."""
    seed: int = 0
    """Seed of pictures and texts."""

    def __post_init__(self) -> None:
        _require(self.rows >= 1, f"--rows is {self.rows}; it must be positive")
        _require(self.bias is None or -1 <= self.bias <= 1, f"--bias is {self.bias}; it must lie between -1 and 1")
