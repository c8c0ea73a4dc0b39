"""Faults planted on purpose, each with a healthy twin that must stay silent."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import normalizers, processors
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tiny_models import CHATML
from tiny_run import conversation
from visgain.check import data_checks, label_checks
from visgain.check.findings import Finding, findings
from visgain.check.reading import Reading, pieces, read, sample_rows, supervised
from visgain.check.scan import RUN_ROWS, Scan, scan, spread
from visgain.data import open_dataset
from visgain.errors import VisgainError
from visgain.vlm.load import VLM, load_vlm
from visgain.vlm.template import make_encoder
from visgain.world.model import CHAT_TEMPLATE, IMAGE_SIDE

QWEN = CHATML.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")


def rows(n: int = 6) -> list[dict[str, Any]]:
    talks = ("<image>\nWhat is this?", "A red cup on a table.", "Is there a dog?", "No, there is a cup.")
    return [{"id": f"r{k}", "image": f"pics/{k}.png", "conversations": conversation(*talks)} for k in range(n)]


def write(folder: Path, records: list[dict[str, Any]], size: tuple[int, int] = (48, 30)) -> Path:
    """A LLaVA file of `records`, every picture of its own colours."""
    rng = np.random.default_rng(0)
    for number in range(len(records)):
        path = folder / f"pics/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)).save(path)
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def scanned(data: Path, image_root: Path | None = None, seconds: float = 5.0) -> Scan:
    dataset = open_dataset(data, image_root)
    return scan(dataset, len(dataset), seconds)


def found_in_data(data: Path, image_root: Path | None = None) -> dict[str, Finding]:
    return {one.check: one for one in findings(data_checks.CHECKS, scanned(data, image_root))}


def reading(vlm: VLM, data: Path, template: str = "auto", max_length: int | None = None) -> Reading:
    dataset = open_dataset(data)
    seen = scan(dataset, len(dataset))
    return read(vlm, dataset, seen, sample_rows(seen, 8), template, max_length)


def found(vlm: VLM, data: Path, template: str = "auto", max_length: int | None = None) -> dict[str, Finding]:
    """What the checks of template, labels and pictures find, or that there is no such template."""
    try:
        make_encoder(vlm, template, max_length)
    except VisgainError as error:
        return {"template": Finding(check="template", severity="error", what=str(error))}
    return {one.check: one for one in findings(label_checks.CHECKS, reading(vlm, data, template, max_length))}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("healthy"), rows())


@pytest.fixture
def vlm(blank_model: Path) -> VLM:
    """A model of one's own to plant faults in."""
    return load_vlm(str(blank_model))


def adding_bos(vlm: VLM, template: str = "<s> $A") -> None:
    """Let the tokenizer put BOS in front of every text, as Llama's does."""
    vlm.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", vlm.tokenizer.bos_token_id)]
    )


# ---------------------------------------------------------------- healthy


def test_a_healthy_model_and_dataset_give_no_finding_at_all(vlm: VLM, data: Path) -> None:
    assert found(vlm, data) == {}
    assert found_in_data(data) == {}


def test_every_family_that_is_healthy_stays_silent(family: VLM, data: Path) -> None:
    assert not {name for name, one in found(family, data).items() if one.severity == "error"}


# ---------------------------------------------------------------- another model's template


def test_a_template_whose_special_tokens_the_tokenizer_lacks_is_another_models(vlm: VLM, data: Path) -> None:
    vlm.processor.chat_template = CHATML
    finding = found(vlm, data)["foreign-template"]
    assert finding.severity == "error"
    assert "<|im_start|>" in finding.seen
    assert "<|im_end|>" in finding.seen
    assert "--template" in finding.mend


def test_the_same_template_is_right_where_its_tokens_are_known(llava_next: VLM, data: Path) -> None:
    assert llava_next.processor.chat_template == CHATML
    assert "foreign-template" not in found(llava_next, data)


def test_a_template_with_another_models_picture_does_not_pass(vlm: VLM, data: Path) -> None:
    vlm.processor.chat_template = QWEN
    names = found(vlm, data)
    assert "<|image_pad|>" in names["foreign-template"].seen
    # Processors of transformers 5.17 take a row whose pictures have no mark in the text.
    rows = names.get("skipped-rows") or names["no-image-tokens"]
    assert rows.severity == "error"
    assert "--template" in rows.mend


