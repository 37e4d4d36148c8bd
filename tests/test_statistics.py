"""Equivalence is a claim of its own: it needs a test that can fail, and no difference found is not one."""

import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import plots, runner, summary
from experiments.config import compose
from experiments.naming import conditions
from experiments.statistics import Difference, holm, paired
from experiments.table import drawn
from fedsim.run import RunFolder

SEEDS = (0, 1, 2)
TINY = [
    *("data.train_size=64", "data.test_size=64", "federation.clients=2", "federation.per_round=2", "rounds=5", "evaluate.every=1"),
    *("attack=none", "tap.every=null", "tap.rounds=null", "device=cpu"),
]


def test_a_worked_example():
    # Differences of -1, -2, -3 points: mean -2, standard error 1 / sqrt(3). With two degrees of freedom Student's distribution is
    # F(t) = 1/2 + t / (2 sqrt(2 + t^2)), so two-sided p = 1 - t / sqrt(2 + t^2), and F = 0.95 at t = 0.9 sqrt(2 / 0.19).
    found = paired([0.50, 0.61, 0.39], [0.51, 0.63, 0.42], margin=0.05)
    error = 0.01 / math.sqrt(3)
    reach = 0.9 * math.sqrt(2 / 0.19) * error
    assert (found.mean, found.low, found.high) == pytest.approx((-0.02, -0.02 - reach, -0.02 + reach))
    t = 0.02 / error
    assert found.p_different == pytest.approx(1 - t / math.sqrt(2 + t**2))
    t = (0.05 - 0.02) / error  # to the nearer end of the margin
    assert found.p_equivalent == pytest.approx((1 - t / math.sqrt(2 + t**2)) / 2)
    assert (found.n, found.margin, found.verdict) == (3, 0.05, "equivalent")


def test_equal_accuracies_are_equivalent():
    assert paired([0.3, 0.7, 0.5], [0.3, 0.7, 0.5], 0.02) == Difference(0.0, 0.0, 0.0, 3, 0.02, p_equivalent=0.0, p_different=1.0)


@pytest.mark.parametrize(
    ("by", "verdict"), [(-0.03, "worse"), (-0.02, "worse"), (-0.01, "equivalent"), (0.01, "equivalent"), (0.03, "better")]
)
def test_the_same_difference_with_every_seed_is_certain(by, verdict):
    other = np.array([0.3, 0.7, 0.5])
    found = paired(other + by, other, 0.02)
    assert found.verdict == verdict
    assert {found.p_equivalent, found.p_different} <= {0.0, 1.0}
    assert found.low == found.mean == found.high == pytest.approx(by)


@pytest.mark.parametrize(
    ("points", "verdict"),
    [
        ([-10, -11, -12], "worse"),
        ([10, 11, 12], "better"),
        ([-0.9, -1.0, -1.1], "equivalent"),  # differs beyond doubt, and by less than matters
        ([-3, 0, 3], "undecided"),
        ([-0.5, 0.6], "undecided"),  # two seeds: the interval is 6.3 standard errors to each side
    ],
)
def test_verdicts(points, verdict):
    other = np.linspace(0.3, 0.6, len(points))
    assert paired(other + np.array(points) / 100, other, 0.02).verdict == verdict


@given(st.lists(st.tuples(st.integers(0, 64), st.integers(0, 64)), min_size=2, max_size=7), st.floats(0.001, 0.5))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_both_tests_reject_exactly_if_the_interval_is_within_the_margin_and_sides_can_be_swapped(pairs, margin):
    one, other = np.array(pairs).T / 64
    found, swapped = paired(one, other, margin), paired(other, one, margin)
    if min(abs(abs(end) - margin) for end in (found.low, found.high)) > 1e-9:  # there rounding decides
        assert (found.p_equivalent < 0.05) == (-margin < found.low and found.high < margin)
    assert (swapped.mean, swapped.low, swapped.high) == pytest.approx((-found.mean, -found.high, -found.low))
    assert (swapped.p_equivalent, swapped.p_different) == pytest.approx((found.p_equivalent, found.p_different))
    opposite = {"worse": "better", "better": "worse"}
    assert swapped.verdict == opposite.get(found.verdict, found.verdict)


