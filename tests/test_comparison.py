"""Evaluated runs in, one report out: what is refused, what is said, and what stands beside the verdict."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runs import answers, flipped, make_run, receipt, write_results

from qlora_recipes.commands.compare import main
from qlora_recipes.comparison.build import choose_baseline
from qlora_recipes.comparison.findings import Report
from qlora_recipes.comparison.folders import compare_folders
from qlora_recipes.comparison.receipts import receipt_differences
from qlora_recipes.errors import ComparisonError, RecipesError, RunFolderError
from qlora_recipes.evaluation.records import (
    Divergence,
    LayerError,
    read_divergence,
    read_quantization_error,
    write_divergence,
    write_quantization_error,
)
from qlora_recipes.run.differences import MISSING, differences
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import QuantizedReceipt, Resume, SpreadReceipt

N = 800
SCORES = answers(N)


def pair(root: Path, lost: int = 4, won: int = 4, **options: Any) -> list[Path]:
    """An nf4 run and its bf16 baseline; `options` go to the nf4 run."""
    return [
        make_run(root, "nf4", scores=flipped(SCORES, lost, won), **options),
        make_run(root, "bf16", scores=SCORES),
    ]


def ladder(root: Path, seeds: int = 2) -> list[Path]:
    """Three precisions, with controls, divergence and quantization error beside the first seeds."""
    folders = []
    for precision, lost in (("bf16", 0), ("nf4", 6), ("fp4", 60)):
        for seed in range(seeds):
            of_seed = flipped(SCORES, 3 * seed, 2 * seed)
            folders.append(make_run(root, precision, seed, flipped(of_seed, lost, lost // 2)))
        write_results(
            root / f"{precision}-seed0" / "evaluation" / "base",
            receipt(precision, 0),
            answers(N, wrong=0.6),
            adapter=False,
        )
    for precision in ("nf4", "fp4"):
        for seed in range(seeds):
            cross_base = replace(receipt("bf16", seed), precision=precision, base=receipt(precision, seed).base)
            folder = root / f"bf16-seed{seed}" / "evaluation" / f"on-{precision}"
            write_results(folder, cross_base, flipped(SCORES, 3, 2))
    return folders


# Refusals


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"recipe": "falcon_faq-demo"}, "recipe: .*falcon_faq-demo"),
        ({"dtype": "float16"}, "dtype: float16 and bfloat16"),
        ({"data__fingerprint": "f2"}, "data.fingerprint: f2 and f1"),
        ({"settings__training": {"learning_rate": 1e-4, "seed": 0}}, r"settings\.training\.learning_rate: 0.0001"),
        ({"settings__lora": {"r": 16, "lora_alpha": 16}}, r"settings\.lora\.r: 16 and 8"),
        ({"template__sha256": "other"}, "template.sha256: other and template"),
        ({"versions": {"trl": "1.17.0", "torch": "2.13.0"}}, "versions.trl: 1.17.0 and 1.16.0"),
        ({"adapter__initial_sha256": "drawn again"}, "adapter.initial_sha256"),
        ({"adapter__dtype": "bfloat16"}, "adapter.dtype"),
        ({"training__tokens": 1}, "training.tokens: 1 and 15336"),
        ({"training__attention": "eager"}, "training.attention"),
        ({"training__device": "cuda"}, "training.device"),
        ({"spread__wrapper": "FSDP2"}, "spread.wrapper"),
        ({"base__model": "another"}, "base.model: another and standin-llama2"),
    ],
)
def test_receipts_that_differ_in_more_than_precision_are_refused(
    tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    runs = pair(tmp_path, receipt=change)
    with pytest.raises(ComparisonError, match=rf"differ in more than precision:\n(.*\n)*?.*{key}"):
        compare_folders(runs, 1.0)


def on_four_gpus(rows: int) -> dict[str, Any]:
    """What the receipt says of a run on two nodes of two GPUs; 2 rows each make a step like that of one process."""
    dtypes = {"autocast": "bf16", "output_dtype": "float32"}
    return {
        "settings__training": {"learning_rate": 3e-3, "seed": 0, "per_device_train_batch_size": rows},
        "training__processes": 4,
        "spread": SpreadReceipt(4, 2, "FSDP2", "FULL_SHARD", dtypes, [2**30] * 4),
    }


def test_arms_that_were_spread_otherwise_are_compared_only_when_told(tmp_path: Path) -> None:
    runs = pair(tmp_path, receipt=on_four_gpus(rows=2) | {"resumes": [Resume("2026", 3, processes_changed="2 -> 4")]})
    with pytest.raises(ComparisonError, match=r"spread\.sharding(.*\n)*.*or give --other_spread"):
        compare_folders(runs, 1.0)
    report = compare_folders(runs, 1.0, other_spread=True)
    facts = {fact.name: fact for fact in report.validity}
    assert facts["processes"].verdict == "warn"
    for part in ("nf4: 4 processes on 2 nodes, FSDP2, FULL_SHARD, autocast bf16", "bf16: 1 process, ", "2 -> 4"):
        assert part in facts["processes"].figure
    assert "spread.wrapper" not in facts["receipts"].figure


def test_arms_with_other_rows_in_a_step_are_never_compared(tmp_path: Path) -> None:
    runs = pair(tmp_path, receipt=on_four_gpus(rows=4))
    with pytest.raises(ComparisonError, match=r"per_device_train_batch_size: 4 and (.*\n)*.*other's settings$"):
        compare_folders(runs, 1.0, other_spread=True)


def test_receipts_may_differ_in_timings_paths_and_storage() -> None:
    other = receipt("nf4", 0, training__seconds=1.0, command=["elsewhere"], started="later", git={"commit": "c"})
    assert list(receipt_differences(receipt("bf16", 0), other)) == []


def test_differences_are_leaves_of_nested_records() -> None:
    one, other = QuantizedReceipt(28, 28), QuantizedReceipt(28, 27)
    assert list(differences(one, other, "base.quantized")) == [("base.quantized.found", 28, 27)]
    one, other = {"a": {"b": 1, "c": None}, "d": None}, {"a": {"b": 1.5}, "d": {"e": 1}}
    assert list(differences(one, other)) == [("a.b", 1, 1.5), ("a.c", None, MISSING), ("d", None, {"e": 1})]


def test_every_key_that_differs_is_named(tmp_path: Path) -> None:
    runs = pair(tmp_path, receipt={"data__fingerprint": "f2", "dtype": "float16"})
    with pytest.raises(ComparisonError) as refusal:
        compare_folders(runs, 1.0)
    assert "data.fingerprint" in str(refusal.value) and "dtype" in str(refusal.value)


def test_other_seeds_are_refused(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "nf4", 1, SCORES), make_run(tmp_path, "bf16", 0, SCORES)]
    with pytest.raises(ComparisonError, match=r"seeds \[1\] of nf4 and \[0\] of bf16"):
        compare_folders(runs, 1.0)


def test_one_precision_twice_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, "nf4", 0, SCORES)
    with pytest.raises(ComparisonError, match="both nf4 with seed 0"):
        compare_folders([run, run], 1.0)
    with pytest.raises(ComparisonError, match="runs of nf4 alone"):
        compare_folders([run], 1.0)


def test_a_run_that_is_not_finished_or_not_evaluated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no finished run"):
        compare_folders([tmp_path / "nowhere"], 1.0)
    run = make_run(tmp_path, "nf4")
    with pytest.raises(ComparisonError, match=r"nf4-seed0 is not evaluated: .* qlora-recipes evaluate"):
        compare_folders([run], 1.0)
    (run / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ComparisonError, match="has a receipt and no adapter"):
        compare_folders([run], 1.0)


def test_scores_of_other_weights_are_refused(tmp_path: Path) -> None:
    runs = pair(tmp_path, adapter_sha256="another adapter's")
    with pytest.raises(ComparisonError, match="scored with the adapter another adap"):
        compare_folders(runs, 1.0)
    write_results(runs[0] / "evaluation", receipt("nf4", 0), SCORES, base_sha256="another base's")
    with pytest.raises(ComparisonError, match="scored with the base another base"):
        compare_folders(runs, 1.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"task": "standin_chioce"},
            "only one of them has standin_chioce, standin_choice",
        ),
        ({"num_fewshot": 5}, "num_fewshot 5 in .*nf4-seed0.* and 0 in"),
        ({"limit": 50}, "limit 50"),
        ({"batch_size": 8}, "batch_size 8"),
        ({"loglikelihood_dtype": "bfloat16"}, "loglikelihood_dtype 'bfloat16'"),
        ({"decoding": "temperature 0.7, top_p 0.9, seed 1"}, "decoding 'temperature 0.7, top_p 0.9, seed 1' in"),
        ({"config_sha256": "other choices"}, "config_sha256 'other choices' in"),
        ({"change": lambda d: replace(d, prompt_hash="other")}, "differ in prompt_hash alone"),
    ],
)
def test_other_measurements_are_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    runs = pair(tmp_path, text=False, **options)
    write_results(runs[1] / "evaluation", receipt("bf16", 0), SCORES, text=False)
    (runs[1] / "evaluation" / "standin_text.docs.jsonl").unlink()
    with pytest.raises(ComparisonError, match=said):
        compare_folders(runs, 1.0)


def test_an_unknown_task_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match=r"'standin_chioce'.*Did you mean 'standin_choice'\?"):
        compare_folders(pair(tmp_path), 1.0, tasks=["standin_chioce"])


def test_too_few_documents_are_refused(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, p, scores=SCORES[:12]) for p in ("nf4", "bf16")]
    with pytest.raises(ComparisonError, match="12 documents, too few to say anything; expected at least 20"):
        compare_folders(runs, 1.0)


def test_nothing_to_give_a_verdict_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match="standin_text have no score between 0 and 1"):
        compare_folders(pair(tmp_path), 1.0, tasks=["standin_text"])


def test_nan_scores_are_refused(tmp_path: Path) -> None:
    runs = pair(tmp_path)
    file = runs[0] / "evaluation" / "standin_choice.docs.jsonl"
    lines = file.read_text().splitlines()
    lines[3] = json.dumps({**json.loads(lines[3]), "score": float("nan")})
    text = "\n".join(lines) + "\n"
    file.write_text(text)
    from qlora_recipes.evaluation.records import sha256

    result = runs[0] / "evaluation" / "standin_choice.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), "docs_sha256": sha256(text)}))
    with pytest.raises(RunFolderError, match=r"docs\.jsonl, line 4, key score: got nan, expected a finite number"):
        compare_folders(runs, 1.0)


def test_half_written_scores_are_refused(tmp_path: Path) -> None:
    runs = pair(tmp_path)
    file = runs[0] / "evaluation" / "standin_choice.docs.jsonl"
    file.write_text(file.read_text()[:-40])
    with pytest.raises(RunFolderError, match="Evaluate standin_choice again"):
        compare_folders(runs, 1.0)


# Verdicts


def test_equivalent(tmp_path: Path) -> None:
    report = compare_folders(pair(tmp_path), 2.0)
    (found,) = report.contrasts
    assert found.overall.verdict == "equivalent"
    assert found.sentence.startswith("nf4 matches bf16: its score differs by 0.00 points (90 % interval −")  # noqa: RUF001
    assert "inside the margin of ±2 points, over 800 documents of 1 task and 1 seed" in found.sentence


def test_different(tmp_path: Path) -> None:
    found = compare_folders(pair(tmp_path, lost=60, won=0), 1.0).contrasts[0]
    assert found.overall.verdict == "different"
    assert found.overall.difference == pytest.approx(-7.5)
    assert "nf4 does not match bf16: it scores 7.50 points below it (95 % interval −" in found.sentence  # noqa: RUF001
    assert "margin of ±1 point," in found.sentence


def test_inconclusive_says_how_many_documents_it_would_take(tmp_path: Path) -> None:
    found = compare_folders(pair(tmp_path, lost=30, won=28), 1.0).contrasts[0]
    assert found.overall.verdict == "inconclusive"
    assert found.overall.n_needed > N
    assert found.sentence.startswith("Inconclusive: nf4 scores −0.25 points against bf16")  # noqa: RUF001
    assert f"About {found.overall.n_needed:,} documents would settle it." in found.sentence


def test_a_limited_run_is_no_result(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, p, scores=SCORES[:10], limit=10, text=False) for p in ("nf4", "bf16")]
    report = compare_folders(runs, 50.0)
    assert report.limit == 10
    assert report.contrasts[0].overall.verdict == "inconclusive"
    assert report.contrasts[0].sentence.startswith("NOT A RESULT: the evaluation was limited to 10 documents")


def test_the_order_of_the_runs_does_not_turn_the_sign(tmp_path: Path) -> None:
    runs = pair(tmp_path, lost=60)
    for order in (runs, runs[::-1]):
        report = compare_folders(order, 1.0)
        assert (report.baseline, report.contrasts[0].name) == ("bf16", "nf4")
        assert report.contrasts[0].overall.difference < 0


def test_subjects_are_clusters(tmp_path: Path) -> None:
    assert compare_folders(pair(tmp_path), 1.0).contrasts[0].overall.n_clusters == 8


@pytest.mark.parametrize(
    ("precisions", "baseline"),
    [
        (["nf4", "bf16"], "bf16"),
        (["fp16", "nf4"], "fp16"),
        (["nf4", "fp4"], "fp4"),
        (["bf16", "nf4", "fp4"], "bf16"),
        (["int8", "nf4", "bf16"], "int8"),
    ],
)
def test_the_baseline(precisions: list[str], baseline: str) -> None:
    assert choose_baseline(precisions) == baseline


# Beside the verdict


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A ladder of three precisions and two seeds with everything that can stand beside it."""
    root = tmp_path_factory.mktemp("ladder")
    folders = ladder(root)
    reference = RunFolder(root / "bf16-seed0")
    for name in ("nf4-seed0", "fp4-seed0", "bf16-seed1"):
        write_divergence(reference, RunFolder(root / name), Divergence(900, 0.01, 0.001, 0.2, 97.5))
    write_quantization_error(RunFolder(root / "nf4-seed0"), "base-nf4", [LayerError("model.layers.0.q_proj", 0.09)])
    return compare_folders(folders, 1.0)


