"""The renderings of a comparison, whole and by hand; and its picture."""

import csv
import json
import xml.etree.ElementTree as ET

import pytest
from made_runs import made

from eectl.core.errors import EectlError
from eectl.core.files import write_all
from eectl.reports.compare import compare
from eectl.reports.comparison import notes
from eectl.reports.curves import plot_comparison
from eectl.reports.formats import as_csv, as_json, latex, markdown
from eectl.reports.lines import table_title
from eectl.reports.published import published_tables
from eectl.reports.tables import check_form, show_comparison, show_published


def small():
    """Two seeds of joint, one of mixed, with the paper's Table 10 beside; mixed does not reach 25 %, joint overshoots 50 %."""
    runs = [made((0.4, 0.6, 0.75), shares=(0.2, 0.6, 1.1)), made((0.42, 0.61, 0.75), seed=1, shares=(0.2, 0.5, 1.1))]
    runs.append(made((None, 0.65, 0.75), regime="mixed"))
    return compare(runs, published=published_tables()["10"])


TITLE = (
    "digits, resnet20: accuracy in %, mean ± std over seeds (test split, 10 rows; max-softmax, calibrated thresholds, per-seed)"
)
PAPER = (
    "paper: Table 10 (ViT-T CIFAR-100) of How to Train Your Multi-Exit Model?; its data and recipe may differ from these runs'."
)


def test_markdown():
    assert (
        markdown(small())
        == f"""{TITLE}

| regime | seeds | 25% | 50% | unlimited |
| --- | --- | ---: | ---: | ---: |
| joint | 2 | **41.00** ± 1.41 | 60.50 ± 0.71 | **75.00** ± 0.00 |
| *paper* |  | *40.87 ± 0.84* | *60.48 ± 0.94* | *66.49 ± 1.08* |
| mixed | 1 | - | **65.00** ± - | **75.00** ± - |
| *paper* |  | *41.65 ± 0.19* | *64.07 ± 0.38* | *70.25 ± 0.56* |

- `!` mean cost over budget on the test split: 55.0% for 50% (joint).
- `-` no number: some seed cannot stay within that budget, or was not evaluated at it.
- `±` -: one seed.
- {PAPER}
"""
    )


def test_latex():
    assert (
        latex(small())
        == rf"""% {TITLE}
% needs \usepackage{{booktabs}}
\begin{{tabular}}{{llrrr}}
\toprule
regime & seeds & 25\% & 50\% & unlimited \\
\midrule
joint & 2 & \textbf{{41.00}} $\pm$ 1.41 & 60.50 $\pm$ 0.71 & \textbf{{75.00}} $\pm$ 0.00 \\
\emph{{paper}} &  & 40.87 $\pm$ 0.84 & 60.48 $\pm$ 0.94 & 66.49 $\pm$ 1.08 \\
mixed & 1 & -- & \textbf{{65.00}} $\pm$ -- & \textbf{{75.00}} $\pm$ -- \\
\emph{{paper}} &  & 41.65 $\pm$ 0.19 & 64.07 $\pm$ 0.38 & 70.25 $\pm$ 0.56 \\
\bottomrule
\end{{tabular}}
% ! mean cost over budget on the test split: 55.0% for 50% (joint).
% - no number: some seed cannot stay within that budget, or was not evaluated at it.
% ± -: one seed.
% {PAPER}
"""
    )


def test_csv():
    assert (
        as_csv(small())
        == """setting,regime,budget_percent,seeds,mean,std,mean_cost_percent,published_mean,published_std
,joint,25,2,41.00,1.41,20.00,40.87,0.84
,joint,50,2,60.50,0.71,55.00,60.48,0.94
,joint,unlimited,2,75.00,0.00,110.00,66.49,1.08
,mixed,25,1,,,,41.65,0.19
,mixed,50,1,65.00,,45.00,64.07,0.38
,mixed,unlimited,1,75.00,,110.00,70.25,0.56
"""
    )


def test_json():
    found = json.loads(as_json(small()))
    assert (found["kind"], found["schema"], found["budgets"]) == ("report", 1, [25, 50, None])
    joint, mixed = found["rows"]
    assert joint["seeds"] == [0, 1] and joint["cells"][0]["mean"] == pytest.approx(0.41)
    assert joint["cells"][0]["std"] == pytest.approx(0.02 / 2**0.5) and joint["cells"][1]["mean_cost"] == pytest.approx(0.55)
    assert mixed["cells"][0] == {"budget": 25, "mean": None, "std": None, "mean_cost": None, "published_mean": 0.4165,
                                 "published_std": pytest.approx(0.0019)}  # fmt: skip
    assert found["published"]["table"] == "10"


