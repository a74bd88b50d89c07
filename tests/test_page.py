"""One leaderboard, five outputs, the same figures and names in each; and the page as people use it, in a browser."""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from bench import report
from bench.engine.errors import UserError
from bench.reporting import page
from bench.reporting.board import boards
from bench.reporting.cells import to_cells
from bench.reporting.columns import MEASURES
from bench.reporting.leaderboard import write_tables
from bench.reporting.marks import marks
from bench.reporting.reported import read_reported, reported_of
from bench.reporting.spreadsheet import literal
from bench.reporting.trials import AXES, read_trials, trial_table

HOSTILE = [
    "plain_name",
    "</script><script>document.title='broken'</script>",
    '<img src=x onerror="document.title=1">',
    r"a|b*_c_`d`\e [x](y) ~~z~~ $w$ &amp; {q}",
    '=1+1,"two"',
    r"50% & #1 \input{x} ^2 ~ {{script}} -- ''",
    "line\nbreak\ttab",
    "Ünïcödé 中文 🤖 ‮ right-to-left",
    "NaN",
    "long" * 60,
]
RULES = ["a rule with </script> & 100 % | *marks*"]


def trials_of(attacks, defenses, seeds=3, settings=("reserve",), datasets=("digits",), models=("net",), **figures):
    """A table of made-up trials; figures are functions of (attack, defense, seed)."""
    rows = []
    for data, model, attack, defense, threat_model, seed in itertools.product(
        datasets, models, attacks, defenses, settings, range(seeds)
    ):
        place = (attacks.index(attack), defenses.index(defense), seed)
        row = {
            "dataset": data,
            "model": model,
            "attack": attack,
            "defense": defense,
            "threat_model": threat_model,
            "seed": seed,
        }
        row |= {
            "poison_rate": 0.0 if attack == "none" else 0.1,
            "status": "done",
            "reason": "",
            "trial": f"t{len(rows)}",
        }
        row |= {"commit": "c0ffee", "clean": True}
        row |= {"clean_accuracy": 0.9 + 0.003 * place[1] + 0.0013 * seed - 0.002 * place[0]}
        row |= {"asr": None if attack == "none" else (0.071 * (place[0] + 3 * place[1]) + 0.0125 * seed) % 1}
        row |= {"defend_seconds": 1.25 + place[1] + seed, "peak_memory_mib": 800.5 + place[1]}
        rows.append(row | {name: of(*place) for name, of in figures.items()})
    return trial_table(rows)


def hostile():
    """Names, reasons and values that break a careless table."""
    attacks, defenses = ["none", *HOSTILE[1:4], HOSTILE[7]], ["no_defense", *HOSTILE]
    trials = trials_of(attacks, defenses, robust_accuracy=lambda a, d, s: [0.5, None, math.nan][s])
    lost = (trials.defense == HOSTILE[2]) & (trials.attack == HOSTILE[3])
    trials.loc[lost, "status"], trials.loc[lost, "reason"] = "failed", HOSTILE[1]
    trials.loc[lost, ["clean_accuracy", "asr"]] = math.nan
    trials.loc[lost.idxmax(), "status"] = "diverged"
    trials.loc[(trials.defense == HOSTILE[4]) & (trials.seed == 1), "defend_seconds"] = math.inf
    trials.loc[(trials.defense == HOSTILE[5]) & (trials.attack == "none"), "warnings"] = HOSTILE[1]
    return trials


def evidence_of(trials):
    return [
        {
            "keys": ["implant/00", "defend/11", f"evaluate/{row.trial}"],
            "config": {"implant": {"attack": {"name": row.attack}}, "defend": {"defense": {"note": HOSTILE[1]}}},
            "curves": {f"defend/{row.trial}": {"loss </b>": [[0, 1.0], [1, None], [2, 0.25]]}},
            "more": {"steps": [{"name": "step 0", "asr": math.nan}]},
            "device": "a machine",
            "command": f"python -m bench.run 'grid.attacks=[x]' 'note={HOSTILE[1]}' 'grid.seeds=[{row.seed}]'",
        }
        for row in trials.itertuples()
    ]


def write(trials, folder, reported=None):
    boards = write_tables(trials, RULES, folder, "Grid <b>& co</b>", reported)
    page.write(trials, evidence_of(trials), RULES, folder, "Grid <b>& co</b>", reported)
    return boards


