"""Verdicts follow from what was measured, and from nothing else."""

import functools
import inspect
import shutil

import numpy as np
import pandas as pd
import pytest

from experiments import claims, study
from experiments.answers import CHECKS
from experiments.claims import HOLDS, MISSING, NAIVE, OPEN, REFUTED, Claim, verify
from experiments.cli import main
from experiments.config import compose
from experiments.results import ROWS, STAGES, flat, matches


class Cell:
    """A finished run's folder, as far as claims read it: its configuration, its rounds and its leaks."""

    def __init__(self, overrides, victims, accuracy=0.5, converged=True, images=1):
        """`victims` gives decibels by attacker, of updates of so many images; `converged` one truth for all or one for each."""
        self.config = compose(overrides)
        rows = [
            {
                "attack": self.config["choices"]["attack"] + "_adaptive" * (who == "adaptive"),
                "attacker": who,
                "round": 1,
                "client": i // images,
                "image": i % images,
                "mse": 10 ** (-db / 10),
                "psnr_db": db,
                "ssim": 0.5,
                "converged": converged if isinstance(converged, bool) else converged[i],
            }
            | {"label_right": True, "first_layer_error": 0.1}
            for who, decibels in victims.items()
            for i, db in enumerate(decibels)
        ]
        self._leaks = pd.DataFrame(rows)
        self._rounds = pd.DataFrame({"round": [0, 1, 20], "accuracy": [0.1, None, accuracy]})  # of as many as are the default

    def leaks(self):
        return self._leaks

    def rounds(self):
        return self._rounds


def claim(check, attacker="naive", **settings):
    return Claim("X1", "dlg-noise", "words", "somebody", check, settings, attacker=attacker)


def verdict(one, *cells):
    (said,) = verify([one], {"dlg-noise": cells})
    return said.verdict


GOOD, BAD, MIXED = [30.0 + i for i in range(8)], [8.0 + i / 10 for i in range(8)], [30.0] * 4 + [8.0] * 4


@pytest.mark.parametrize(
    ("naive", "adaptive", "expected"),
    [
        (BAD, BAD, HOLDS),
        (BAD, GOOD, NAIVE),
        (GOOD, GOOD, REFUTED),
        (BAD, MIXED, OPEN),
        (MIXED, MIXED, OPEN),
        (MIXED, GOOD, REFUTED),
    ],
)
def test_protection_is_held_against_both_attackers(naive, adaptive, expected):
    one = claim("rate", "both", of="MSE < 0.03", where={"defense": "fp16"}, expect="<= 0.5")
    assert verdict(one, Cell(["defense=fp16"], {"naive": naive, "adaptive": adaptive})) == expected


def test_a_claim_that_nothing_was_measured_of_says_so():
    one = claim("rate", of="MSE < 0.03", where={"defense": "gaussian", "defense.variance": [0.01, 0.1]}, expect=">= 0.5")
    assert verdict(one, Cell(["defense=fp16"], {"naive": GOOD})) == MISSING
    (said,) = verify([one], {})
    assert said.verdict == MISSING
    assert claims.summary([said]).rows[0][4] == "fedsim study dlg-noise"


def test_a_claim_of_what_only_the_full_study_has_says_so():
    asked = [one for one in claims.load() if one.study == "dlg-datasets"]
    commands = {tuple(row[1].split(", ")[1:])[-1]: row[4] for row in claims.summary(verify(asked, {})).rows if row[0] == "A3"}
    quick = "fedsim study dlg-datasets"
    full = f"{quick} --full"
    assert commands == {"synthetic": quick, "svhn": full, "mnist": full, "cifar100": full}


@pytest.mark.parametrize(("bound", "expected"), [(">= 20", HOLDS), (">= 60", REFUTED), (">= 33.4", OPEN)])
def test_a_mean_is_held_against_a_bound(bound, expected):
    assert verdict(claim("mean", of="psnr_db", expect=bound), Cell([], {"naive": GOOD})) == expected