def test_a_ladder_holds_every_precision_against_the_first(report: Report) -> None:
    assert [(c.name, c.baseline) for c in report.contrasts] == [("nf4", "bf16"), ("fp4", "bf16")]
    assert [arm.precision for arm in report.arms] == ["bf16", "nf4", "fp4"]
    assert report.contrasts[1].overall.verdict == "different"
    assert len(report.contrasts[0].overall.seed_differences) == 2


def test_noise_is_the_baselines_second_seed_against_its_first(report: Report) -> None:
    assert report.noise is not None
    assert (report.noise.name, report.noise.baseline) == ("bf16 seed 1", "bf16 seed 0")
    assert report.noise.overall.difference == pytest.approx(100 * (2 - 3) / N)
    assert report.noise.divergence is not None


def test_one_seed_has_no_noise_row(tmp_path: Path) -> None:
    assert compare_folders(pair(tmp_path), 1.0).noise is None


def test_flips_are_counted_for_each_task_and_seed(report: Report) -> None:
    counted = [(count.task, count.seed, count.flips.right_to_wrong) for count in report.contrasts[0].flips]
    assert counted == [("standin_choice", 0, 6), ("standin_choice", 1, 6)]
    assert report.contrasts[0].changed_share == pytest.approx(100 * 9 / N)