class _Scripts(HTMLParser):
    """The texts of script elements, as a browser finds their ends."""

    def __init__(self):
        super().__init__()
        self.inside, self.found = False, []

    def handle_starttag(self, tag, attrs):
        if tag == "script":
            self.inside = True
            self.found.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "script"

    def handle_data(self, data):
        if self.inside:
            self.found[-1] += data


def data_of(folder):
    parser = _Scripts()
    parser.feed((folder / page.NAME).read_text())
    assert len(parser.found) == 2
    return json.loads(parser.found[0])


class _Cells(HTMLParser):
    """The rows of all tables of a rendered Markdown file, as texts."""

    def __init__(self):
        super().__init__()
        self.rows, self.open = [], False

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        self.open = tag in ("td", "th") or (self.open and tag in ("strong", "em"))
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.open = self.open and tag not in ("td", "th")

    def handle_data(self, data):
        if self.open:
            self.rows[-1][-1] += data


def markdown_rows(folder):
    """What a reader of Markdown sees in each cell, by a renderer that is not ours."""
    from markdown_it import MarkdownIt

    parser = _Cells()
    parser.feed(MarkdownIt("gfm-like", {"linkify": False}).render((folder / "leaderboard.md").read_text()))
    return {row[0]: row[1:] for row in parser.rows}


def plain(text):
    return " ".join(text.split())


def test_trials_come_back_from_the_file_to_the_last_bit(tmp_path):
    trials = hostile()
    write(trials, tmp_path)
    pd.testing.assert_frame_equal(read_trials(tmp_path / "trials.csv"), trials, check_exact=True)


def test_csv_markdown_latex_and_page_have_the_same_figure_in_every_cell(tmp_path):
    trials = hostile()
    write(trials, tmp_path)
    shown, data, tex = markdown_rows(tmp_path), data_of(tmp_path), (tmp_path / "leaderboard.tex").read_text()
    header = shown["defense"]
    on_page = {(cell["place"][4], cell["place"][6]): cell for cell in data["cells"]}
    names = [column["name"] for column in data["columns"]]
    rows = list(csv.DictReader((tmp_path / "leaderboard.csv").open(newline="")))
    rows = [{key: literal(value) for key, value in row.items()} for row in rows]
    assert len(rows) == 5 * 11
    compared = 0
    for row in rows:
        column = next(i for i, text in enumerate(header) if text.startswith(plain(row["attack"]) + " ACC"))
        cell = on_page[row["attack"], row["defense"]]
        texts = []
        for name in ("clean_accuracy", "asr"):
            mean, std = row[f"{name}_mean"], row[f"{name}_std"]
            assert cell["means"][names.index(name)] == (float(mean) if mean else None)
            assert cell["stds"][names.index(name)] == (float(std) if std else None)
            if mean:
                texts.append(f"{100 * float(mean):.1f}±{100 * float(std):.1f}")
        text = " / ".join(texts) or "diverged, failed"
        assert shown[plain(row["defense"])][column] == text
        bare = tex.replace(r"\textbf", "").replace(r"\underline", "")
        assert " / ".join(f"{{{part}}}" for part in texts).replace("±", r"$\pm$") in bare
        compared += len(texts)
    assert compared == 2 * 5 * 11 - 11 - 2  # the clean model has no ASR, one cell has nothing
    wide = pd.read_csv(tmp_path / "wide.csv", keep_default_na=False).map(literal).set_index("defense")
    for name, texts in shown.items():
        if name not in ("defense", "threat model: reserve"):
            value = next(float(wide.loc[own, "asr"]) for own in wide.index if plain(own) == name)
            assert texts[header.index("mean ASR")].rstrip("†") == f"{100 * value:.1f}"


def test_hostile_names_are_literal_in_markdown_and_in_the_data_of_the_page(tmp_path):
    write(hostile(), tmp_path)
    # But for the sign that turns a line around: it is named.
    assert {plain(name).replace("\u202e", r"\u202e") for name in HOSTILE} <= set(markdown_rows(tmp_path))
    assert {cell["place"][6] for cell in data_of(tmp_path)["cells"]} >= set(HOSTILE[:6])
    source = (tmp_path / page.NAME).read_text()
    assert "<title>Grid &lt;b&gt;&amp; co&lt;/b&gt;</title>" in source
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", source)


