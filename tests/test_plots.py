"""Figures of many defenses: nothing overflows, and nothing is left out."""

import matplotlib
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from experiments import plots, summary
from experiments.canvas import STYLE, save
from experiments.config import compose
from experiments.runner import start
from fedsim.files import read_table, write_table
from fedsim.run import RunFolder

NAMES = [f"gaussian variance=1e-{i}, and more" for i in range(45)]


@pytest.fixture(autouse=True)
def _styled():
    matplotlib.use("Agg")
    with plt.rc_context(STYLE):
        yield


def leaks() -> pd.DataFrame:
    """Two victims of each attacker and defense; none has nothing to know."""
    rows = [
        {
            "defense": name + (summary.KNOWING if who == "adaptive" else ""),
            "attacker": who,
            "psnr_db": 10.0 + i + 5 * (who == "adaptive"),
            "client": client,
        }
        for i, name in enumerate(["none", *NAMES])
        for who in (("naive", "adaptive") if i else ("naive",))
        for client in range(2)
    ]
    about = {
        "under": "",
        "seed": 0,
        "seen": "update",
        "image": 0,
        "attack": "dlg",
        "round": 1,
        "run": "here",
        "verdict": "stolen",
        "converged": True,
        "mean_image_psnr_db": 13.0,
    }
    return pd.DataFrame(rows).assign(**about)


def test_many_defenses_have_a_row_each_with_both_attackers():
    figure = plots._leak(leaks(), "dlg", plots.IMAGES)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["none", *NAMES]
    naive, adaptive = (mark.get_offsets() for mark in axes.collections[1::2])
    assert naive[:, 0].tolist() == [10.0 + i for i in range(46)]
    assert adaptive[:, 0].tolist() == [15.0 + i for i in range(1, 46)]
    assert adaptive[:, 1].tolist() == pytest.approx([i + 0.15 for i in range(1, 46)])


def test_open_marks_are_the_searches_that_tables_count_as_not_converged():
    some = leaks()[:3].assign(converged=[True, False, False], verdict=["not stolen", "stolen", "not converged"])
    marks = plots._leak(some.assign(defense="none"), "dlg", plots.IMAGES).axes[0].collections
    assert [len(mark.get_offsets()) for mark in marks] == [2, 1]
    assert [len(mark.get_facecolor()) for mark in marks] == [1, 0]


def test_several_defenses_have_a_panel_each_with_both_attackers_in_their_rounds():
    few = leaks()
    few = few[few["defense"].str.removesuffix(summary.KNOWING).isin(["none", *NAMES[:5]])]
    some = pd.concat([few, few.assign(round=7)])
    figure = plots._leak(some, "dlg", plots.IMAGES)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title().replace("\n", " ") for axes in panels] == ["none", *NAMES[:5]]
    for i, axes in enumerate(panels):
        naive, *adaptive = [line.get_xydata().tolist() for line in axes.get_lines() if len(line.get_xdata()) == 2][: 1 + (i > 0)]
        assert naive == [[pytest.approx(j - 0.15), 10.0 + i] for j in range(2)]
        assert adaptive == [[[pytest.approx(j + 0.15), 15.0 + i] for j in range(2)]] * (i > 0)


def test_many_defenses_are_ranked_by_the_stronger_attacker_and_by_what_they_cost():
    some = leaks()
    some = some.assign(run=some["defense"].str.removesuffix(summary.KNOWING), verdict="not stolen")
    seen = some["defense"].isin([NAMES[3], NAMES[7] + summary.KNOWING])
    some.loc[seen, "verdict"] = "stolen"
    rounds = pd.DataFrame(
        {"run": name, "defense": name, "seed": 0, "round": round, "accuracy": 0.01 * i * round}
        for i, name in enumerate(["none", *NAMES])
        for round in (1, 2)
    )
    broken = rounds[rounds["run"] == NAMES[9]].assign(run="broken", seed=1)[:1]
    some.loc[some.index[some["run"] == NAMES[9]][:1], "run"] = "broken"
    figure = plots._pareto(pd.concat([rounds, broken]), some, "dlg", "images")
    left, right = figure.axes
    best_first = [*NAMES[::-1], "none"]
    ranked = [name for name in best_first if name not in (NAMES[3], NAMES[7])] + [NAMES[7], NAMES[3]]
    assert [label.get_text() for label in left.get_yticklabels()] == ranked
    points = [bar.lines[0].get_xydata()[0].tolist() for bar in right.containers]
    naive, adaptive = points[:46], points[46:]  # nobody is adaptive against none
    assert [place for place in naive if place[0]] == [[1.0, 45 - 0.15]]
    assert [place for place in adaptive if place[0]] == [[1.0, 44 + 0.15]]
    costs = {row: x for (x, row) in (bar.lines[0].get_xydata()[0].tolist() for bar in left.containers)}
    assert costs[ranked.index(NAMES[9])] == pytest.approx(0.2)  # and not 0.15, with what broke off