@pytest.mark.parametrize(
    ("one", "other", "margin", "told"),
    [
        ([0.5], [0.5], 0.02, "two pairs at least, got 1"),
        ([], [], 0.02, "two pairs at least, got 0"),
        ([0.5, 0.6], [0.5], 0.02, "must come in pairs"),
        ([0.5, math.nan], [0.5, 0.5], 0.02, "must be finite"),
        ([0.5, 0.6], [0.5, 0.5], 0.0, "margin must be above 0"),
    ],
)
def test_what_cannot_be_tested_is_told(one, other, margin, told):
    with pytest.raises(ValueError, match=told):
        paired(one, other, margin)


def test_holm_by_hand():
    # In order 0.005, 0.01, 0.03, 0.04, times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04, and none below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.9, 0.5]) == [1.0, 1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


# In the comparison ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[tuple[str, int], RunFolder]:
    """Runs by defense and seed."""
    out = tmp_path_factory.mktemp("runs")
    return {
        (defense, seed): runner.start(compose([*TINY, f"defense={defense}", f"seed={seed}"]), out / f"{defense}_{seed}", "a test")
        for defense, seed in itertools.product(("none", "uniform"), SEEDS)
    }


def columns(folders) -> dict[str, list[str]]:
    return {str(column.header): list(column.cells) for column in drawn(summary.summarised(folders)).columns}


def test_the_summary_says_what_the_defense_costs_and_how_sure_that_is(folders):
    table = columns(list(folders.values()))
    assert list(table)[:4] == ["defense", "accuracy", "against none", "sent"]
    ends = {name: [folders[name, seed].rounds()["accuracy"][1:6].mean() for seed in SEEDS] for name in ("none", "uniform")}
    cost = paired(ends["uniform"], ends["none"], 0.02)
    numbers = [float(word.strip("[],")) for word in table["against none"][1].split()[:3]]
    assert numbers == pytest.approx([100 * cost.mean, 100 * cost.low, 100 * cost.high], abs=0.051)  # one decimal
    assert table["against none"][1].split()[3] == cost.verdict
    assert table["against none"][0] == ""  # none itself
    caption = str(drawn(summary.summarised(list(folders.values()))).caption)
    assert "last 5 evaluations" in caption
    assert "over 3 seeds" in caption
    assert "within 2 points" in caption
    assert "Holm" not in caption  # of a single claim there is nothing to correct


def test_the_difference_is_drawn_where_there_is_one(folders, tmp_path):
    drawn = {path.name for path in plots.draw(list(folders.values()), tmp_path / "all")}
    assert "accuracy_difference.png" in drawn
    drawn = {path.name for path in plots.draw([folders["none", 0], folders["uniform", 0]], tmp_path / "one")}
    assert "accuracy.png" in drawn
    assert "accuracy_difference.png" not in drawn


@pytest.mark.parametrize(
    "chosen",
    [
        [("none", 0), ("uniform", 0)],
        [("uniform", seed) for seed in SEEDS],
        [("none", seed) for seed in SEEDS],
        [("none", 0), ("none", 1), ("uniform", 1), ("uniform", 2)],  # one seed is shared
    ],
    ids=["one seed", "no none", "none alone", "other seeds"],
)
def test_there_is_no_column_where_there_is_nothing_to_compare(folders, chosen):
    table = drawn(summary.summarised([folders[one] for one in chosen]))
    assert "against none" not in [str(column.header) for column in table.columns]
    assert table.caption is None


composed = functools.cache(lambda *overrides: compose([*TINY, *overrides]))


@pytest.fixture
def recorded(tmp_path):
    """A folder of a run that recorded these accuracies, one a round from round 0 on."""
    number = itertools.count()

    def make(accuracies, *overrides: str, seed: int, rounds: int | None = None) -> RunFolder:
        config = composed(*overrides) | {"seed": seed, "rounds": rounds or len(accuracies) - 1}
        folder = RunFolder.create(tmp_path / f"{next(number)}", config, {})
        about = {"bytes_up": 7, "bytes_up_dense": 11}
        folder.add("rounds", [{"round": i, "accuracy": accuracy, **about} for i, accuracy in enumerate(accuracies)])
        return folder

    return make


def costs(runs) -> dict[str, Difference]:
    """By the first word of the defense."""
    return {name.split()[0]: cost for name, cost in summary.against_none(runs, summary.tables(runs)[0]).items()}


def test_the_untrained_model_is_no_evaluation(recorded):
    runs = [recorded([0.1, a], f"defense={name}", seed=s) for name, a in (("none", 0.9), ("fp16", 0.8)) for s in (0, 1)]
    assert costs(runs)["fp16"].mean == pytest.approx(-0.1)