def test_a_grid_of_which_nothing_is_done_is_shown_so(tmp_path):
    trials = trials_of(["none", "badnets"], ["no_defense", "a"])
    lost = [{**row, "status": "failed", "reason": "disk"} for row in trials[[*AXES, "seed"]].to_dict("records")]
    write(trial_table(lost), tmp_path)
    assert [cell["means"] for cell in data_of(tmp_path)["cells"]] == [[]] * 4
    assert markdown_rows(tmp_path)["a"][:2] == ["failed", "failed"]


def test_the_page_names_a_weak_attack_and_the_table_that_it_is_weak_in(tmp_path):
    asr = {"digits": 0.95, "other": 0.4}
    trials = pd.concat(
        trials_of(["badnets"], ["no_defense", "a"], datasets=[name], asr=lambda *_, value=value: value)
        for name, value in asr.items()
    )
    write(trials.reset_index(drop=True), tmp_path)
    weak = [note for note in data_of(tmp_path)["notes"] if "weak: " in note]
    assert weak == [
        "other, net: weak: badnets: the infected models have an ASR of 40.0±0.0, below 90: a repair has less to remove"
    ]


def test_a_control_sign_or_a_broken_name_of_a_file_is_written_as_its_number(tmp_path):
    trials = trials_of(["none"], ["no_defense"])
    broken = trial_table([{**row, "reason": "a\x00b\x1b[1m\udcff"} for row in trials.to_dict("records")])
    assert set(broken.reason) == {r"a\x00b\x1b[1m\udcff"}
    write(broken, tmp_path)


def test_figures_reported_by_others_are_marked_and_never_ranked(tmp_path):
    from bench.engine.errors import UserError

    source = tmp_path / "theirs.csv"
    source.write_text(
        "dataset,model,threat_model,attack,defense,asr,asr_std,provenance\n"
        'digits,net,reserve,badnets,closed,0.0,0.001,"Some paper, table 1"\n'
    )
    low = {"no_defense": 0.9, "ours": 0.1, "other": 0.2}
    trials = trials_of(["none", "badnets"], list(low), asr=lambda a, d, s: list(low.values())[d] if a else None)
    (board,) = write(trials, tmp_path, read_reported(source))
    rows = {row[0].text: row for row in board.rows}
    assert "threat model: reserve; reported, not measured here, not ranked" in rows
    assert rows["closed"][2].text == "– / 0.0±0.1"
    assert all(mark == "" for entry in rows["closed"] for _, mark in entry.parts)
    assert rows["ours"][4].parts[0][1] == "best"  # though the reported mean ASR is lower
    assert "reported: closed: Some paper, table 1" in board.notes
    source.write_text("dataset,model,threat_model,attack,defense,asr\nd,m,reserve,a,b,0.1\n")
    with pytest.raises(UserError, match="provenance"):
        read_reported(source)
    source.write_text("dataset,model,threat_model,attack,defense,provenance,asr\nd,m,reserve,a,b,paper,93\n")
    with pytest.raises(UserError, match=r"share in \[0, 1\]"):
        read_reported(source)


def test_of_reported_figures_only_those_at_the_poison_rate_of_the_table_stand_beside_it(tmp_path):
    from bench.engine.errors import UserError

    head, source = "dataset,model,threat_model,attack,defense,provenance,poison_rate,asr", tmp_path / "reported.csv"
    cells = [("badnets", 0.1, 0.3), ("badnets", 0.01, 0.9), ("ssba", 0.1, 0.4), ("ssba", 0.05, 0.8), ("sig", "", 0.5)]
    lines = [f"digits,net,reserve,{attack},closed,Paper,{rate},{asr}" for attack, rate, asr in cells]
    source.write_text("\n".join([head, *lines]))
    trials = trials_of(["none", "badnets"], ["ours"])
    found = reported_of(source, trials)
    assert list(zip(found.attack, found.asr_mean, strict=True)) == [("badnets", 0.3), ("ssba", 0.4), ("sig", 0.5)]
    source.write_text("\n".join([head, lines[0], lines[0]]))
    with pytest.raises(UserError, match=r"has digits/net/reserve/badnets/closed more than once"):
        reported_of(source, trials)