def test_changed_answers_show_both_sides(report: Report) -> None:
    changed = report.contrasts[1].changed
    assert {change.change for change in changed} >= {"right to wrong", "wrong to right"}
    worse = next(change for change in changed if change.change == "right to wrong")
    assert (worse.target, worse.baseline_answer) == ("In Kropa.", "In Kropa.")
    assert worse.answer.startswith("In Samul")


def test_bits_per_byte_have_an_interval(report: Report) -> None:
    (found,) = report.contrasts[0].bits
    assert (found.task, found.a, found.b) == ("standin_text", pytest.approx(1.02), pytest.approx(1.0))
    assert found.comparison is not None and found.comparison.interval[0] > 0


@pytest.mark.parametrize(("lost", "won", "said"), [(0, 60, True), (4, 4, True), (60, 0, False)])
def test_bits_that_point_another_way_are_commented_on(tmp_path: Path, lost: int, won: int, said: bool) -> None:
    report = compare_folders(pair(tmp_path, lost, won), 1.0)  # the texts are 2 % less likely in nf4
    caveats = [caveat for caveat in report.caveats if "standin_text point another way than the scores" in caveat]
    assert len(caveats) == said
    assert all("nf4 needs 0.0200 bits a byte more than bf16 (95 % interval" in caveat for caveat in caveats)