def test_the_last_five_evaluations_count_and_rounds_without_one_do_not(recorded):
    ends = {"none": [0.1, 0.2, 0.5, None, 0.5, 0.5, 0.5, 0.5], "fp16": [0.1, 0.9, 0.5, None, 0.4, 0.5, 0.5, 0.5]}
    runs = [recorded(accuracies, f"defense={name}", seed=s) for name, accuracies in ends.items() for s in (0, 1)]
    assert costs(runs)["fp16"].mean == pytest.approx(-0.1 / 5)


def test_a_run_that_was_stopped_is_not_compared(recorded):
    runs = [recorded([0.1, 0.9, 0.9], f"defense={name}", seed=s) for name in ("none", "fp16") for s in (0, 1)]
    assert costs(runs)["fp16"].n == 2
    assert costs([*runs[:3], recorded([0.1, 0.2], "defense=fp16", seed=1, rounds=2)]) == {}


def test_runs_that_differ_in_more_than_the_defense_are_not_compared(recorded):
    none = [recorded([0.1, 0.9], "defense=none", seed=s) for s in (0, 1)]
    other = [recorded([0.1, 0.8], "defense=fp16", "federation.lr=0.3", seed=s) for s in (0, 1)]
    assert costs([*none, *other]) == {}


def test_one_defense_under_two_conditions_is_two_questions(recorded):
    def runs(condition: str) -> list[RunFolder]:
        return [recorded([0.1, 0.9], f"defense={name}", condition, seed=s) for name in ("none", "fp16") for s in (0, 1)]

    assert costs(runs("federation.lr=0.2")).keys() == {"fp16"}
    both = [*runs("federation.lr=0.2"), *runs("federation.lr=0.3")]
    found = summary.against_none(both, summary.tables(both)[0])
    assert list(found) == ["fp16 format=fp16, lr=0.2", "fp16 format=fp16, lr=0.3"]


def test_a_run_attacked_twice_is_one_run(recorded):
    attacks = ("attack=dlg", "attack=idlg")
    runs = [recorded([0.1, 0.9], f"defense={name}", attack, seed=0) for name in ("none", "fp16") for attack in attacks]
    assert costs(runs) == {}
    runs += [recorded([0.1, 0.9], f"defense={name}", seed=1) for name in ("none", "fp16")]
    assert costs(runs)["fp16"].n == 2


def test_a_bottleneck_is_a_defense_and_stands_beside_the_bare_model(recorded):
    runs = [recorded([0.1, 0.9], "defense=none", seed=s) for s in (0, 1)]
    runs += [recorded([0.1, 0.7], "model/bottleneck=precode", seed=s) for s in (0, 1)]
    assert costs(runs)["none,"].verdict == "worse"
    assert "none, bottleneck=precode" in str(columns(runs)["defense"][1])


def test_claims_are_corrected_for_being_several(recorded):
    # Two-sided p of differences of -4, -5, -6 points is 1 - t / sqrt(2 + t^2) = 0.013 at t = 5 sqrt(3): 0.052 when there are four.
    ends = {"none": (0.50, 0.60, 0.70), "fp16": (0.46, 0.55, 0.64)}
    ends |= dict.fromkeys(("bf16", "int8", "sign"), (0.45, 0.60, 0.75))  # p = 1
    by = {
        name: [recorded([0.1, a], f"defense={name}", seed=s) for s, a in zip(SEEDS, of, strict=True)] for name, of in ends.items()
    }
    assert costs([*by["none"], *by["fp16"]])["fp16"].verdict == "worse"
    runs = list(itertools.chain.from_iterable(by.values()))
    several = costs(runs)
    assert list(several) == ["fp16", "bf16", "int8", "sign"]
    assert several["fp16"].verdict == "undecided"
    assert "Holm over 4 comparisons" in str(drawn(summary.summarised(runs)).caption)


def test_conditions_are_what_is_neither_defense_nor_attack_nor_seed():
    plain = conditions(compose(TINY))
    for same in (
        "defense=topk",
        "defense=ppp",
        "attack=idlg",
        "attacker=naive",
        "tap.every=3",
        "seed=7",
        "out=elsewhere",
        "name=one",
        "engine.workers=1",
        "device=cpu",
        "evaluate.every=null",
        "data.root=/elsewhere",
    ):
        assert conditions(compose([*TINY, same])) == plain, same
    for other in ("federation.lr=0.7", "model=mlp_2nn", "data.test_size=32", "rounds=6", "aggregation=secure", "server=imprint"):
        assert conditions(compose([*TINY, other])) != plain, other