def test_latex_of_hostile_names_holds_no_sign_that_latex_would_read(tmp_path):
    write(hostile(), tmp_path)
    text = (tmp_path / "leaderboard.tex").read_text()
    assert text.isascii()
    body = re.sub(r"\\[\\{}$&#_%]", "", "\n".join(line for line in text.splitlines() if not line.startswith("%")))
    assert not set(body.replace(r"$^\dagger$", "")) & set("#%~^")
    assert body.count("{") == body.count("}")
    rows = [line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert len({len(re.findall(r"(?<!\\)&", row)) for row in rows}) == 1
    assert r"\"{U}n\"{i}c" in text
    assert "[U+4E2D]" in text


@pytest.mark.slow
def test_latex_compiles_in_a_minimal_document(tmp_path):
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex: apt-get install texlive-latex-recommended")
    write(hostile(), tmp_path)
    lines = [r"\documentclass{article}", r"\usepackage{booktabs,textcomp}", r"\usepackage[T1]{fontenc}"]
    document = "\n".join([*lines, r"\begin{document}", r"\input{leaderboard}", r"\end{document}"])
    (tmp_path / "paper.tex").write_text(document)
    done = subprocess.run(
        ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "paper"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Missing character" not in done.stdout


def large():
    """10,000 trials: 2 data sets, 2 architectures, 14 attacks, 60 defenses, 3 seeds."""
    attacks = ["none", *(f"attack_{i}" for i in range(13))]
    defenses = ["no_defense", *(f"defense_{i}" for i in range(59))]
    shares = {"clean_accuracy": lambda attack, defense, seed: 0.7 + 0.003 * defense + 0.0013 * seed - 0.002 * attack}
    return trials_of(attacks, defenses, datasets=("one", "two"), models=("net", "vit"), **shares)


def parts_of(folder):
    """The details that lie beside a page, part by part, as its script finds them."""
    parts = []
    for name in data_of(folder)["parts"]:
        text = (folder / name).read_text()
        head, _, body = text.partition(" = ")
        assert head == f"(window.parts ??= {{}})[{len(parts)}]"
        parts.append(json.loads(body.rstrip().removesuffix(";")))
    return parts


def everything(cell, source):
    """A cell with all that the page shows of it, whatever file it comes from."""
    start, end = cell["trials"]
    trials = []
    for trial in source["trials"][start:end]:
        *known, configs, curves, more = trial
        trials.append([known, [source["configs"][i] for i in configs], [source["curves"][i] for i in curves], more])
    return {**{name: cell[name] for name in ("place", "means", "states", "marks", "command", "t95")}, "list": trials}


@pytest.mark.parametrize("part", [1, 5000, 10**9])
def test_of_a_large_grid_the_details_lie_beside_the_page_and_are_the_same(tmp_path, monkeypatch, part):
    trials = hostile()
    trials = trials.sample(frac=1, random_state=0, ignore_index=True)  # seeds in no order
    write(trials, tmp_path / "whole")
    monkeypatch.setattr(page, "SPLIT", 0)
    monkeypatch.setattr(page, "PART", part)
    write(trials, tmp_path / "split")
    whole, split, parts = data_of(tmp_path / "whole"), data_of(tmp_path / "split"), parts_of(tmp_path / "split")
    assert whole["parts"] == []
    assert len(parts) == {1: len(split["cells"]), 10**9: 1}.get(part, len(parts)) >= 1
    assert "trials" not in split
    for number, (cell, brief) in enumerate(zip(whole["cells"], split["cells"], strict=True)):
        source = parts[brief["part"]]
        assert everything(cell, whole) == everything({**brief, **source["cells"][str(number)]}, source)
        for column, exact, short in zip(whole["columns"], cell["stds"], brief["stds"], strict=True):
            if isinstance(exact, float):
                digits = column["decimals"]
                assert f"{column['scale'] * short:.{digits}f}" == f"{column['scale'] * exact:.{digits}f}"
            else:
                assert short == exact
    monkeypatch.undo()
    write(trials, tmp_path / "split")  # the files of an earlier report go
    assert sorted(path.name for path in (tmp_path / "split").glob("*.js")) == []


def test_a_page_of_twenty_thousand_trials_has_ten_megabytes_at_most(tmp_path, monkeypatch):
    """By the bytes of each cell: with three seeds and every figure, 20,000 trials are 6,667 cells."""
    monkeypatch.setattr(page, "SPLIT", 0)
    sizes = {}
    draw = random.Random(0)
    for count in (20, 60):
        figures = {column.name: lambda *_: draw.random() for column in MEASURES}
        trials = trials_of(["none", "badnets", "blended"], [f"defense_{i}" for i in range(count)], **figures)
        page.write(trials, evidence_of(trials), RULES, tmp_path, "large")
        sizes[3 * count] = (tmp_path / page.NAME).stat().st_size
    (few, small), (many, large) = sizes.items()
    assert small + (large - small) / (many - few) * (6667 - few) < 10e6


def test_the_page_of_a_published_table_has_its_figures_and_touches_no_other_file(tmp_path, capsys):
    trials = trials_of(["none", "badnets"], ["no_defense", "aft"])
    write_tables(trials, RULES, tmp_path, "Grid x")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert report.main([f"table={tmp_path / 'trials.csv'}"]) == 0
    assert str(tmp_path / page.NAME) in capsys.readouterr().out
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != page.NAME} == before
    data = data_of(tmp_path)
    asr = [column["name"] for column in data["columns"]].index("asr")
    for cell in data["cells"]:
        attack, defense = cell["place"][4], cell["place"][6]
        expected = trials[(trials.attack == attack) & (trials.defense == defense)].asr.mean()
        assert cell["means"][asr] == (None if math.isnan(expected) else pytest.approx(expected))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["table={0}/trials.csv", "grid=quick"], "grid=quick"),
        (["table={0}/nowhere.csv"], "nowhere.csv"),
        (["table={0}/leaderboard.csv"], "seed"),
        (["table="], "trials.csv"),
    ],
)
def test_a_page_of_what_is_not_a_published_table_is_refused(tmp_path, words, named):
    write_tables(trials_of(["none"], ["no_defense"]), RULES, tmp_path, "Grid x")
    with pytest.raises(UserError, match=named):
        report.main([word.format(tmp_path) for word in words])
    assert not (tmp_path / page.NAME).exists()