def test_controls_split_inference_from_training(report: Report) -> None:
    names = [control.name for control in report.controls]
    assert names[:2] == ["bf16 base before tuning", "nf4 base before tuning"]
    assert "bf16 adapter on the nf4 base" in names
    effects = {effect.name: effect.comparison.difference for effect in report.effects}
    assert effects["bf16: tuning"] > 10
    whole = report.contrasts[0].overall.difference
    assert effects["nf4: inference"] + effects["nf4: training"] == pytest.approx(whole)
    assert not report.caveats


def test_a_control_of_other_weights_is_refused(tmp_path: Path) -> None:
    runs = pair(tmp_path)
    write_results(runs[0] / "evaluation" / "base", receipt("nf4", 0), SCORES, adapter=False, base_sha256="other")
    with pytest.raises(ComparisonError, match="nf4 base before tuning: standin_choice was scored with the base other"):
        compare_folders(runs, 1.0)


def test_validity_tells_what_was_counted(report: Report) -> None:
    facts = {fact.name: fact for fact in report.validity}
    assert "nf4: 28 Linear4bit, 28 of 28 quantized" in facts["base as stored"].figure
    assert "6 of 6 runs" in facts["weights evaluated"].figure
    assert "800" in facts["documents"].figure
    assert {fact.verdict for fact in report.validity} == {"pass"}


