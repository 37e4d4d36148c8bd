"""The ranking: who is the stronger attacker, and what is shown of a defense."""

import pandas as pd
import pytest

from attacks.metrics import wilson
from experiments import ranking


def leaks_of(**stolen: list[int | None]) -> pd.DataFrame:
    """Leaks of a defense, from whose victims an attacker stole (1) or not (0), or lost his way (None), and of none."""
    rows = [
        {
            "bare": name.startswith("none"),
            "attacker": {"none": "naive", "none_knowing": "adaptive"}.get(name, name),
            "client": client,
            "verdict": {1: "stolen", 0: "not stolen", None: "not converged"}[took],
        }
        for name, each in stolen.items()
        for client, took in enumerate(each)
    ]
    about = {
        "seed": 0,
        "round": 1,
        "image": 0,
        "under": "the same",
        "how": "alike",
        "seen": "update",
        "score": 10.0,
        "mse": 0.1,
        "psnr_db": 10.0,
        "label_right": True,
    }
    return pd.DataFrame(rows).assign(contender="A", **about)


FLAG = "protects only against the naive attacker"
UNDECIDED = "undecided: 7 of his searches did not end"


@pytest.mark.parametrize(
    ("naive", "adaptive", "says"),
    [
        ([0] * 12, [1] * 12, FLAG),
        ([None] * 12, [1] * 12, FLAG),  # whoever does not know it gets lost
        ([1] * 7 + [0] * 5, [1] * 12, FLAG),  # five fewer and none more: 2^-5 < 5 %; four fewer: 2^-4 is not
        ([1] * 7 + [0] * 5, [1] * 8 + [0] * 4, "fewer thefts by the naive attacker; of the adaptive one that was not shown"),
        ([1] * 8 + [0] * 4, [1] * 12, "no fewer thefts were shown"),
        ([0] * 12, [0] * 12, "fewer thefts than without a defense, by both attackers"),
        ([0] * 12, [0] * 5 + [None] * 7, "fewer thefts than without a defense, by both attackers"),
        ([0] * 12, [1] * 5 + [None] * 7, f"fewer thefts by the naive attacker; of the adaptive one {UNDECIDED}"),
        ([1] * 12, [None] * 12, f"of the adaptive attacker {UNDECIDED.replace('7', '12')}"),
        ([0] * 12, None, "fewer thefts than without a defense; the adaptive attacker was not tried"),
        (None, [None] * 7 + [0] * 4 + [1], f"{UNDECIDED}; the naive attacker was not tried"),
    ],
)
def test_the_flag_is_for_what_stops_the_naive_attacker_alone(naive, adaptive, says):
    every = leaks_of(none=[1] * 12, **{who: of for who, of in (("naive", naive), ("adaptive", adaptive)) if of is not None})
    row = ranking._line("A", "dlg", every[~every["bare"]], every)
    assert row["says"] == says
    assert row["flag"] == (says == FLAG)


@pytest.mark.parametrize("column", ["how", "under", "seen"])
def test_a_defense_is_held_against_none_that_was_attacked_alike(column):
    every = leaks_of(none=[1] * 12, naive=[0] * 12)
    every.loc[~every["bare"], column] = "otherwise"
    says = ranking._line("A", "dlg", every[~every["bare"]], every)["says"]
    assert says.startswith("too few to tell" if column == "seen" else "no run without a defense, attacked alike, to compare with")


def test_each_attacker_is_held_against_himself():
    """A defense that changes nothing protects from nobody, however much the one steals more than the other."""
    half, whole = [1] * 8 + [0] * 10, [1] * 18
    every = leaks_of(none=half, none_knowing=whole, naive=half, adaptive=whole)
    row = ranking._line("A", "dlg", every[~every["bare"]], every)
    assert row["p"] == {"naive": 1.0, "adaptive": 1.0}
    assert row["says"] == "no fewer thefts were shown"


def test_images_of_one_update_are_no_trials_of_their_own():
    every = leaks_of(none=[1] * 8, naive=[0] * 8, adaptive=[0] * 8)
    batch = every.assign(image=every["client"], client=0)
    row = ranking._line("A", "dlg", batch[~batch["bare"]], batch)
    assert row["says"].startswith("too few to tell")
    assert row["by"]["naive"]["interval"] == list(wilson(0, 1))
    pairs = every.assign(image=every["client"] % 2, client=every["client"] // 2)
    assert ranking._line("A", "dlg", pairs[~pairs["bare"]], pairs)["says"].startswith("too few to tell")
    many = leaks_of(none=[1] * 12, naive=[0, 1] * 6, adaptive=[0, 1] * 5 + [1, 1])  # of six updates half, of the last none
    many = many.assign(image=many["client"] % 2, client=many["client"] // 2)
    assert ranking._line("A", "dlg", many[~many["bare"]], many)["p"] == {"naive": 2**-6, "adaptive": 2**-5}


def test_of_the_naive_attacker_no_more_is_said_than_was_shown():
    every = leaks_of(none=[1] * 6 + [0] * 4, none_knowing=[1] * 10, naive=[1] * 2 + [0] * 8, adaptive=[1] * 3 + [0] * 7)
    row = ranking._line("A", "dlg", every[~every["bare"]], every)
    assert row["stronger"] == "adaptive"
    assert row["says"] == "fewer thefts by the adaptive attacker; of the naive one that was not shown"


def test_the_ranking_goes_by_the_stronger_attacker():
    every = leaks_of(none=[1] * 12, naive=[0] * 12, adaptive=[1] * 9 + [0] * 3)
    row = ranking._line("A", "dlg", every[~every["bare"]], every)
    assert (row["stronger"], row["strongest"]) == ("adaptive", 0.75)


def test_of_a_few_thefts_nothing_can_be_told():
    every = leaks_of(none=[1] * 4 + [0] * 8, naive=[0] * 12, adaptive=[0] * 12)
    assert ranking._line("A", "dlg", every[~every["bare"]], every)["says"].startswith("too few to tell: of fewer than 5 updates")
    alone = every[~every["bare"]]
    assert ranking._line("A", "dlg", alone, alone)["says"] == "no run without a defense, attacked alike, to compare with"