@pytest.mark.slow
def test_ten_thousand_trials_are_all_in_the_tables_and_on_the_page(tmp_path):
    trials = large()
    assert len(trials) == 10_080
    write_tables(trials, RULES, tmp_path, "large")
    page.write(trials, evidence_of(trials), RULES, tmp_path, "large")
    assert len(read_trials(tmp_path / "trials.csv")) == 10_080
    assert (tmp_path / "leaderboard.html").read_text().count('"seed"') >= 1


@pytest.mark.slow
def test_the_command_of_a_cell_computes_the_same_figures_anew(run_grid, tiny, tmp_path, monkeypatch):
    from bench.experiment.experiment import load_experiment
    from bench.reporting.protocol import command
    from bench.run import main

    sweep = "grid.sweep=[{key:reserve.size,values:[0.02,0.05]}]"
    axes = ["grid.attacks=[badnets]", "grid.defenses=[no_defense,fine_tuning]", sweep]
    _, trials = run_grid(*axes)
    experiment = load_experiment([*tiny, *axes])
    chosen = 3
    words = shlex.split(command(experiment, experiment.trials[chosen]))
    assert words[:3] == ["python", "-m", "bench.run"]
    monkeypatch.chdir(tmp_path)
    assert main(words[3:]) == 0
    again = read_trials(tmp_path / "reproduced" / "quick" / "trials.csv")
    assert len(again) == 1
    same = [*AXES, "seed", "clean_accuracy", "asr", "recovery_accuracy", "robust_accuracy", "trial"]
    assert again.loc[0, same].tolist() == trials.loc[chosen, same].tolist()
    assert trials.variant[chosen] == "reserve.size=0.05"


def test_the_command_of_a_swept_cell_plans_that_very_cell_whatever_kind_of_value_is_swept(cache):
    from bench.experiment.experiment import load_experiment
    from bench.reporting.protocol import command

    keys = {
        "defense.rates": "[[0.2,0.3,0.4,0.5],[0.1,0.2,0.3,0.4]]",
        "defense.target_label": "[null]",
        "defense.spectre": "[false]",
        "train.precision": "[float32,bfloat16]",
    }
    sweep = ",".join(f"{{key:{key},values:{values}}}" for key, values in keys.items())
    axes = ["grid.attacks=[badnets]", "grid.defenses=[pud]", "grid.threat_models=[trainset]", "grid.seeds=2"]
    experiment = load_experiment(["grid=quick", f"dataset.cache={cache}", *axes, f"grid.sweep=[{sweep}]"])
    assert len({trial.keys for trial in experiment.trials}) == len(experiment.trials) == 2 * 2 * 2
    for trial in (experiment.trials[0], experiment.trials[-1]):
        (again,) = load_experiment(shlex.split(command(experiment, trial))[3:]).trials
        assert (again.variant, again.seed, again.keys) == (trial.variant, trial.seed, trial.keys)