def test_lower_is_better():
    runs = [made((12.3456, 0.61234, 0.5), task="regression", criterion="difference", regime=each) for each in ("joint", "mixed")]
    runs.append(made((11.9, 0.7, 0.5), task="regression", criterion="difference", regime="joint", seed=1))
    lines = markdown(compare(runs)).splitlines()
    assert "MSE (lower is better)" in lines[0]
    assert lines[4] == "| joint | 2 | **12.12** ± 0.32 | 0.6562 ± 0.062 | **0.5** ± 0 |"
    assert lines[5] == "| mixed | 1 | 12.35 ± - | **0.6123** ± - | **0.5** ± - |"


def test_one_row_is_not_the_best_of_any():
    assert "**" not in markdown(compare([made((0.1, 0.2, 0.3))]))


def labelled(*names):
    return compare([made((0.1, 0.2, 0.3), label=name, heads=(name,) * 2) for name in names])


def test_labels_are_escaped():
    table = labelled(r"a_b & 50% {x}\y^~#$", "a|b")
    assert r"a\_b \& 50\% \{x\}\textbackslash{}y\textasciicircum{}\textasciitilde{}\#\$ & joint & 1 &" in latex(table)
    assert "| a\\|b | joint | 1 |" in markdown(table)
    rows = list(csv.reader(as_csv(labelled('x, "y"', "z")).splitlines()))
    assert rows[1][0] == 'x, "y"' and len(set(map(len, rows))) == 1


def test_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    runs = [
        made((0.5712,) * 5, regime=regime, seed=seed, budgets=(25.0, 50.0, 75.0, 100.0, None), shares=(0.2, 0.4, 0.7, 0.9, 1.1))
        for regime in ("disjoint", "mixed-gradual") for seed in (0, 1)
    ]  # fmt: skip
    show_comparison(compare(runs, published=published_tables()["10"]))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert ["mixed-gradual", "2", *["57.12±0.00"] * 5] in [line.split() for line in lines]
    assert ["paper", "40.61±0.08", "64.83±0.46", "71.42±0.34", "71.60±0.38", "71.60±0.38"] in [line.split() for line in lines]
    show_comparison(labelled("one", "two"))
    assert "two joint 1 10.00 ± - 20.00 ± - 30.00 ± -" in " ".join(capsys.readouterr().out.split())
    show_comparison(small(), form="csv")
    assert capsys.readouterr().out == as_csv(small())
    show_published(list(published_tables().values()))
    assert "ViT-T PBEE" in capsys.readouterr().out


def test_title_and_notes():
    grid = [(0.2, 0.5), (1.1, 0.9)]
    table = compare([made((0.1, 0.2, 0.3), grid=grid), made((0.1, 0.2, 0.3), seed=1, grid=grid)], how="average-first")
    assert "max-softmax, the authors' grid, average-first" in table_title(table)
    assert notes(table) == ["The authors' protocol: thresholds were chosen on the test split that they are scored on."]
    paper = compare([made((0.1, 0.2, 0.3), protocol="paper"), made((0.1, 0.2, 0.3), seed=1, protocol="paper")])
    assert notes(paper) == notes(table)
    several = compare([made((0.1, 0.2, 0.3), criterion=name) for name in ("entropy", "margin")])
    assert "rows; calibrated thresholds" in table_title(several)


def test_unknown_format():
    with pytest.raises(EectlError, match=r"unknown format 'markdwn' .did you mean 'markdown'"):
        check_form("markdwn")


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_picture(tmp_path, task):
    runs = [
        made((0.5, 0.6, 0.7), task=task, regime=regime, seed=seed, label=label, heads=(label,) * 2)
        for regime in ("joint", "mixed") for seed in (0, 1) for label in ("gpf", "linear")
    ]  # fmt: skip
    write_all(plot_comparison(tmp_path / "a.svg", compare(runs)))
    words = [element.text for element in ET.parse(tmp_path / "a.svg").iter() if element.tag.endswith("text")]
    assert [word for word in words if word.endswith("(2)")] == [
        "joint gpf (2)", "mixed gpf (2)", "joint linear (2)", "mixed linear (2)",
    ]  # fmt: skip
    assert ("accuracy, %" if task == "classification" else "MSE, lower is better") in words
    drawn = (tmp_path / "a.svg").read_text()  # a colour per regime, a dash pattern per setting
    assert all(colour in drawn for colour in ("#0072b2", "#d55e00")) and "#009e73" not in drawn and "stroke-dasharray" in drawn
    (picture,) = plot_comparison(tmp_path / "b.PNG", compare(runs[:1])).values()
    assert picture.startswith(b"\x89PNG")