def test_names_of_any_length_leave_room_for_the_marks():
    named = leaks().assign(attack="cosine_adam")
    named["defense"] = "pruning share=0.2 mode=literal, init=Kaiming distribution=uniform activation=sigmoid " + named["defense"]
    figure = plots._leak(named, "cosine_adam", plots.IMAGES)
    figure.canvas.draw()
    (axes,) = figure.axes
    for text in (axes.title, axes.xaxis.label, *axes.get_yticklabels()):
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1, text.get_text()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("many", [2, 6, 12, 45])
def test_legends_of_any_length_fit_their_figure(many, tmp_path):
    some = leaks()
    some = some[some["defense"].isin([*NAMES[:many], *(name + summary.KNOWING for name in NAMES[:many])])]
    rounds = pd.DataFrame(
        [
            {"defense": name, "run": name, "seed": 0, "round": round, "accuracy": 0.1 * round, "bytes_up": 1000}
            for name in NAMES[:many]
            for round in (1, 2)
        ]
    )
    some = some.assign(run=some["defense"].str.removesuffix(summary.KNOWING))
    figures = {
        "accuracy": plots._accuracy(rounds),
        "bytes": plots._bytes(rounds),
        "leak": plots._leak(some, "dlg", plots.IMAGES),
        "pareto": plots._pareto(rounds, some, "dlg", "images"),
    }
    for name, figure in figures.items():
        figure.canvas.draw()
        legend = figure.legends[0] if figure.legends else figure.axes[0].get_legend()
        box, page = legend.get_window_extent(), figure.bbox
        assert page.x0 <= box.x0, name
        assert box.x1 <= page.x1 + 1, name
        assert page.y0 - 1 <= box.y0, name
        assert box.y1 <= page.y1 + 1, name
        assert save(figure, tmp_path / name).stat().st_size > 0


def test_contenders_look_different():
    looks = [tuple(plots._look(i).values()) for i in range(64)]
    assert len(set(looks)) == 64


def test_rows_of_pictures_are_spread_over_pages(tmp_path, monkeypatch):
    small = [
        "data.train_size=40",
        "data.test_size=20",
        "federation.clients=2",
        "federation.per_round=2",
        "rounds=1",
        "tap.when=end",
    ]
    attack = ["attack=cosine_lbfgs", "attack.evaluations=4", "attacker=naive"]
    folders = [
        start(compose([*small, *attack, f"defense={name}"]), tmp_path / name, "a test") for name in ("none", "uniform", "topk")
    ]
    assert (tmp_path / "one") / "pictures_cosine_lbfgs.png" in plots.draw(folders, tmp_path / "one")
    monkeypatch.setattr(plots, "PAGE", 2)
    made = [path.name for path in plots.draw(folders, tmp_path / "two")]
    assert [name for name in made if name.startswith("pictures")] == ["pictures_cosine_lbfgs_1.png", "pictures_cosine_lbfgs_2.png"]


def test_rows_of_pictures_have_room_for_their_names(tmp_path):
    tiny = ["data.train_size=8", "data.test_size=8", "federation.clients=1", "federation.per_round=1", "rounds=1", "tap.when=end"]
    attack = ["attack=cosine_lbfgs", "attack.evaluations=2", "attacker=naive"]
    folders = [
        start(compose([*tiny, *attack, f"model={model}", "model.activation=sigmoid"]), tmp_path / model, "a test")
        for model in ("lenet", "mcmahan_cnn")
    ]
    (page,) = plots._pictures(folders, "cosine_lbfgs")
    figure = page()
    figure.canvas.draw()
    names = [axes.yaxis.label for axes in figure.axes if axes.get_ylabel()]
    assert any("model=mcmahan_cnn" in name.get_text() for name in names)
    assert all(name.get_window_extent().x0 >= 0 for name in names)
    assert "lenet, mcmahan_cnn" in figure.get_suptitle().replace("\n", " ")


def test_what_a_run_that_broke_off_had_learned_is_not_averaged_with_others(tmp_path):
    tiny = ["data.train_size=40", "data.test_size=20", "federation.clients=2", "federation.per_round=2", "rounds=2", "attack=none"]
    folders = [start(compose([*tiny, f"seed={seed}"]), tmp_path / str(seed), "a test") for seed in (0, 1)]
    whole = [str(folder.rounds()["accuracy"].iloc[-1]) for folder in folders]
    assert summary.summarised(folders).notes == []
    path = folders[1].path / "rounds.parquet"
    write_table(path, read_table(path).query("round < 2"))
    told = summary.summarised([RunFolder.open(folder.path) for folder in folders])
    assert told.rows[0][1] == f"{float(whole[0]):.1%}"
    assert told.notes == ["did not finish: 1 of 2 runs of none; accuracy and bytes are of those that came furthest"]
    write_table(folders[0].path / "rounds.parquet", folders[0].rounds().query("round < 2"))
    (row,) = summary.summarised([RunFolder.open(folder.path) for folder in folders]).rows  # neither came further
    early = [RunFolder.open(folder.path).rounds().dropna(subset="accuracy")["accuracy"].iloc[-1] for folder in folders]
    assert row[1] == f"{sum(early) / 2:.1%}"


def test_a_training_that_was_run_twice_weighs_no_more_than_another():
    def run(name: str, seed: int, accuracies: list[float | None]) -> pd.DataFrame:
        about = {"run": name, "defense": "none", "seed": seed, "accuracy": accuracies}
        return pd.DataFrame({"round": range(len(accuracies)), **about}).astype({"accuracy": float})

    once, other = run("a", 0, [0.1, 0.5]), run("b", 1, [0.1, 0.9])
    for again in (run("c", 0, [0.1, 0.5]), run("c", 0, [None, 0.5]), run("c", 0, [0.1])):  # tested less often; broken off
        for order in ([once, again, other], [again, other, once]):
            rounds = summary.furthest(pd.concat(order))
            assert rounds.groupby("round")["accuracy"].mean().tolist() == [0.1, 0.7]
            assert rounds["run"].nunique() == 2


def test_the_mean_of_equal_accuracies_does_not_reach_beyond_them():
    final = pd.Series([0.05] * 3)
    assert final.mean() > final.max()  # as floats are rounded
    assert plots._range(final) == [[pytest.approx(0.0)], [0.0]]