def test_the_sentence_names_arms_that_cannot_differ(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, p, scores=np.zeros(N)) for p in ("nf4", "bf16")]
    write_results(runs[1] / "evaluation" / "base", receipt("bf16", 0), np.zeros(N), adapter=False)
    (found,) = compare_folders(runs, 1.0).contrasts
    assert found.sentence.startswith("nf4 and bf16 agree, but the agreement means nothing: ")
    assert "standin_choice cannot tell the arms apart: every answer of every arm is wrong" in found.sentence
    assert "tuning itself made no difference" in found.sentence
    assert found.overall.verdict == found.tasks[0].comparison.verdict == "inconclusive"


def test_generations_are_shown_beside_the_verdict(tmp_path: Path) -> None:
    runs = pair(tmp_path)
    for run, precision, score in zip(runs, ("nf4", "bf16"), (0.4, 0.5), strict=True):
        folder = run / "evaluation"
        write_results(folder, receipt(precision, 0), np.full(30, score), kind="generation", task="held_out_answers")
    found = compare_folders(runs, 1.0).contrasts[0]
    assert [task.task for task in found.tasks] == ["standin_choice", "held_out_answers"]
    assert "1 task" in found.sentence


def test_divergences_of_other_weights_are_not_read(tmp_path: Path) -> None:
    runs = [RunFolder(run) for run in pair(tmp_path)]
    write_divergence(runs[1], runs[0], Divergence(900, 0.01, 0.001, 0.2, 97.5))
    write_quantization_error(runs[0], "base-nf4", [LayerError("q_proj", 0.09)])
    assert read_divergence(runs[1], runs[0]) == Divergence(900, 0.01, 0.001, 0.2, 97.5)
    content = receipt("nf4", 0, adapter__final_sha256="trained again", base__sha256="another")
    (runs[0].path / "run.json").write_text(json.dumps(asdict(content)))
    assert read_divergence(runs[1], runs[0]) is None
    assert read_quantization_error(runs[0]) == []


def two_tasks(root: Path, lost: tuple[int, int], won: tuple[int, int], *, shared: bool = False) -> list[Path]:
    """An nf4 run and its baseline on two tasks of 800 documents, which are the same documents where `shared`."""
    folders = [make_run(root, "nf4"), make_run(root, "bf16")]
    for task, down, up in zip(("standin_choice", "standin_answer"), lost, won, strict=True):
        for folder, scores in zip(folders, (flipped(SCORES, down, up), SCORES), strict=True):
            write_results(
                folder / "evaluation",
                RunFolder(folder).receipt(),
                scores,
                task=task,
                text=False,
                change=lambda document: replace(document, doc_hash=document.doc_id) if shared else document,
            )
    return folders


def test_questions_of_two_tasks_count_once(tmp_path: Path) -> None:
    (once,) = compare_folders(pair(tmp_path / "one", lost=20, won=8), 1.0).contrasts
    (shared,) = compare_folders(two_tasks(tmp_path / "same", (20, 20), (8, 8), shared=True), 1.0).contrasts
    assert shared.overall.interval == pytest.approx(once.overall.interval)
    assert shared.overall.interval_95 == pytest.approx(once.overall.interval_95)
    assert shared.overall.n_clusters == once.overall.n_clusters == 8
    assert "over 1,600 documents (800 of them distinct) of 2 tasks" in shared.sentence


def test_tasks_that_differ_are_no_match_though_their_mean_is(tmp_path: Path) -> None:
    (found,) = compare_folders(two_tasks(tmp_path, lost=(45, 4), won=(4, 45)), 2.0).contrasts
    low, high = found.overall.interval
    assert -2 < low < high < 2
    assert {each.comparison.verdict for each in found.tasks} == {"different"}
    assert found.overall.verdict == "inconclusive"
    assert found.sentence.startswith(
        "nf4 does not match bf16 in every task: standin_answer +5.12 points, standin_choice"
    )


