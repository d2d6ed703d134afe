"""The study: its arithmetic by hand, every variant a valid setting, and a whole run on a small city."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from psdiff.benchmarks import study, study_report
from psdiff.benchmarks.study_model import study_config
from psdiff.benchmarks.study_variants import BASE, BASE_RECIPE, QUESTIONS, SAMPLINGS, STEPS, variants
from psdiff.training.datasets.schema import LabelledImage, PersonSearchSet, Query
from psdiff.training.recipe import Recipe


def run_of(variant, ap50, mean_average_precision=0.2):
    scores = {"map": mean_average_precision, "top1": 0.3, "ap50": ap50, "recall": 0.5}
    return {"variant": variant, "scores": {str(steps): scores for steps in STEPS}}


RUNS = [run_of("a", 0.50), run_of("a", 0.54), run_of("b", 0.60), run_of("b", 0.62), run_of("c", 0.9)]


def test_noise_is_the_deviation_within_variants_not_between_them():
    # Variances of a and b: 0.0008 and 0.0002; c has one run and says nothing.
    assert study_report._noise(RUNS)["ap50"] == pytest.approx(math.sqrt((0.0008 + 0.0002) / 2))
    assert math.isnan(study_report._noise(RUNS[-1:])["ap50"])


@pytest.mark.parametrize(
    ("ap50", "words"),
    [
        # The error of a difference of two means of two is the noise, 0.02236: two of them are 4.5 points.
        ((0.55, 0.57), "AP50 within noise"),
        ((0.57, 0.58), "AP50 better (+5.5)"),
        ((0.46, 0.48), "AP50 worse (-5.0)"),
        # One run alone: the error grows by sqrt(3/2), to 5.5 points.
        ((0.57,), "AP50 within noise"),
        ((0.58,), "AP50 better (+6.0)"),
    ],
)
def test_a_verdict_needs_two_standard_errors(ap50, words):
    found = [run_of("new", value) for value in ap50]
    noise = study_report._noise(RUNS)
    assert study_report._verdict(found, RUNS[:2], noise).endswith(words)


def test_without_two_seeds_anywhere_there_is_no_verdict():
    nothing = {"map": math.nan, "top1": math.nan, "ap50": math.nan}
    assert study_report._verdict(RUNS[4:], RUNS[:1], nothing) == "mAP unknown, AP50 unknown"


def test_a_cell_shows_mean_and_half_range_in_per_cent():
    assert study_report._spread([0.5, 0.54]) == "52.0 ± 2.0"
    assert study_report._spread([0.5]) == "50.0 (one seed)"


def test_every_variant_is_a_setting_of_its_own():
    names = [variant.name for variant in variants()]
    assert len(set(names)) == len(names)
    settings = set()
    for variant in variants():
        config = study_config(variant.network)
        recipe = Recipe.model_validate(BASE_RECIPE | variant.recipe | {"stages": [study._stage()]})
        settings.add((config.model_dump_json(), recipe.model_dump_json()))
    assert len(settings) == len(names)
    assert {question.reference for question in QUESTIONS} <= set(names)


@pytest.fixture
def small(monkeypatch):
    """The study on a city of 24 frames and people, four iterations."""
    for name, value in {"CITY_IMAGES": 24, "CITY_PEOPLE": 8, "ITERATIONS": 4, "WARMUP": 2}.items():
        monkeypatch.setattr(study, name, value)
    for name, value in {"TEST_IMAGES": 8, "QUERIES": 4, "SAMPLING_IMAGES": 4, "SAMPLING_QUERIES": 2}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "PROJECTION_FRAMES", 4)


class NoBars:
    def add_task(self, *args, **kwargs):
        return 0

    def update(self, *args, **kwargs):
        pass

    def advance(self, *args):
        pass


@pytest.mark.slow
def test_a_variant_is_trained_scored_and_kept(small, tmp_path, monkeypatch):
    study.prepare(tmp_path, NoBars())
    threads = torch.get_num_threads()
    try:
        base = next(variant for variant in variants() if variant.name == BASE)
        # The base is also scored with every sampler.
        line = study.run_variant(tmp_path, base, 0)
    finally:
        torch.set_num_threads(threads)
    assert line.startswith("base-0: K = 4 mAP ")
    result = json.loads((tmp_path / "runs" / "base-0.json").read_text())
    assert set(result["scores"]) == {"1", "2", "4", "8"}
    assert set(result["samplings"]) >= {sampling.name for sampling in SAMPLINGS}
    assert study.run_variant(tmp_path, base, 0) == "base-0: already there"
    monkeypatch.setattr(study_report, "DOCUMENT", tmp_path / "study.md")
    monkeypatch.setattr(study_report, "PLOTS", tmp_path / "plots")
    monkeypatch.setattr(study_report, "write_result", lambda name, result: tmp_path / f"{name}.json")
    (tmp_path / "study.md").write_text("before\n" + "\nold\n".join(study_report.MARKERS) + "\nafter\n")
    study_report.write(tmp_path / "runs")
    text = (tmp_path / "study.md").read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| 4 |" in text
    assert "not run" in text
    assert (tmp_path / "plots" / "steps.png").stat().st_size > 1000


def test_queries_without_a_truth_among_the_first_images_are_left_out():
    images = [
        LabelledImage(f"{i}", Path(f"{i}.jpg"), np.zeros((1, 4), np.float32), np.zeros(1, np.int64))
        for i in range(4)
    ]
    truth = {1: np.zeros((1, 4), np.float32)}, {3: np.zeros((1, 4), np.float32)}
    queries = [
        Query(image=0, box_xyxy=np.zeros(4, np.float32), pid=0, truth=part, gallery=np.arange(1, 4))
        for part in truth
    ]
    dataset = PersonSearchSet(name="x", train=[], test=images, queries=queries)
    kept = study.first_images(dataset, 3, 10)
    assert [query.truth.keys() for query in kept.queries] == [{1}]
    assert kept.queries[0].gallery.tolist() == [1, 2]
    assert len(kept.test) == 3
