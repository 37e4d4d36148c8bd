"""The report page: its numbers are those of the runs' tables, it needs nothing but itself, and it works in a browser."""

import base64
import csv
import io
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageSequence
from rich.console import Console
from test_cli import fedsim

from experiments import plots, report, runner, summary, table
from experiments.config import compose
from experiments.naming import contender
from fedsim.files import read_json, read_table, write_json, write_table
from fedsim.run import RunFolder
from fedsim.setup import setup_of

SMALL = ["data.train_size=41", "data.test_size=13", "federation.clients=3", "federation.per_round=2", "rounds=2", "device=cpu"]
SMALL += ["engine.workers=1", "tap.every=null", "tap.rounds=[1,2]", "tap.clients=2", "model=lenet_silu"]
SMALL += ["attack=cosine_lbfgs", "attack.evaluations=6", "attack.restarts=1", "attack.record=2", "attacker=both"]
EVIL = "<img src=x onerror=alert(1)></script><b>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the path: apt-get install chromium")


RUNS = {"coarse": ["defense=uniform", "defense.levels=4"], "fine": ["defense=uniform", "defense.levels=64"], "none": []}


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Runs of two rounds, attacked by somebody who knows the defense and by somebody who does not; the defense has an evil name."""
    out = tmp_path_factory.mktemp("study")
    for name, more in RUNS.items():
        runner.start(compose([*SMALL, *more]), out / name, "fedsim a test")
        if more:
            path = out / name / "config.json"
            config = read_json(path)
            config["choices"]["defense"] = EVIL
            write_json(path, config)
    return out


@pytest.fixture(scope="module")
def page(study, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert fedsim("report", study, "-o", path) == 0
    return path


def data_in(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


# The summary as text.


def test_the_table_says_in_each_format_what_the_terminal_says(study, capsys):
    folders = [RunFolder(study / name) for name in RUNS]
    told = summary.summarised(folders)
    shown = table.drawn(told)
    assert [list(column.cells) for column in shown.columns] == [
        list(cells) for cells in zip(*told.rows, *told.guesses, strict=True)
    ]
    assert fedsim("table", study, "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == len(told.rows + told.guesses)
    for row, cells in zip(rows, told.rows + told.guesses, strict=True):
        said = dict(zip(told.columns, cells, strict=True))
        low, high = (f"{100 * float(row[f'stolen_{end}']):.0f}" for end in ("low", "high"))
        assert said["stolen"] == f"{row['stolen']}/{row['victims']}, {low}-{high} %"
        assert said["> 20 dB"].split(",")[0] == row["psnr_db_20"]
        assert said["PSNR"] == f"{float(row['median_psnr_db']):.1f} dB"
        if row["attacker"] == "knows nothing":
            continue
        assert said["not converged"] == f"{row['not_converged']}/{row['victims']}"
        assert said["labels"] == f"{row['labels_right']}/{row['victims']}"
        assert said["accuracy"] == f"{float(row['accuracy']):.1%}"
        assert said["of dense"] == f"{float(row['bytes_share']):.1%}"
    assert fedsim("table", study) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 2 + len(told.rows + told.guesses)
    assert all(len(re.findall(r"(?<!\\)\|", row)) == len(told.columns) + 1 for row in rows)
    assert not re.search(r"(?<!\\)<", "".join(rows))
    assert fedsim("table", study, "--format", "latex") == 0
    latex = capsys.readouterr().out
    body = [line for line in latex.splitlines() if line.endswith(r" \\")]
    assert all(line.count(" & ") == len(told.columns) - 1 for line in body)
    assert not re.search(r"(?<!\\)[%#$_](?!\\geq\$)", latex.replace(r"$\geq$", ""))


def test_latex_says_what_is_special_in_words():
    strange = summary.Summary("50%", ["a_b", "x"], [["\\ & {~}", "<5\nworse"]], [], [])
    assert r"\textbackslash{} \& \{\textasciitilde{}\} & \textless{}5; worse \\" in table.written(strange, "latex")


def test_names_are_whole_in_a_narrow_terminal():
    rows = [[f"uniform levels={levels}", *["61-100 %"] * 12] for levels in (4, 16, 120)]
    told = summary.Summary("a title", ["defense", *["not converged"] * 12], rows, [["its mean colour", *[""] * 12]], [])
    console = Console(width=100, file=io.StringIO())
    console.print(table.drawn(told))
    shown = console.file.getvalue()
    assert all(word in shown for word in ("uniform", "levels=4", "levels=16", "levels=120", "colour"))


@pytest.mark.parametrize("command", [("table",), ("report",), ("table", "--format", "word")])
def test_bad_input_is_one_line(command, study, tmp_path, capsys):
    what, *more = command
    where = study if more else tmp_path
    assert fedsim(what, where, *more) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert ("holds no run" if not more else "'word'") in said


def test_a_run_that_nobody_attacked_has_nothing_to_report(study, tmp_path, capsys):
    shutil.copytree(study / "none", tmp_path / "alone")
    (tmp_path / "alone" / "leaks.parquet").unlink()
    assert fedsim("report", tmp_path / "alone", "-o", tmp_path / "report.html") == 2
    said = capsys.readouterr().err
    assert "nothing was attacked" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


# What the page holds.


def test_numbers_are_those_of_the_tables(study, page):
    data = data_in(page)
    folders = [RunFolder(study / name) for name in RUNS]
    told = summary.summarised(folders)
    (shown,) = data["tables"]
    assert (shown["section"], shown["columns"], shown["rows"]) == ("Summary table", told.columns, told.rows)
    seen = set()
    for folder in folders:
        leaks, rounds, name = folder.leaks(), folder.rounds(), contender(folder.config)
        for point in data["points"]:
            if point["contender"] != name:
                continue
            of = leaks[leaks["attacker"] == point["attacker"]]
            of = of if point["stage"] is None else of[of["round"] == point["stage"]]
            assert point["n"] == len(of)
            assert point["stolen"] == (of["verdict"] == "stolen").sum()
            assert point["lost"] == (of["verdict"] == "not converged").sum()
            assert point["median"] == pytest.approx(of["psnr_db"].median())
            until = rounds if point["stage"] is None else rounds[rounds["round"] <= point["stage"]]
            assert point["accuracy"] == until["accuracy"].iloc[-1]
            assert point["sent"] == until["bytes_up"].sum()
            worst, median = (data["victims"][point[key]] for key in ("worst_victim", "median_victim"))
            assert worst["mse"] == of["mse"].min()
            assert median["mse"] == of["mse"].sort_values().iloc[(len(of) - 1) // 2]
            seen.add((name, point["attacker"], point["stage"]))
    both = {(f"{EVIL} levels={levels}", who) for levels in (4, 64) for who in ("naive", "adaptive")}
    assert seen == {(*one, stage) for one in both | {("none", "naive")} for stage in (None, 1, 2)}
    grey, mean = data["score"]["guesses"]
    every = pd.concat([folder.leaks() for folder in folders])
    assert (grey["name"], grey["median"]) == ("a grey card", every["grey_psnr_db"].median())
    assert (mean["name"], mean["share"]) == ("the mean image", (every["mean_image_mse"] < 0.03).mean())


def test_what_a_run_that_broke_off_learned_and_sent_is_not_averaged_with_others(study, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(study / "none", runs / "whole")
    runner.start(compose([*SMALL, "seed=1"]), runs / "broken", "fedsim a test")
    path = runs / "broken" / "rounds.parquet"
    write_table(path, read_table(path).query("round < 2"))
    assert fedsim("report", runs, "-o", tmp_path / "report.html") == 0
    data, rounds = data_in(tmp_path / "report.html"), RunFolder(runs / "whole").rounds()
    (one,), (point,) = data["contenders"], [point for point in data["points"] if point["stage"] is None]
    for shown in (one, point):
        assert shown["accuracy"] == rounds["accuracy"].iloc[-1]
        assert shown["sent"] == rounds["bytes_up"].sum()
    assert point["n"] == sum(len(RunFolder(runs / name).leaks()) for name in ("whole", "broken"))
    assert any("no run of the same defense came further: " in line for line in data["words"])


def test_a_victim_of_runs_alike_in_all_that_matters_counts_once(study, tmp_path):
    shutil.copytree(study / "none", tmp_path / "one")
    shutil.copytree(study / "none", tmp_path / "two")
    config = read_json(tmp_path / "two" / "config.json")
    config["engine"]["workers"] = 2
    write_json(tmp_path / "two" / "config.json", config)
    alone, both = ([RunFolder(tmp_path / name) for name in names] for names in (["one"], ["one", "two"]))
    assert summary.summarised(both).rows == summary.summarised(alone).rows
    assert (summary.tables(both)[1]["run"] == str(tmp_path / "one")).all()


def test_what_is_no_number_is_as_far_off_as_can_be(study, tmp_path):
    shutil.copytree(study / "none", tmp_path / "none")
    path = tmp_path / "none" / "leaks.parquet"
    leaks = read_table(path)
    leaks.loc[leaks.index[:3], "psnr_db"] = np.nan
    write_table(path, leaks)
    folders = [RunFolder(tmp_path / "none")]
    assert len(leaks) == 4
    expected = leaks["psnr_db"].fillna(0.0).median()
    assert f"{expected:.1f} dB" in summary.summarised(folders).rows[0]
    assert report.data_of(folders, "a test")["ranking"][0]["score"] == expected


def test_a_folder_without_a_finished_round_is_named_and_left_out(study, tmp_path):
    shutil.copytree(study / "none", tmp_path / "whole")
    (tmp_path / "begun").mkdir()
    for name in ("config.json", "environment.json"):
        shutil.copy(study / "coarse" / name, tmp_path / "begun")
    assert fedsim("report", tmp_path, "-o", tmp_path / "report.html") == 0
    data = data_in(tmp_path / "report.html")
    assert [one["name"] for one in data["contenders"]] == ["none"]
    assert "Without a finished round, and left out: begun." in data["words"]


def test_runs_whose_results_alone_came_from_elsewhere_are_reported_and_drawn_without_pictures(study, tmp_path):
    for name in ("none", "coarse"):
        shutil.copytree(study / name, tmp_path / name)
    shutil.rmtree(tmp_path / "coarse" / "reconstructions")
    folders = [RunFolder(tmp_path / name) for name in ("none", "coarse")]
    data = report.data_of(folders, "a test")
    assert "1 run without pictures of what was stolen: the results alone are there." in data["words"]
    for victim in data["victims"]:
        assert isinstance(victim["truth"], int)
        assert (victim["stolen"] is None) is (victim["run"] == data["contenders"][1]["runs"][0]["id"])
    assert data["left_out"] == {"pictures": 0, "animations": 0}
    assert any(path.name.startswith("pictures") for path in plots.draw(folders, tmp_path / "both"))
    assert not any(path.name.startswith("pictures") for path in plots.draw(folders[1:], tmp_path / "bare"))


def test_attacks_made_later_have_their_own_card_settings_and_command(study, tmp_path):
    shutil.copytree(study / "fine", tmp_path / "run")
    config = read_json(tmp_path / "run" / "config.json")
    config["choices"]["defense"] = "uniform"
    write_json(tmp_path / "run" / "config.json", config)
    asked = ["attack=idlg", "attack.evaluations=3", "attack.restarts=1", "attacker=naive"]
    assert fedsim("attack", tmp_path / "run", *asked) == 0
    (one,) = (data := report.data_of([RunFolder(tmp_path / "run")], "a test"))["contenders"]
    later = "idlg_restarts=1_evaluations=3"
    assert one["attacks"]["cosine_lbfgs"].startswith("cosine_lbfgs restarts=1 evaluations=6")
    assert one["attacks"][later] == later
    card = dict(one["card"])
    assert card["the defense, cosine_lbfgs"].startswith("not told; and once more told")
    assert card[f"the defense, {later}"] == "not told"
    (run,) = one["runs"]
    assert run["own"] == ["cosine_lbfgs", "cosine_lbfgs_adaptive"]
    assert run["later"] == {later: f"fedsim attack {tmp_path / 'run'} {shlex.join(asked)}"}
    assert {victim["made_by"] for victim in data["victims"]} == {*run["own"], later}
    assert {victim["run"] for victim in data["victims"]} == {run["id"]}


def test_pictures_are_the_originals_and_what_was_made_of_them(study, page):
    data, folder = data_in(page), RunFolder(study / "none")
    (shown,) = [one for one in data["gallery"] if one["kind"] == "none"]
    assert len(shown["victims"]) == len(folder.leaks())  # four, which is below the bound
    for both in shown["victims"]:
        victim = data["victims"][both["naive"]]
        truth = setup_of(folder.config).truth(victim["round"], victim["client"])[0][victim["image"]]
        made = folder.reconstructions("cosine_lbfgs", victim["round"])[victim["client"]][0]
        for what, image in (("truth", truth), ("stolen", made)):
            with Image.open(io.BytesIO(base64.b64decode(data["images"][victim[what]].split(",")[1]))) as file:
                pixels = np.asarray(file.convert("RGB"))
            assert np.abs(pixels / 255 - image.clamp(0, 1).permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
        with Image.open(io.BytesIO(base64.b64decode(data["films"][victim["film"]].split(",")[1]))) as film:
            shown = [moment.info["duration"] for moment in ImageSequence.Iterator(film) if moment.load() is not None]
        # Equal moments are one frame that stands as long as all of them; the last stands two seconds.
        evaluations = folder.traces("cosine_lbfgs", victim["round"])[victim["client"]].evaluations
        assert sum(shown) == 150 * (len(evaluations) - 1) + 2000


def test_a_blurred_page_holds_no_original(study, tmp_path):
    assert fedsim("report", study / "none", "--blur", "-o", tmp_path / "report.html") == 0
    data = data_in(tmp_path / "report.html")
    sizes = set()
    for victim in data["victims"]:
        with Image.open(io.BytesIO(base64.b64decode(data["images"][victim["truth"]].split(",")[1]))) as file:
            sizes.add(file.size)
    assert sizes == {(4, 4)}


def test_of_text_the_page_holds_sentences_and_blurred_none_that_was_written(tmp_path):
    few = ["data.train_size=12", "data.test_size=4", "federation.clients=2", "federation.per_round=2", "rounds=1", "tap.rounds=[1]"]
    text = ["data=text", "model=bert_tiny", "attack=bag_of_tokens", "tap.every=null", "engine.workers=1", "device=cpu"]
    folder = runner.start(compose([*few, *text]), tmp_path / "text", "a test")
    told, blurred = (report.data_of([folder], "a test", blur=blur) for blur in (False, True))
    leaks = folder.leaks()
    assert {(one["written"], one["read"]) for one in told["victims"]} == set(zip(leaks["truth"], leaks["recovered"], strict=True))
    assert {one["written"] for one in blurred["victims"]} == {""}
    assert not any(sentence in json.dumps(blurred) for sentence in leaks["truth"])
    assert (told["images"], told["points"][0]["median"]) == ([], leaks["token_accuracy"].median())


def test_the_page_loads_nothing_and_names_are_text(page):
    text = page.read_text()
    markup = text.replace('"http://www.w3.org/2000/svg"', "")  # a name, which nothing loads
    assert not re.search(r"https?://", markup)
    assert not re.search(r"@import|url\(|<link|<iframe", markup)
    assert "default-src 'none'" in text
    assert EVIL not in text
    assert text.count("</script>") == 2  # those of the page itself
    assert any(one["name"].startswith(EVIL) for one in data_in(page)["contenders"])
    assert page.stat().st_size < 1_000_000


def test_a_page_does_not_grow_beyond_its_bound_and_counts_what_is_left_out(study, monkeypatch):
    assert report.MOST < 15_000_000
    folder = RunFolder(study / "none")
    whole = report.data_of([folder], "a test")
    # Originals and reconstructions of four victims.
    assert (len(whole["images"]), len(whole["films"]), whole["left_out"]) == (8, 4, {"pictures": 0, "animations": 0})
    bare = len(report.rendered(whole)) - sum(map(len, whole["images"] + whole["films"]))
    sizes = set()
    for room in (0, 10_000, 25_000):
        monkeypatch.setattr(report, "MOST", bare + room)
        data = report.data_of([folder], "a test")
        assert len(report.rendered(data)) <= bare + room
        assert len(data["images"]) + data["left_out"]["pictures"] == 8
        assert len(data["films"]) + data["left_out"]["animations"] == 4
        sizes.add(len(data["images"]))
    assert len(sizes) == 3  # more room, more pictures
    assert 0 in sizes


def test_a_knob_is_a_setting_of_contenders_alike_in_all_else(study, page):
    assert data_in(page)["knobs"] == [{"title": EVIL, "knob": "levels", "at": [[4, f"{EVIL} levels=4"], [64, f"{EVIL} levels=64"]]}]
    tried = [["defense=topk", f"defense.ratio={ratio}"] for ratio in (0.5, 0.1)]
    tried += [
        ["defense=topk", "defense.ratio=0.9", "defense.scope=global"],
        ["defense=topk", "aggregation=secure"],
        ["defense=none"],
    ]
    tried += [["defense=precode", f"model.bottleneck.beta={beta}"] for beta in (1e-3, 1e-2)]
    configs = [compose(overrides) for overrides in tried]
    first, second = report._knobs({contender(config): config for config in configs})
    assert (first["knob"], [value for value, _ in first["at"]]) == ("ratio", [0.1, 0.5])
    assert (second["knob"], [value for value, _ in second["at"]]) == ("beta", [0.001, 0.01])


def test_the_words_name_extremes_of_each_attack_and_none_where_all_are_alike():
    def row(kind: str, attack: str, stolen: int) -> dict:
        counts = {"stolen": stolen, "n": 10, "interval": [0.0, 1.0], "lost": 0}
        return {"kind": kind, "attack": attack, "stronger": "naive", "strongest": stolen / 10, "by": {"naive": counts}}

    assert report._extremes("dlg", [row("A", "dlg", 3)]).startswith("Behind A, dlg stole most as the naive attacker: 3 of 10")
    both = report._extremes("dlg", [row("A", "dlg", 3), row("B", "dlg", 7)])
    assert "A gave away least, to the naive attacker: 3 of 10" in both
    assert "B gave away most, to the naive attacker: 7 of 10" in both
    assert "Every defense gave away the same share" in report._extremes("dlg", [row("A", "dlg", 3), row("B", "dlg", 3)])


def test_the_words_tell_few_settings_without_a_defense_one_by_one_and_of_many_the_extremes():
    def words(settings: int) -> str:
        rows = [
            {
                "kind": f"setting {i}",
                "attack": "dlg",
                "stronger": "naive",
                "strongest": i / 100,
                "bare": True,
                "flag": False,
                "by": {"naive": {"stolen": i, "n": 100, "interval": [0.0, 1.0], "lost": 0}},
            }
            for i in range(settings)
        ]
        leaks = pd.DataFrame({"seed": [0], "attack": ["dlg"], "run": ["r"], "verdict": ["stolen"], "mean_colour_mse": [1.0]})
        return " ".join(report._in_words([], [], [], rows, leaks, "data", text=False))

    assert words(6).count("stole ") == 6
    many = words(7)
    assert "stole " not in many
    assert "setting 0 gave away least" in many
    assert "setting 6 gave away most" in many


# Colours.


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2, of #rgb or #rrggbb."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    values = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", [":root", r":root\[data-theme=dark\]"])
def test_texts_and_marks_stand_out_from_what_is_behind_them(theme):
    found = re.search(theme + r" \{(.*?)\}", report.TEMPLATE.read_text(), re.DOTALL)
    assert found
    colours = dict(re.findall(r"--(\w+): (#\w+)", found[1]))

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(colours[one]), luminance(colours[other])))
        return (high + 0.05) / (low + 0.05)

    for behind in ("back", "panel"):
        for text in ("ink", "dim", "link", "flag"):
            assert contrast(text, behind) >= 4.5, (text, behind)
    for i in range(8):
        assert contrast(f"c{i}", "back") >= 3.0, i


# In a browser.

CATCH = """<script>window.wrong = []; addEventListener("error", e => wrong.push(String(e.message)));
addEventListener("securitypolicyviolation", e => wrong.push("blocked " + e.blockedURI));</script>"""
FRAME = """<iframe src="page.html" style="width:{}px;height:900px;border:0"></iframe><pre></pre>
<script>onmessage = e => document.querySelector("pre").textContent = btoa(unescape(encodeURIComponent(e.data)))</script>"""


def opened(page: Path, drive: str, folder: Path, width: int) -> dict:
    """What the script `drive` says of a page in a window of this width; Chromium has none below 500 pixels, so it is a frame."""
    text = page.read_text()
    text = text.replace('<meta charset="utf-8">', '<meta charset="utf-8">' + CATCH, 1)
    (folder / "page.html").write_text(text.replace("</body>", f"<script>{drive}</script></body>"))
    (folder / "index.html").write_text(FRAME.format(width))
    assert CHROMIUM
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    command = [
        CHROMIUM,
        *quiet,
        "--window-size=1600,1000",
        "--virtual-time-budget=5000",
        "--dump-dom",
        (folder / "index.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = re.search(r"<pre>([\w+/=]+)</pre>", done.stdout)
    assert found, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(base64.b64decode(found[1])) | {"console": console, "width": width}


@pytest.fixture(scope="module", params=[375, 1440])
def driven(request, page, tmp_path_factory) -> dict:
    drive = Path(__file__).with_name("drive_report.js").read_text()
    return opened(page, drive, tmp_path_factory.mktemp(f"browser{request.param}"), request.param)


@browser
def test_the_page_runs_without_errors_and_nothing_overflows(driven):
    assert driven["wrong"] == driven["console"] == []
    for scroll, inner in (driven["size"], driven["nobody"][2], driven["after"]):
        assert inner == driven["width"]
        assert scroll <= inner
    assert driven["headings"][:7] == [
        *("In words", "Ranking", "Frontier", "Each defense over its knob", "Accuracy", "Leak per round", "Pictures")
    ]
    assert driven["alts"] == driven["broken"] == driven["small"] == driven["strange"] == 0
    assert driven["pictures"] >= 8
    assert not driven["objects"]


LOOK = """addEventListener("load", () => setTimeout(() => {
  const filled = part => part.querySelector(".panel, table, img");
  const drawn = () => [...document.querySelectorAll("main section")].filter(filled).map(part => part.id);
  const said = { drawn: drawn(), frontier: document.getElementById("frontier").textContent };
  const axis = document.getElementById("cost-axis");
  axis.value = "accuracy";
  axis.dispatchEvent(new Event("change", { bubbles: true }));
  parent.postMessage(JSON.stringify({ ...said, again: drawn(), wrong }), "*");
}, 100));"""


@browser
def test_the_page_of_a_run_that_was_stopped_in_its_first_round_is_whole(study, tmp_path):
    run = shutil.copytree(study / "coarse", tmp_path / "run")
    write_table(run / "rounds.parquet", read_table(run / "rounds.parquet").query("round < 1"))
    write_table(run / "leaks.parquet", read_table(run / "leaks.parquet").query("round < 2 and attacker == 'naive'"))
    assert fedsim("report", run, "-o", tmp_path / "report.html") == 0
    data = data_in(tmp_path / "report.html")
    assert {point["dense"] for point in data["points"]} == {None} == {one["share"] for one in data["contenders"]}
    (tmp_path / "browser").mkdir()
    said = opened(tmp_path / "report.html", LOOK, tmp_path / "browser", 1440)
    assert said["wrong"] == said["console"] == []
    assert said["frontier"].endswith("Nothing was sent.")
    assert {"ranking", "frontier", "leak", "gallery", "bytes"} <= set(said["drawn"]) & set(said["again"])


@browser
def test_filters_change_what_is_shown(driven):
    kinds = {kind for kind, _ in driven["all"]}
    assert len(kinds) == 3
    assert len(driven["all"]) == 5  # none has nothing to know
    assert driven["leaks"] == 10  # in two rounds
    assert {who for _, who in driven["naive"]} == {"naive"}
    assert len(driven["naive"]) == len(driven["stronger"]) == 3
    assert (driven["knobs"], driven["naiveKnobs"], driven["noKnobs"]) == (4, 2, 0)  # two levels
    assert set(driven["levels"]) == {"stolen: MSE < 0.03", "a grey card", "the mean image", "no defense, stronger attacker"}
    assert {kind for kind, _ in driven["none"]} == {"none"}
    assert driven["ranked"] == 1
    assert driven["nobody"][0] == []
    assert "Nothing matches" in driven["nobody"][1]
    assert {text.split(" ")[1] for text in driven["captions"]} == {"1", "2"}
    assert {text.split(" ")[1] for text in driven["second"]} == {"2"}
    assert driven["focus"] == "leak-axis"
    assert any("dB" in text for text in driven["axes"])
    assert any(text.startswith("sent") for text in driven["axes"])


@browser
def test_the_line_joins_what_no_other_shown_beats(driven):
    assert len(driven["best"]) == 3
    assert len(driven["best"][1][1][0]) == 3  # the naive one's, each of which costs more than what leaks more
    for who, lines in driven["best"]:
        every = [point for point in driven["points"] if point["stage"] is None]
        shown = [point for point in every if (point["stronger"] if who == "both" else point["attacker"] == who)]
        at = [(point["median"], point["dense"]) for point in shown]
        beaten = [any(x <= a and y <= b and (x, y) != (a, b) for x, y in at) for a, b in at]
        names = {point["kind"] for point, worse in zip(shown, beaten, strict=True) if not worse}
        assert [set(line) for line in lines] == ([names] if len(names) > 1 else [])


@browser
def test_switches_the_slider_and_the_details_work(driven):
    assert driven["themes"][0] != driven["themes"][1]
    assert (driven["sharp"], driven["blurred"]) == ("none", "blur(7px)")
    assert driven["film"].startswith("round 2")
    assert driven["strip"] == 4  # truth and stolen in two rounds
    assert "median" in driven["tip"]
    assert "fedsim run" in driven["tip"]
    assert driven["tipPictures"] == 4
    assert driven["moving"] == 20  # four victims; two defenses have two attackers
    assert len(driven["tips"]) == 5  # accuracy, leak, knobs, film strip, heat map
    for tip, pictures in driven["tips"]:
        assert "median" in tip
        assert "lenet_silu" in tip
        assert "fedsim" in tip
        assert pictures == 4
    known = ["\nfedsim attack runs/a attack=gan attack.steps=5", True]
    assert driven["later"] == [["", True], known, ["\nfedsim attack runs/a attack=idlg", False]]
    assert driven["open"]
    assert "fedsim run" in driven["more"]
    assert "not converged" in driven["more"]