def test_differences_are_paired_where_victims_are_the_same():
    noisy = np.linspace(5, 50, 8)
    cells = Cell(["defense=fp16"], {"naive": noisy + 1 + 0.1 * np.cos(range(8))}), Cell([], {"naive": noisy})
    one = claim("difference", column="psnr_db", of={"defense": "fp16"}, than={"defense": "none"}, expect=">= 0.5")
    assert verdict(one, *cells) == HOLDS
    others = Cell(["seed=1"], {"naive": noisy})  # Welch's test sees nothing in so much spread
    assert verdict(one, cells[0], others) == OPEN
    (said,) = verify([one], {"dlg-noise": [cells[0], Cell([], {"naive": noisy[:6]})]})  # those that both have are pairs
    assert said.ours.endswith("6 pairs")


def noisy(defense, variance, decibels, *more, attacker="naive"):
    return Cell([f"defense={defense}", "defense.relative=null", f"defense.variance={variance}", *more], {attacker: decibels})


def test_two_sides_are_compared_in_cells_that_are_alike_in_all_other_settings():
    levels = {1e-4: 40.0, 1e-3: 25.0, 1e-2: 10.0}
    of_each = {v: db + np.linspace(0, 5, 8) for v, db in levels.items()}
    gaussian = {v: noisy("gaussian", v, of) for v, of in of_each.items()}
    laplacian = {v: noisy("laplacian", v, of + 0.1 * np.cos(range(8))) for v, of in of_each.items()}
    sides = {"column": "psnr_db", "of": {"defense": "laplacian"}, "than": {"defense": "gaussian"}}
    one = claim("equivalent", where={"defense.variance": list(levels)}, margin=1, **sides)
    (said,) = verify([one], {"dlg-noise": [*gaussian.values(), laplacian[1e-4]]})
    assert said.verdict == HOLDS
    assert said.ours == "42.5 dB against 42.5 dB, 8 pairs"  # of the level that both have, and not of 40 against 25
    assert verdict(one, gaussian[1e-3], laplacian[1e-4]) == MISSING
    anywhere = claim("equivalent", margin=1, **sides)  # the levels vary all the same
    assert verdict(anywhere, *gaussian.values(), laplacian[1e-4]) == HOLDS


def test_a_claim_of_several_values_is_not_measured_where_cells_of_one_are_still_to_be_run():
    cells = [noisy("gaussian", variance, BAD) for variance in (1e-2, 1e-1)]
    listed = {"defense.variance": [1e-2, 1e-1, 1.0]}
    rate = claim("rate", of="MSE < 0.03", where=listed, expect="<= 0.5")
    mean = claim("mean", of="psnr_db", where=listed, expect="<= 20")
    rows = {"along": "defense.variance", "levels": [1e-2, 1e-1]}
    trend = claim("trend", column="psnr_db", expect="falls", **rows)
    every = [rate, mean, trend]
    wanted = {"dlg-noise": [cell.config for cell in cells]}  # of this size nothing has the variance 1
    assert MISSING not in [said.verdict for said in verify(every, {"dlg-noise": cells}, wanted)]
    assert {said.verdict for said in verify(every, {"dlg-noise": cells[1:]}, wanted)} == {MISSING}


def test_a_victim_counts_once_in_however_many_cells_it_is():
    cells = [Cell([f"federation.batch_size={b}"], {"naive": GOOD[:4]}) for b in (1, 2)]
    one = claim("rate", of="MSE < 0.03", expect=">= 0.5")
    (said,) = verify([one], {"dlg-noise": cells})
    assert said.verdict == OPEN  # 8 of 8 would be 0.4 %
    assert said.ours == "8/8 = 100% [51%, 100%], 4 updates"
    others = Cell(["data=svhn"], {"naive": GOOD[:4]})  # of the same places, and other images
    assert verdict(one, cells[0], others) == HOLDS
    (said,) = verify([claim("mean", of="psnr_db", expect=">= 20")], {"dlg-noise": cells})
    assert said.ours.endswith("n=4")