def test_rows_whose_pictures_have_no_token_in_the_text_are_an_error(vlm: VLM, data: Path) -> None:
    facts = reading(vlm, data)
    assert label_checks.no_image_tokens(facts) is None
    blind = []
    for one in facts.rows:
        assert one.whole is not None
        ids = np.where(facts.is_image(one.whole), vlm.tokenizer.pad_token_id, one.whole.input_ids)
        blind.append(replace(one, whole=replace(one.whole, input_ids=ids)))
    finding = label_checks.no_image_tokens(replace(facts, rows=[*facts.rows[:2], *blind[2:]]))
    assert finding is not None
    assert (finding.severity, finding.rows) == ("error", (2, 3, 4, 5))
    assert "<image>" in finding.seen


def test_the_models_own_template_is_remembered_where_the_command_line_names_another(
    llava_next: VLM, llava: VLM, data: Path
) -> None:
    assert "other-template" not in found(llava_next, data)
    assert "other-template" not in found(llava, data, "llava-1.5")
    tokenizer, chat = llava.processor.tokenizer, llava.processor.chat_template
    llava.processor.chat_template = CHATML
    known = tokenizer.get_vocab()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    try:
        finding = found(llava, data, "llava-1.5")["other-template"]
        assert "<|im_start|>" in finding.what
        assert "--template chat" in finding.mend
    finally:
        llava.processor.chat_template = chat
        assert len(known) < len(tokenizer.get_vocab())