@pytest.mark.parametrize("name", ["folder:my pets", 'a"b', "plain_1", "a,b]", "it's"])
def test_a_name_in_a_command_comes_through_the_shell_and_hydra(name):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from bench.experiment.overrides import to_override

    (word,) = shlex.split(shlex.join([f"grid.datasets=[{to_override(name)}]"]))
    assert OverridesParser.create().parse_override(word).value() == [name]


# In a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def chromium():
    """Debian's Chromium, headless."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install -e .[browser]")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, tmp_path):
    """Open a page; at the end there was no error, no word on the console and no request that left the machine."""
    contexts, wrong = [], []

    def go(trials=None, fragment="", reported=None, **options):
        if trials is not None:
            write(trials, tmp_path, reported)
        context = chromium.new_context(**options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else wrong.append(r.url))
        tab.goto((tmp_path / page.NAME).as_uri() + fragment)
        return tab

    yield go
    for context in contexts:
        context.close()
    assert wrong == []


def rows_shown(tab):
    """Texts of the table, without the words that only a screen reader says."""
    return tab.evaluate(
        """() => [...document.querySelectorAll('#board tr')].map(row => [...row.children].map(cell => {
            const copy = cell.cloneNode(true);
            copy.querySelectorAll('.vh, [aria-hidden]').forEach(node => node.remove());
            return copy.textContent.replace(/\\s+/g, ' ').trim();
        }))"""
    )


ATTACKS, DEFENSES = ["none", "badnets", "blended"], ["no_defense", "alpha", "beta", "gamma"]


@pytest.mark.browser
@pytest.mark.parametrize("make", [hostile, lambda: trials_of(ATTACKS, DEFENSES)], ids=["hostile", "plain"])
def test_the_page_shows_what_the_markdown_shows(visit, tmp_path, make):
    tab = visit(make())
    assert tab.title() == "Grid <b>& co</b>"
    header, _, *rows = rows_shown(tab)
    expected = markdown_rows(tmp_path)
    columns = expected["defense"]
    assert {row[0] for row in rows} == set(expected) - {"defense", "threat model: reserve"}
    for row in rows:
        for name, text in zip(header[1:], row[1:], strict=True):
            assert text == expected[row[0]][columns.index(plain(name))], (row[0], name)


@pytest.mark.browser
def test_sorting_filtering_and_columns(visit):
    tab = visit(trials_of(ATTACKS, DEFENSES))
    names = lambda: [row[0] for row in rows_shown(tab)[2:]]  # noqa: E731
    assert names()[0] == "no_defense"
    tab.get_by_role("button", name="defense", exact=True).click()
    assert names() == sorted(DEFENSES)
    tab.keyboard.press("Enter")  # the button keeps the focus
    assert names() == sorted(DEFENSES, reverse=True)
    assert tab.locator("th[aria-sort=descending]").inner_text().startswith("defense")
    tab.locator("#filter-attack summary").click()
    tab.locator("#filter-attack").get_by_label("blended").uncheck()
    assert not any("blended" in text for text in rows_shown(tab)[0])
    assert "ranks and underlined figures need all" in tab.locator("#count").inner_text()
    tab.keyboard.press("Escape")
    tab.locator("#columns summary").click()
    tab.locator("#columns").get_by_label("memory (MiB)").uncheck()
    assert "memory (MiB)" not in rows_shown(tab)[0]
    tab.get_by_role("button", name="Reset").click()
    assert any("blended" in text for text in rows_shown(tab)[0])


@pytest.mark.browser
def test_a_deep_link_keeps_view_filter_order_and_cell(visit):
    tab = visit(trials_of(ATTACKS, DEFENSES))
    tab.get_by_role("button", name="Every cell").click()
    tab.locator("#filter-defense summary").click()
    for name in ("alpha", "gamma"):
        tab.locator("#filter-defense").get_by_label(name).uncheck()
    tab.get_by_role("button", name="ASR", exact=True).click()
    before = rows_shown(tab)
    tab.locator("#board [data-cell]").first.click()
    link = tab.evaluate("location.hash")
    again = visit(fragment=link)
    assert rows_shown(again) == before
    assert {row[0] for row in before[1:]} == {"no_defense", "beta"}
    assert again.locator("dialog h2").inner_text() == tab.locator("dialog h2").inner_text()


@pytest.mark.browser
def test_a_deep_link_keeps_that_nothing_of_an_axis_is_chosen(visit):
    tab = visit(trials_of(ATTACKS, DEFENSES))
    whole = tab.locator("#board [data-cell]").count()
    tab.locator("#filter-defense summary").click()
    tab.locator("#filter-defense").get_by_role("button", name="None").click()
    again = visit(fragment=tab.evaluate("location.hash"))
    assert again.locator("#board [data-cell]").count() == 0 < whole


@pytest.mark.browser
def test_a_cell_opens_with_its_trials_and_a_command_that_is_copied_whole(visit):
    tab = visit(hostile(), permissions=["clipboard-read", "clipboard-write"])
    button = tab.locator("#board td [data-cell]").nth(7)
    button.hover()
    assert "seed 0: ACC" in button.get_attribute("title")
    assert "95 % t-interval" in button.get_attribute("title")
    button.focus()
    tab.keyboard.press("Enter")
    dialog = tab.locator("dialog")
    assert dialog.locator("tbody tr").count() == 4  # three seeds and their mean
    assert dialog.locator("svg[role=img]").count() == 3
    dialog.locator(".copy").first.click()
    dialog.get_by_text("Copied").wait_for()
    copied = tab.evaluate("navigator.clipboard.readText()")
    assert copied == f"python -m bench.run 'grid.attacks=[x]' 'note={HOSTILE[1]}' 'grid.seeds=[0]'"
    assert copied == dialog.locator("pre.command").first.inner_text()
    tab.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert tab.evaluate("document.activeElement.dataset.cell") is not None  # back where one was


@pytest.mark.browser
def test_a_cell_of_a_large_grid_gets_its_details_from_a_file_beside_the_page(visit, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "SPLIT", 0)
    monkeypatch.setattr(page, "PART", 1)
    tab = visit(hostile())
    button = tab.locator("#board td [data-cell]").nth(7)
    button.hover()
    tab.wait_for_function("document.querySelectorAll('#board td [data-cell]')[7].title.includes('95 % t-interval')")
    button.click()
    dialog = tab.locator("dialog")
    dialog.locator("tbody tr").first.wait_for()
    assert dialog.locator("tbody tr").count() == 4  # three seeds and their mean
    assert dialog.locator("svg[role=img]").count() == 3
    link = tab.evaluate("location.hash")
    again = visit(fragment=link)
    again.locator("dialog tbody tr").first.wait_for()
    assert again.locator("dialog").inner_text() == dialog.inner_text()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_no_fault_and_a_phone_scrolls_the_table_only(visit, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    tab = visit(hostile(), color_scheme=scheme, viewport={"width": width, "height": 700})
    back = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    for prepare in (lambda: None, lambda: tab.locator("#board td [data-cell]").first.click()):
        prepare()
        found = axe.run(tab).response["violations"]
        assert [(fault["id"], fault["nodes"][0]["html"][:200]) for fault in found] == []


@pytest.mark.browser
def test_the_theme_button_overrides_the_system(visit):
    tab = visit(trials_of(ATTACKS, DEFENSES), color_scheme="light")
    tab.locator("#theme").click()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"


@pytest.mark.browser
@pytest.mark.slow
def test_ten_thousand_trials_are_sorted_and_paged(visit):
    tab = visit(large(), fragment="#view=cells")
    assert "3360 of 3360 cells" in tab.locator("#count").inner_text()
    tab.locator("[data-sort]", has_text="defense").first.click()
    shown = tab.locator("tbody tr").all_inner_texts()
    assert len(shown) > 50
    tab.get_by_role("button", name="Next").click()
    assert "page 2 of 34" in tab.locator("#pages").inner_text()


def test_a_reported_figure_is_held_against_the_poison_rate_of_its_own_attack(tmp_path):
    trials = trials_of(["badnets", "blended", "adaptive_patch"], ["ours"])
    trials.loc[trials.attack == "adaptive_patch", "poison_rate"] = 0.003
    source = tmp_path / "reported.csv"
    lines = [f"digits,net,reserve,adaptive_patch,closed,Paper,{rate},{asr}" for rate, asr in ((0.003, 0.3), (0.1, 0.9))]
    source.write_text("\n".join(["dataset,model,threat_model,attack,defense,provenance,poison_rate,asr", *lines]))
    assert reported_of(source, trials).asr_mean.tolist() == [0.3]


@pytest.mark.parametrize(
    ("rate", "seeds", "due"),
    [
        ("10 %", "3", "poison_rate is '10 %'; write a number, a share"),
        ("10", "3", "poison_rate is '10'; write a number, a share"),
        ("0.1", "three", "seeds is 'three'; write a whole number, at least 1"),
        ("0.1", "-2", "seeds is '-2'; write a whole number, at least 1"),
        ("0.1", "2.5", "seeds is '2.5'; write a whole number, at least 1"),
    ],
)
def test_a_reported_rate_or_number_of_seeds_that_is_none_is_refused(tmp_path, rate, seeds, due):
    from bench.engine.errors import UserError

    source = tmp_path / "reported.csv"
    source.write_text(
        "dataset,model,threat_model,attack,defense,provenance,poison_rate,asr,seeds\n"
        f"digits,net,reserve,badnets,closed,Paper,{rate},0.5,{seeds}\n"
    )
    with pytest.raises(UserError, match=due):
        read_reported(source)


def test_the_clean_model_that_others_report_stands_beside_ours(tmp_path):
    source = tmp_path / "reported.csv"
    source.write_text(
        "dataset,model,threat_model,attack,defense,provenance,poison_rate,clean_accuracy\n"
        "digits,net,reserve,none,closed,Paper,0,0.9\n"
    )
    assert len(reported_of(source, trials_of(["none", "badnets"], ["ours"]))) == 1


@pytest.mark.slow
def test_a_report_outlives_tensors_that_were_deleted_for_their_room(run_grid, tiny, tmp_path):
    from bench.report import main

    one = ["grid.attacks=[badnets]", "grid.defenses=[spectral_signatures]", "grid.threat_models=[trainset]"]
    one += ["defense.spectral_signatures.retrain=false"]
    run_grid(*one)
    for tensors in (tmp_path / "results" / "store" / "implant").rglob("*.safetensors"):
        tensors.unlink()
    assert main([*tiny, *one]) == 0


@pytest.mark.parametrize(
    "kept",
    [
        {},
        {"defense": ["no_defense", "beta", "gamma", "delta"]},
        {"attack": ["none", "sig"]},
        {"defense": ["beta", "gamma"], "attack": ["sig", "badnets"]},
    ],
    ids=str,
)
def test_bold_on_the_page_is_the_best_of_what_a_filter_shows(tmp_path, kept):
    """By a table of the visible trials alone; what is underlined is taken from the whole table, and from no other."""
    from urllib.parse import urlencode

    if shutil.which("node") is None:
        pytest.skip("no node to run the script of the page")
    attacks, names = ["none", "badnets", "sig", "wanet"], ["no_defense", "alpha", "beta", "gamma", "delta"]
    trials = trials_of(
        attacks, names, infected_accuracy=lambda *_: 0.93, infected_asr=lambda a, d, s: 0.55 if a else None
    )
    lost = (trials.defense == "beta") & (trials.attack == "wanet") & (trials.seed == 0)
    trials.loc[lost, "status"] = "wrecked"
    write(trials, tmp_path)
    (tmp_path / "data.json").write_text(json.dumps(data_of(tmp_path)))
    source = Path(page.__file__).with_name("page.js")
    command = [
        "node",
        Path(__file__).with_name("page_marks.js"),
        source,
        tmp_path / "data.json",
        "#" + urlencode(kept, doseq=True),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    seen = trials[[all(row[axis] in chosen for axis, chosen in kept.items()) for _, row in trials.iterrows()]]
    seen = seen.reset_index(drop=True)
    # The undefended model counts as the floor whether it is shown or not; its own figures are in every row here.
    cells = to_cells(seen)
    marked = marks(seen, cells)
    levels = {"best": 1, "alike": 0 if kept else 2}
    expected = {(cells.attack[i], cells.defense[i], name): levels[mark] for (i, name), mark in marked.cells.items()}
    expected |= {("mean", key[4], key[5]): levels[mark] for key, mark in marked.rows.items() if key[5] != "rank"}
    mine = {tuple(entry[:3]): entry[3] for entry in (*found["cells"], *found["rows"])}
    assert {key: mark for key, mark in mine.items() if mark} == {key: mark for key, mark in expected.items() if mark}
    assert any(mine.values())
    if not kept:  # where the printed table has a dagger
        (board,) = boards(trials, [])
        row = next(row for row in board.rows if row[0].text == "beta")
        daggers = {name for _, defense, name, _, part in found["rows"] if part and defense == "beta"}
        assert ("asr" in daggers) == row[board.header.index("mean ASR")].text.endswith("†") is True