def test_images_of_one_update_are_one_trial():
    batch = Cell(["federation.batch_size=4"], {"naive": GOOD}, images=4)
    (said,) = verify([claim("rate", of="MSE < 0.03", expect=">= 0.5")], {"dlg-noise": [batch]})
    assert said.verdict == OPEN
    assert said.ours == "8/8 = 100% [34%, 100%], 2 updates"
    (said,) = verify([claim("mean", of="psnr_db", expect=">= 20")], {"dlg-noise": [batch]})
    assert said.ours.endswith("n=2")
    behind = Cell(["federation.batch_size=4", "defense=fp16"], {"naive": BAD}, images=4)
    one = claim("difference", column="psnr_db", of={"defense": "fp16"}, than={"defense": "none"}, expect="<= 0")
    (said,) = verify([one], {"dlg-noise": [batch, behind]})
    assert said.ours.endswith("2 pairs")
    larger = [Cell([f"federation.batch_size={n}"], {"naive": np.array(GOOD) - 2 * n}, images=n) for n in (1, 2, 4)]
    along = claim("trend", column="psnr_db", along="federation.batch_size", levels=[1, 2, 4], expect="falls")
    (said,) = verify([along], {"dlg-noise": larger})
    assert said.ours.endswith("n=14")


def test_seeds_of_a_setting_are_one_point_of_a_correlation():
    cells = [noisy("gaussian", 10.0**-level, np.array(GOOD) - 3 * level, f"seed={seed}") for level in range(6) for seed in range(3)]
    for i, cell in enumerate(cells):
        cell._leaks["first_layer_error"] = -float(i // 3) + (i % 3) / 10
    one = claim("correlation", columns=["first_layer_error", "mse"], expect="<= -0.5")
    (said,) = verify([one], {"dlg-noise": cells})
    assert said.ours == "rho = -1.00 over 6 settings"
    assert said.verdict == HOLDS
    assert verdict(one, *cells[:12]) == MISSING  # four settings, in however many cells


def test_what_leaks_less_leaks_less_though_searches_that_did_not_end_had_found_everything():
    half = [True] * 4 + [False] * 4
    less = {"column": "psnr_db", "of": {"defense": "fp16"}, "than": {"defense": "none"}, "expect": "<= 0"}
    more = less | {"of": {"defense": "none"}, "than": {"defense": "fp16"}, "expect": ">= 0"}

    def said(attacker, settings, converged, where=GOOD):
        cells = Cell(["defense=fp16"], {attacker: BAD}, converged=converged), Cell([], {attacker: where})
        (one,) = verify([claim("difference", attacker, **settings)], {"dlg-noise": cells})
        return one.verdict, one.ours.rpartition("pairs")[2]

    for settings in (less, more):
        lost = ", not ended: 4/8 and 0/8" if settings is less else ", not ended: 0/8 and 4/8"
        assert said("adaptive", settings, converged=True) == (HOLDS, "")
        assert said("adaptive", settings, converged=half) == (OPEN, lost)
        assert said("adaptive", settings, converged=[False] + [True] * 7) == (HOLDS, lost.replace("4/", "1/"))
        assert said("naive", settings, converged=half) == (HOLDS, lost)  # the same budget gave him no more
    leaks = less | {"expect": ">= 0"}
    assert said("adaptive", leaks, converged=True)[0] == REFUTED
    assert said("adaptive", leaks, converged=half)[0] == OPEN


def test_who_is_compared_with_somebody_who_knows_refutes_nothing_by_searches_of_his_that_did_not_end():
    """A claim that names no attacker may compare the two, or attacks of which one knows the defense."""
    gain = {"column": "psnr_db", "of": {"attacker": "adaptive"}, "than": {"attacker": "naive"}, "expect": ">= 10"}
    for converged, said in ((True, REFUTED), (False, OPEN)):
        cell = Cell(["defense=fp16"], {"naive": BAD, "adaptive": BAD[::-1]}, converged=converged)
        assert verdict(claim("difference", "any", **gain), cell) == said
    attacks = {"precode_ignore": BAD, "precode_aware": BAD[::-1]}
    cells = [Cell([f"attack={attack}"], {"adaptive": reached}, converged=False) for attack, reached in attacks.items()]
    gain |= {"of": {"attack": "precode_ignore"}, "than": {"attack": "precode_aware"}}
    assert verdict(claim("difference", "any", **gain), *cells) == OPEN


def test_means_and_trends_mind_searches_that_did_not_end():
    never = [False] * 8
    found = claim("mean", of="psnr_db", expect=">= 20"), claim("mean", of="mse", expect="<= 0.01")
    for one in found:
        assert verdict(one, Cell([], {"naive": BAD})) == REFUTED
        assert verdict(one, Cell([], {"naive": BAD}, converged=False)) == OPEN
        assert verdict(one, Cell([], {"naive": GOOD}, converged=False)) == HOLDS
    hidden = claim("mean", "both", of="psnr_db", expect="<= 20")
    assert verdict(hidden, Cell([], {"naive": BAD, "adaptive": BAD})) == HOLDS
    assert verdict(hidden, Cell([], {"naive": BAD, "adaptive": BAD}, converged=False)) == OPEN
    levels = [1e-4, 1e-3, 1e-2]
    rows = {"column": "psnr_db", "along": "defense.variance", "levels": levels, "expect": "falls"}

    def along(attacker, converged):
        last = Cell(["defense=gaussian", "defense.relative=null", "defense.variance=0.01"], {attacker: BAD}, converged=converged)
        cells = [noisy("gaussian", v, GOOD, attacker=attacker) for v in levels[:2]]
        (said,) = verify([claim("trend", attacker, **rows)], {"dlg-noise": [*cells, last]})
        return said.verdict, said.ours.partition("n=24")[2]

    assert along("adaptive", True) == (HOLDS, "")
    assert along("adaptive", never) == (OPEN, ", not ended: 8/24")
    assert along("naive", never) == (HOLDS, ", not ended: 8/24")


def test_what_was_made_of_a_cell_later_by_another_attack_answers_nothing():
    cell = Cell(["attack=idlg"], {"naive": GOOD})
    one = claim("rate", of="MSE < 0.03", where={"attack": "idlg"}, expect=">= 0.5")
    again = cell._leaks.assign(attack="dlg", mse=1.0)
    cell._leaks = pd.concat([cell._leaks, again], ignore_index=True)
    (said,) = verify([one], {"dlg-noise": [cell]})
    assert said.ours.startswith("8/8")


def test_searches_that_did_not_end_show_no_protection():
    """However little an attacker tried, no protection can come of it, and no refuted leak; who steals all the same is as sure."""
    one = claim("rate", "both", of="MSE < 0.03", where={"defense": "fp16"}, expect="<= 0.5")
    starved = Cell(["defense=fp16"], {"naive": BAD, "adaptive": BAD}, converged=False)
    (said,) = verify([one], {"dlg-noise": [starved]})
    assert said.verdict == OPEN
    assert said.ours.count("8 not converged") == 2
    assert verdict(one, Cell(["defense=fp16"], {"naive": BAD, "adaptive": GOOD}, converged=False)) == NAIVE
    does_not = claim("rate", of="MSE < 0.03", expect=">= 0.5")
    assert verdict(does_not, starved) == OPEN
    assert verdict(does_not, Cell(["defense=fp16"], {"naive": BAD})) == REFUTED


def test_who_knows_may_need_another_attack():
    told = {"of": "MSE < 0.03", "where": {"attack": "idlg"}, "knowing": {"attack": "analytic"}, "expect": "<= 0.5"}
    cells = Cell(["attack=idlg"], {"naive": BAD}), Cell(["attack=analytic"], {"naive": GOOD})
    assert verdict(claim("rate", "both", **told), *cells) == NAIVE


def test_scores_at_the_end_of_their_scale_are_no_proof():
    def said(n, bound):
        cell = Cell([], {"naive": GOOD[:1] * n})
        cell._leaks["rougeL"] = 1.0
        return verdict(claim("mean", of="rougeL", expect=bound), cell)

    assert said(12, ">= 0.95") == OPEN  # with a mean of 0.95, twelve of twelve are 1 in 54 % of cases
    assert said(60, ">= 0.95") == HOLDS
    assert said(12, "<= 0.5") == REFUTED
    same = Cell(["defense=fp16"], {"naive": [100.0] * 4}), Cell([], {"naive": [100.0] * 4})
    near = claim("equivalent", column="psnr_db", of={"defense": "fp16"}, than={"defense": "none"}, margin=1)
    assert verdict(near, *same) == OPEN


def test_rounds_are_named_by_their_place_among_those_attacked():
    cell = Cell([], {"naive": GOOD})
    later = [cell._leaks.assign(round=round, psnr_db=cell._leaks["psnr_db"] - round) for round in (1, 20, 7)]
    cell._leaks = pd.concat(later, ignore_index=True)
    for name, round in (("first", 1), ("middle", 7), ("last", 20)):
        (said,) = verify([claim("mean", of="psnr_db", where={"round": name}, expect=">= 0")], {"dlg-noise": [cell]})
        assert said.ours.startswith(f"{33.5 - round:.1f} dB")


def test_accuracies_are_compared_under_one_condition_and_runs_that_broke_off_are_named():
    def cells(lr, none, fp16):
        made = [("none", none), ("fp16", fp16)]
        return [
            Cell([f"defense={d}", f"seed={s}", f"federation.lr={lr}"], {"naive": GOOD}, a + s / 100)
            for d, a in made
            for s in range(3)
        ]

    one = claim("equivalent", column="accuracy", of={"defense": "fp16"}, than={"defense": "none"}, margin=0.02)
    worse = [*cells(0.1, 0.5, 0.2), *cells(0.2, 0.5, 0.5)]
    (said,) = verify([one], {"dlg-noise": worse})
    assert said.verdict != HOLDS
    assert said.ours.endswith("6 pairs")
    worse[-1]._rounds = worse[-1]._rounds.iloc[:2]
    worse[0]._rounds = worse[0]._rounds.iloc[:0]
    (said,) = verify([one], {"dlg-noise": worse})
    assert said.ours.endswith("4 pairs, 1 of 6 runs and 1 of 6 runs did not finish")


def test_accuracy_is_that_of_runs_and_equivalence_is_shown_by_two_tests():
    cells = [Cell([f"defense={d}", f"seed={s}"], {"naive": GOOD}, 0.5 + s / 10 + e) for s in range(3) for d, e in NEAR.items()]
    near = claim("equivalent", column="accuracy", of={"defense": "fp16"}, than={"defense": "none"}, margin=0.02)
    far = claim("equivalent", column="accuracy", of={"defense": "int8"}, than={"defense": "none"}, margin=0.02)
    assert [one.verdict for one in verify([near, far], {"dlg-noise": cells})] == [HOLDS, REFUTED]


NEAR = {"none": 0.0, "fp16": 0.001, "int8": -0.1}


def test_a_run_that_was_stopped_has_no_accuracy_to_compare():
    cells = [Cell([f"defense={d}", f"seed={s}", *more], {"naive": GOOD}, 0.5) for s in range(3) for d, more in ENDS.items()]
    one = claim("equivalent", column="accuracy", of={"defense": "fp16"}, than={"defense": "none"}, margin=0.02)
    assert verdict(one, *cells) == MISSING


ENDS = {"none": [], "fp16": ["rounds=21"]}


def test_what_is_broken_is_no_missing_measurement():
    one = claim("rate", of="MSE < 0.03", expect=">= 0.5")
    cell = Cell([], {"naive": GOOD})
    del cell._leaks["client"]
    with pytest.raises(KeyError, match="client"):
        verdict(one, cell)


def test_a_trend_goes_along_a_setting_and_the_numbers_are_shown():
    cells = [Cell([f"federation.batch_size={b}"], {"naive": np.array(GOOD) - 5 * b}) for b in (1, 2, 4)]
    along = {"column": "psnr_db", "along": "federation.batch_size", "levels": [1, 2, 4]}
    falls, rises = (claim("trend", **along, expect=way) for way in ("falls", "rises"))
    said = verify([falls, rises], {"dlg-noise": cells})
    assert [one.verdict for one in said] == [HOLDS, REFUTED]
    assert said[0].ours.startswith("28.5 dB → 23.5 dB → 13.5 dB")


def test_a_trend_of_several_levels_needs_three():
    along = {"column": "psnr_db", "along": "federation.batch_size", "levels": [1, 2, 4, 8], "expect": "falls"}
    cells = [Cell([f"federation.batch_size={b}"], {"naive": np.array(GOOD) - 2 * b}) for b in (1, 4, 8)]
    (said,) = verify([claim("trend", **along)], {"dlg-noise": cells})
    assert said.verdict == HOLDS
    assert said.ours.startswith("31.5 dB → 25.5 dB → 17.5 dB")
    assert verdict(claim("trend", **along), *cells[:2]) == MISSING


def test_a_trend_goes_along_the_rounds_of_a_training():
    cells = [Cell([f"seed={seed}"], {"naive": GOOD}, accuracy=0.5 + seed / 100) for seed in (0, 1, 2)]
    for cell in cells:
        cell._rounds = pd.DataFrame({"round": [0, 10, 15, 20], "accuracy": [0.9, 0.2, None, cell._rounds["accuracy"].iloc[-1]]})
    said = verify([claim("trend", column="accuracy", along="round", levels=[10, 20], expect="rises")], {"dlg-noise": cells})
    assert said[0].ours == "20.0% → 51.0%, n=6"
    assert said[0].verdict == HOLDS
    assert verdict(claim("trend", column="accuracy", along="round", levels=[10, 15], expect="rises"), *cells) == MISSING


def test_many_claims_of_a_study_are_harder_to_show_than_one():
    cell = Cell([], {"naive": [30.0] * 7 + [8.0]})  # 7 of 8: p = 3.5 % of at most half
    one = claim("rate", of="MSE < 0.03", expect=">= 0.5")
    assert verdict(one, cell) == HOLDS
    assert [said.verdict for said in verify([one, one], {"dlg-noise": [cell]})] == [OPEN, OPEN]


def test_names_numbers_and_lists_are_matched():
    settings = {"defense": "gaussian", "defense.variance": 0.001, "model.init.distribution": "normal"}
    assert matches(settings, {"defense": "gauss*", "defense.variance": [1, 1e-3]})
    assert not matches(settings, {"defense.variance": 1e-2})
    assert not matches(settings, {"defense.levels": 16})


SEEDS = {f"seed={seed}" for seed in range(1, 10)}  # are as the first


def test_every_claim_there_is_can_be_answered(monkeypatch):
    monkeypatch.setattr(study, "compose", functools.lru_cache(lambda settings: compose(settings)))
    sweeping = study.sweep
    monkeypatch.setattr(study, "sweep", lambda settings: [tuple(one) for one in sweeping(settings) if not SEEDS & set(one)])
    said = claims.load()
    assert {one.study for one in said} - {claims.UNIT} <= set(study.names())
    for one in said:
        assert isinstance(one.row, str)
        assert one.attacker in ("naive", "adaptive", "both", "any")
        if one.check in claims.UNMEASURED:
            continue
        inspect.signature(CHECKS[one.check]).bind(None, None, **one.settings)
        where = one.settings.get("where", {})
        sides = [where | side for side in (one.settings.get("of"), one.settings.get("than")) if isinstance(side, dict)] or [where]
        sides += [where | one.settings["knowing"]] if "knowing" in one.settings else []
        assert all(side.get("round", "last") in STAGES for side in sides)  # is in studies of both sizes
        sides = [{key: value for key, value in side.items() if key not in ROWS} for side in sides]
        larger = [  # what the full size has besides
            f"{key}={','.join(sorted({value, *usual}))}"
            for key, usual in (("model", ("mcmahan_cnn",)), ("data", ("cifar10",)))
            for value in {side.get(key) for side in sides} & {"resnet18", "svhn", "mnist", "cifar100"}
        ]
        cells = [flat(config) for config in study.load(one.study).cells("quick", larger).values()]
        for side in sides:
            assert any(matches(settings, side) for settings in cells), (one.row, side)


def test_the_tests_that_claims_name_are_there():
    nodes = [one.settings["expect"] for one in claims.load() if one.check == "test"]
    root = claims.Path(claims.__file__).parent.parent
    for node in nodes:
        file, name = node.split("::")
        assert f"def {name}(" in (root / file).read_text()


def test_a_test_that_fails_refutes(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "experiments").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(
        "import pytest\n\n@pytest.mark.parametrize('n', [1, 2])\ndef test_good(n): pass\n\n"
        "@pytest.mark.parametrize('n', [1, 2])\ndef test_bad(n): assert n == 1\n\ndef test_left(): pytest.skip('not here')\n"
    )
    monkeypatch.setattr(claims, "__file__", str(tmp_path / "experiments" / "claims.py"))
    nodes = [f"tests/test_it.py::test_{name}" for name in ("good", "bad", "left")]
    said = verify([Claim("X", claims.UNIT, "w", "s", "test", {"expect": node}) for node in nodes], {})
    assert [one.verdict for one in said] == [HOLDS, REFUTED, MISSING]


def test_verify_answers_a_study_that_was_run(tmp_path, capsys):
    tiny = ["data=synthetic", "data.train_size=40", "data.test_size=20", "federation.clients=2", "federation.per_round=2"]
    out = tmp_path / "study-resolution-quick"
    assert main(["study", "resolution", *tiny, "seed=0", "data.side=16,32", "attack.evaluations=2", "-o", str(out)]) == 0
    capsys.readouterr()
    assert main(["verify", "resolution", "--runs", str(tmp_path), "--format", "csv"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 + sum(one.study == "resolution" for one in claims.load())
    assert all(line.endswith(MISSING) for line in said[1:])  # of other evaluations, and of 64 pixels, nothing was measured
    shutil.rmtree(next(out.glob("*side=32*")))
    assert main(["verify", "resolution", "--runs", str(tmp_path)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "resolution was run with data=synthetic" in told
    assert "of resolution 1 of 2 cells are finished" in told
    assert main(["report", str(out), "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert all(one.claim in page for one in claims.load() if one.study == "resolution")
    assert "Claims, by" not in page
    again = shutil.copytree(out, tmp_path / "again" / "resolution")
    assert main(["report", str(out), str(again), "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert all(f'"Claims, by {base}"' in page for base in (out, again))  # an answer each, and whose it is
    capsys.readouterr()
    assert main(["verify", "resolution", "--full", "--runs", str(tmp_path), "--format", "csv"]) == 0
    assert all("fedsim study resolution --full" in line for line in capsys.readouterr().out.splitlines()[1:])
    assert main(["verify", "frontier"]) == 2
    assert "frontier answers no claim" in capsys.readouterr().err
    capsys.readouterr()
    assert main(["verify", f"dlg-resnet={out}"]) == 2
    assert capsys.readouterr().err == f"error: {out} is the folder of the study resolution: name another for dlg-resnet\n"
    assert main(["verify", "resolutoin"]) == 2
    assert "resolution" in capsys.readouterr().err