def test_a_task_is_different_by_its_adjusted_p_value(tmp_path: Path) -> None:
    (found,) = compare_folders(two_tasks(tmp_path, lost=(27, 15), won=(13, 14)), 0.5).contrasts
    row = next(each for each in found.tasks if each.task == "standin_choice")
    assert row.comparison.p_difference < 0.05 < row.p_holm
    assert row.comparison.verdict == "inconclusive"


def test_one_seed_speaks_of_two_runs(tmp_path: Path) -> None:
    one = compare_folders(pair(tmp_path / "one", lost=60, won=0), 1.0).contrasts[0]
    assert one.sentence.endswith("With one seed, this is about these two runs and not about two precisions.")
    several = compare_folders(ladder(tmp_path / "several"), 2.0).contrasts[-1]
    assert "With one seed" not in several.sentence


def test_one_seed_says_so_whatever_the_verdict(tmp_path: Path) -> None:
    wide = pair(tmp_path / "wide", lost=30, won=28)
    unlike = two_tasks(tmp_path / "unlike", lost=(45, 4), won=(4, 45))
    alike = [make_run(tmp_path / "alike", p, scores=np.ones(N)) for p in ("nf4", "bf16")]
    for runs, margin in ((wide, 1.0), (unlike, 2.0), (alike, 1.0)):
        (found,) = compare_folders(runs, margin).contrasts
        assert found.overall.verdict == "inconclusive"
        assert "With one seed, this is about these two runs" in found.sentence


def test_where_documents_and_seeds_are_missing_both_are_asked_for(tmp_path: Path) -> None:
    changes = {0: (50, 40), 1: (40, 60)}
    runs = [
        make_run(tmp_path, name, seed, flipped(SCORES, *changes[seed]) if name == "nf4" else SCORES)
        for name in ("nf4", "bf16")
        for seed in changes
    ]
    (found,) = compare_folders(runs, 1.0).contrasts
    needed, seeds = found.overall.n_needed, found.overall.seeds_needed
    assert needed is not None and seeds is not None
    assert f"About {needed:,} documents and {seeds} seeds would settle it. Those documents should be" in found.sentence


def test_an_arm_that_is_never_wrong_may_be_so_elsewhere(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, name, scores=scores) for name, scores in (("nf4", SCORES), ("bf16", np.ones(N)))]
    bf16, nf4 = compare_folders(runs, 1.0).arms
    low, high = bf16.overall.interval_95
    assert 99 < low < 99.8 and high == bf16.overall.mean == 100
    assert nf4.overall.mean == pytest.approx(100 * SCORES.mean())


# The command


def test_the_command_writes_a_report_beside_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*map(str, pair(tmp_path)), "--margin", "2"])
    said = capsys.readouterr().out
    assert "nf4 matches bf16" in said and str(tmp_path / "report" / "index.html") in said
    expected = ["figures", "index.html", "report.json", "report.md", "tables"]
    assert sorted(file.name for file in (tmp_path / "report").iterdir()) == expected


def test_without_anything_fixed_beforehand_it_is_exploratory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*map(str, pair(tmp_path))])
    assert "Exploratory: no margin, tasks, seeds and precisions were fixed before" in capsys.readouterr().out
    assert "<strong>Exploratory</strong>" in (tmp_path / "report" / "index.html").read_text()


def test_another_margin_is_told(tmp_path: Path) -> None:
    runs = [*map(str, pair(tmp_path, lost=30, won=20))]
    for margin in ("1", "1", "5"):
        main([*runs, "--margin", margin])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (report["margin"], report["earlier_margins"]) == (5.0, [1.0])
    assert "±1 points before" in report["caveats"][0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--margin", "none"], "expected points above 0"),
        (["--margn", "1"], "unknown flag --margn. Did you mean 'margin'"),
        (["--baseline", "int8"], "no run has the precision int8"),
        (["--baseline", "int8", "--divergence"], "no run has the precision int8"),
    ],
)
def test_the_command_refuses(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises(RecipesError, match=said):
        main([*map(str, pair(tmp_path)), *words])


def test_nothing_but_a_report_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.md").write_text("years of work")
    with pytest.raises(RunFolderError, match=r"holds thesis\.md, which is no report"):
        main([*map(str, pair(tmp_path)), "--output", str(tmp_path / "out")])