def test_a_processor_that_raises_is_a_finding_and_no_crash(
    vlm: VLM, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise ZeroDivisionError("no pixels")

    assert "template-fails" not in found(vlm, data)
    monkeypatch.setattr(type(vlm.processor), "__call__", fails)
    finding = found(vlm, data)["template-fails"]
    assert finding.severity == "error"
    assert finding.rows == (0, 1, 2, 3, 4)
    assert finding.seen == "ZeroDivisionError: no pixels"


def test_an_end_that_nobody_supervises_is_told_with_what_helps(vlm: VLM, data: Path) -> None:
    vlm.processor.chat_template = CHAT_TEMPLATE.replace("{{ eos_token }}", " ")
    assert "--template llava-1.5" in found(vlm, data, "chat")["no-end-of-turn"].mend
    assert "no-end-of-turn" not in found(vlm, data, "llava-1.5")
    assert "no-end-of-turn" not in found(vlm, data, "llava-1.5-align")


def test_an_end_at_which_generation_does_not_stop_is_told(vlm: VLM, data: Path) -> None:
    vlm.processor.chat_template = CHAT_TEMPLATE.replace("{{ eos_token }}", "{{ pad_token }}")
    finding = found(vlm, data)["other-end-of-turn"]
    assert "'<pad>'" in finding.what
    assert "</s>" in finding.seen


# ---------------------------------------------------------------- BOS


@pytest.mark.parametrize(
    ("template", "tokenizer"),
    [
        (CHAT_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"), None),
        (CHAT_TEMPLATE.replace("{{ bos_token }}", "{{ '\\n' + bos_token }}"), "<s> $A"),
        (CHAT_TEMPLATE.replace("{{ bos_token }}", ""), "<s> <s> $A"),
    ],
)
def test_bos_twice_is_found_wherever_it_comes_from(template: str, tokenizer: str | None, vlm: VLM, data: Path) -> None:
    vlm.processor.chat_template = template
    if tokenizer is not None:
        adding_bos(vlm, tokenizer)
    finding = found(vlm, data)["doubled-bos"]
    assert finding.severity == "error"
    assert finding.seen.startswith("<s><s>")
    assert "all 6" in finding.what


@pytest.mark.parametrize(
    ("template", "adds"), [(CHAT_TEMPLATE.replace("{{ bos_token }}", ""), True), (CHAT_TEMPLATE, False)]
)
def test_one_bos_is_right_from_template_or_tokenizer(template: str, adds: bool, vlm: VLM, data: Path) -> None:
    vlm.processor.chat_template = template
    if adds:
        adding_bos(vlm)
    assert "doubled-bos" not in found(vlm, data)


def test_a_second_bos_that_visgain_leaves_out_is_told_for_other_trainers(vlm: VLM, data: Path) -> None:
    adding_bos(vlm)
    finding = found(vlm, data)["doubled-bos"]
    assert finding.severity == "warning"
    assert "add_special_tokens=False" in finding.mend


# ---------------------------------------------------------------- labels


def marked(start: str, end: str) -> str:
    """The embedded model's template with its generation marks elsewhere."""
    bare = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert start in bare
    assert end in bare
    return bare.replace(start, "{% generation %}" + start, 1).replace(end, end + "{% endgeneration %}", 1)


ENDS = "{{ eos_token }}"


@pytest.mark.parametrize(
    ("template", "label"),
    [
        (marked(" ASSISTANT:", ENDS), "' ASSISTANT: '"),
        (CHAT_TEMPLATE.replace(ENDS, ENDS + "Next comes USER:"), "'</s>Next comes USER:'"),
    ],
)
def test_labels_that_include_the_prompt_are_found(template: str, label: str, vlm: VLM, data: Path) -> None:
    vlm.processor.chat_template = template
    finding = found(vlm, data)["supervised-prompt"]
    assert finding.severity == "error"
    assert label in finding.seen
    assert "{% generation %}" in finding.mend


def test_labels_on_everything_are_found_whatever_the_encoder_says_of_them(vlm: VLM, data: Path) -> None:
    facts = reading(vlm, data)
    assert label_checks.supervised_prompt(facts) is None
    everything = []
    for one in facts.rows:
        assert one.whole is not None
        is_answer = ~facts.is_image(one.whole)
        n = int(is_answer.sum())
        whole = replace(one.whole, is_answer=is_answer, turn=np.zeros(n, np.int32), chars=np.zeros((n, 2), np.int32))
        everything.append(replace(one, runs=supervised(vlm.tokenizer, whole, one.sample.answers)))
    finding = label_checks.supervised_prompt(replace(facts, rows=everything))
    assert finding is not None
    assert finding.rows == (0, 1, 2, 3, 4)


def test_marks_around_answers_alone_are_right(vlm: VLM, data: Path) -> None:
    vlm.processor.chat_template = marked(
        " {% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{{ part['text'] }}",
        ENDS,
    )
    assert not {"supervised-prompt", "unsupervised-answer", "skipped-rows"} & set(found(vlm, data))


def test_an_answer_that_the_tokenizer_changes_is_found(vlm: VLM, data: Path) -> None:
    vlm.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("table", "shelf")
    finding = found(vlm, data)["unsupervised-answer"]
    assert finding.severity == "error"
    assert "shelf" in finding.seen
    vlm.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("chair", "stool")
    assert "unsupervised-answer" not in found(vlm, data)


def test_decoded_pieces_are_the_whole_conversation_in_order(family: VLM, data: Path) -> None:
    facts = reading(family, data)
    whole = facts.rows[0].whole
    assert whole is not None
    cut = [*pieces(facts.tokenizer, whole, facts.is_image(whole), cut=len(whole.input_ids) - 3)]
    assert sum(n for _, _, n in cut) == len(whole.input_ids)
    answers = "".join(text for kind, text, _ in cut if kind == "answer")
    assert "A red cup on a table." in answers
    assert "What is this?" not in answers
    assert "What is this?" in "".join(text for kind, text, _ in cut if kind == "prompt")
    assert sum(n for kind, _, n in cut if kind == "image") == whole.n_image_tokens


# ---------------------------------------------------------------- length


def test_an_image_that_the_limit_cuts_is_found_with_the_limit_that_fits(vlm: VLM, data: Path) -> None:
    whole = reading(vlm, data).rows[0].whole
    assert whole is not None
    where = np.flatnonzero(whole.input_ids == vlm.image_token_id)
    finding = found(vlm, data, max_length=int(where[-1]))["cut-image"]
    assert finding.severity == "error"
    assert f"the last at {where[-1] + 1}" in finding.seen
    assert f"--max-length {len(whole.input_ids)} fits" in finding.mend
    assert "cut-image" not in found(vlm, data, max_length=int(where[-1]) + 1)
    assert "no-labels" in found(vlm, data, max_length=int(where[-1]) + 1)
    assert found(vlm, data, max_length=len(whole.input_ids)) == {}


def test_answers_that_the_limit_cuts_are_counted(vlm: VLM, data: Path) -> None:
    whole = reading(vlm, data).rows[0].whole
    assert whole is not None
    finding = found(vlm, data, max_length=len(whole.input_ids) - 5)["cut-answers"]
    assert f"{5 * 6} of {6 * len(whole.turn)}" in finding.what
    assert finding.mend.startswith(f"--max-length {len(whole.input_ids)} ")


# ---------------------------------------------------------------- pictures


def cropping(vlm: VLM) -> None:
    """LLaVA's published processor: short side resized, the middle cut out, no do_pad."""
    vlm.processor.image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    )


def test_do_pad_forgotten_is_found_with_what_it_costs(vlm: VLM, data: Path) -> None:
    cropping(vlm)
    facts = reading(vlm, data)
    assert facts.probe.visible == 0.5
    finding = found(vlm, data)["cropped-pictures"]
    assert finding.severity == "warning"
    assert f"{100 * (1 - 30 / 48):.0f} %" in finding.what
    assert "--template llava-1.5" in finding.mend
    assert "do_pad" in finding.mend


def test_padded_square_and_squeezed_pictures_are_whole(vlm: VLM, data: Path, tmp_path: Path) -> None:
    assert reading(vlm, data).probe.visible == 1.0
    cropping(vlm)
    assert "cropped-pictures" not in found(vlm, data, "llava-1.5")
    assert "cropped-pictures" not in found(vlm, write(tmp_path, rows(), size=(40, 40)))
    assert (
        found(
            vlm,
            write(tmp_path, [{**row, "conversations": row["conversations"][:2]} for row in rows()]),
            "llava-1.5-align",
        )["cropped-pictures"].severity
        == "note"
    )


def test_pictures_that_are_damaged_inside_show_in_the_sample(vlm: VLM, tmp_path: Path) -> None:
    data = write(tmp_path, rows())
    whole = (tmp_path / "pics/3.png").read_bytes()
    (tmp_path / "pics/3.png").write_bytes(whole[: len(whole) // 2])
    finding = found(vlm, data)["skipped-rows"]
    assert finding.rows == (3,)
    assert "pics/3.png" in finding.seen


# ---------------------------------------------------------------- the dataset alone


def changed(change: Callable[[list[dict[str, Any]]], None], n: int = 6) -> list[dict[str, Any]]:
    records = rows(n)
    change(records)
    return records


def test_ids_that_collide_are_found_and_repeated_rows_are_something_else(tmp_path: Path) -> None:
    same = changed(lambda records: records[4].update(id="r1"))
    finding = found_in_data(write(tmp_path, same))["colliding-ids"]
    assert finding.rows == (1, 4)
    assert "'r1'" in finding.seen
    assert "by row" in finding.mend
    repeated = found_in_data(write(tmp_path, changed(lambda records: records.append(dict(records[2])))))
    assert "colliding-ids" not in repeated
    assert repeated["repeated-rows"].rows == (6,)


def test_a_number_and_a_text_that_read_the_same_collide(tmp_path: Path) -> None:
    same = changed(lambda records: (records[0].update(id=7), records[1].update(id="7")))
    assert found_in_data(write(tmp_path, same))["colliding-ids"].rows == (0, 1)


def test_pictures_that_are_elsewhere_are_found_with_the_root_that_works(tmp_path: Path) -> None:
    data = write(tmp_path / "set", rows())
    data = data.rename(tmp_path / "set/pics/data.json")
    wrong = found_in_data(data)["missing-pictures"]
    assert wrong.severity == "error"
    assert wrong.mend.endswith(f"--image-root {(tmp_path / 'set').resolve()}")
    assert "missing-pictures" not in found_in_data(data, tmp_path / "set")


def test_absolute_paths_are_told_the_folder_that_holds_them_all(tmp_path: Path) -> None:
    data = write(tmp_path / "set", rows())
    records = json.loads(data.read_text())
    for record in records:
        if record.get("image"):
            record["image"] = str(data.parent / record["image"])
    (tmp_path / "elsewhere").mkdir()
    data = tmp_path / "elsewhere/data.json"
    data.write_text(json.dumps(records))
    root = str(tmp_path / "set/pics")
    assert found_in_data(data)["missing-pictures"].mend.endswith(f"--image-root {root}")
    assert "missing-pictures" not in found_in_data(data, Path(root))


def test_no_root_is_suggested_for_paths_that_leave_every_root(tmp_path: Path) -> None:
    data = write(tmp_path / "set", rows())
    (tmp_path / "set/texts").mkdir()
    text = data.read_text().replace("pics/", "../pics/")
    data = tmp_path / "set/texts/data.json"
    data.write_text(text)
    for root in (None, tmp_path / "set"):
        assert "point --image-root at" in found_in_data(data, root)["missing-pictures"].mend


def test_names_that_no_file_can_have_and_links_in_a_circle_are_missing_pictures(tmp_path: Path) -> None:
    def odd(records: list[dict[str, Any]]) -> None:
        records[0]["image"], records[1]["image"], records[2]["image"] = "x" * 5000, "circle.png", "\ud800.png"

    data = write(tmp_path, changed(odd))
    (tmp_path / "circle.png").symlink_to("circle.png")
    (tmp_path / "pics/3.png").write_bytes(b"")
    assert found_in_data(data)["missing-pictures"].rows == (0, 1, 2, 3)


def test_a_few_missing_pictures_are_a_warning_with_their_rows(tmp_path: Path) -> None:
    data = write(tmp_path, rows())
    (tmp_path / "pics/2.png").unlink()
    finding = found_in_data(data)["missing-pictures"]
    assert (finding.severity, finding.rows) == ("warning", (2,))
    assert "1 of 6" in finding.what


def test_rows_that_cannot_be_used_are_told_by_reason(tmp_path: Path) -> None:
    def spoil(records: list[dict[str, Any]]) -> None:
        records[1]["conversations"] = []
        records[2]["conversations"] = []
        records[3]["conversations"][1]["value"] = records[3]["conversations"][3]["value"] = " "

    finding = found_in_data(write(tmp_path, changed(spoil)))["unusable-rows"]
    assert finding.severity == "error"
    assert "3 of 6" in finding.what
    assert "(2); every answer is empty (1)" in finding.seen
    assert finding.rows == (1, 3)


def test_an_empty_answer_among_others_is_told(tmp_path: Path) -> None:
    empty = changed(lambda records: records[5]["conversations"][3].update(value=""))
    assert found_in_data(write(tmp_path, empty))["empty-answers"].rows == (5,)


def test_a_dataset_without_pictures_has_nothing_to_score(tmp_path: Path) -> None:
    text = [{"id": "t", "conversations": conversation("Capital of France?", "Paris.")}] * 2
    assert found_in_data(write(tmp_path, text))["nothing-to-score"].severity == "error"
    some = found_in_data(write(tmp_path, changed(lambda records: records.extend(text))))
    assert "nothing-to-score" not in some
    assert "2 of 8" in some["text-only"].what


def test_pictures_that_come_again_are_counted_by_content(tmp_path: Path) -> None:
    data = write(tmp_path, rows())
    (tmp_path / "pics/1.png").write_bytes((tmp_path / "pics/0.png").read_bytes())
    finding = found_in_data(data)["same-pictures"]
    assert "6 rows are about 5 different pictures" in finding.what
    assert "1 picture probably" in finding.what


def test_the_documentation_names_every_check() -> None:
    source = Path(data_checks.__file__).parent
    known = set(re.findall(r'check="([a-z-]+)"', "".join(path.read_text() for path in source.glob("*_checks.py"))))
    table = (Path(__file__).parents[1] / "docs/check.md").read_text().partition("| stage |")[2].partition("\n\n")[0]
    told = {name for name in re.findall(r"`([a-z-]+)`", table) if not name.startswith("--")}
    assert told == known | {"model"}


# ---------------------------------------------------------------- which rows


@given(st.integers(1, 40 * RUN_ROWS))
@settings(max_examples=40, deadline=None)
def test_every_row_is_visited_once_and_any_beginning_is_spread_evenly(n: int) -> None:
    order = list(spread(n))
    assert sorted(order) == list(range(n))
    some = np.sort(order[: len(order) // 3])
    if len(some) >= 8 * RUN_ROWS:
        assert abs(some.mean() / n - 0.5) < 0.15
        assert np.diff(np.concatenate([[0], some, [n]])).max() <= 6 * RUN_ROWS


def test_a_look_that_is_out_of_time_says_how_much_it_saw(tmp_path: Path) -> None:
    text = [{"id": str(k), "conversations": conversation("Q?", "A.")} for k in range(3 * RUN_ROWS)]
    partial = scanned(write(tmp_path, text[:1]).with_name("data.json"), seconds=0)
    assert partial.complete
    (tmp_path / "long.json").write_text(json.dumps(text))
    partial = scanned(tmp_path / "long.json", seconds=0)
    assert RUN_ROWS <= partial.n_looked_at < len(text)
    assert partial.scale == len(text) / partial.n_looked_at
    told = {one.check for one in findings(data_checks.CHECKS, partial)}
    assert "partial-look" in told


def test_the_sample_has_every_source_and_number_of_pictures_and_the_longest_row(tmp_path: Path) -> None:
    records = rows(200)
    for number, record in enumerate(records):
        record["image"] = [f"{'abc'[number % 3 if number < 198 else 2]}/{number}.png"] * (1 + (number % 50 == 7))
        record["conversations"][0]["value"] = "What?"
    records[123]["conversations"][1]["value"] = "long " * 500
    (tmp_path / "data.json").write_text(json.dumps(records))
    seen = scanned(tmp_path / "data.json")
    chosen = sample_rows(seen, 24)
    outlines = {one.row: one for one in seen.rows}
    strata = {(one.source, len(one.images)) for one in seen.rows}
    assert {(outlines[row].source, len(outlines[row].images)) for row in chosen} == strata
    assert 123 in chosen
    assert 20 <= len(chosen) <= 32
    assert chosen == sample_rows(seen, 24) == sorted(chosen)
    gaps = np.diff([0, *chosen, 200])
    assert gaps.max() < 40
