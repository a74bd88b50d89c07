"""The documentation says what the code says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from attacks.base import attack
from bench import docs
from bench.experiment.overrides import PER_CELL
from bench.reporting.columns import COLUMN
from bench.reporting.trials import COLUMNS, STATES
from defenses.base import defense

ROOT = Path(__file__).parents[1]
PAGES = sorted(docs.HERE.glob("*.md"))
LINKED = sorted([*ROOT.glob("*.md"), *PAGES, *ROOT.glob("results/*.md"), *ROOT.glob("results/*/README.md")])
METHODS = [cls for cls in (*attack.values(), *defense.values()) if cls.__module__.partition(".")[0] in docs.OURS]


@pytest.mark.parametrize("name", ["columns.md", "methods.md", "settings.md"])
def test_a_page_that_is_written_from_the_code_is_what_the_code_says_now(name):
    assert (docs.HERE / name).read_text() == docs.pages()[name], "run python -m bench.docs"


def test_every_column_and_state_has_its_line():
    assert set(COLUMNS) == {*COLUMN, *docs.PLACES}
    assert tuple(docs.STATES) == STATES


def test_a_default_of_levels_is_written_as_levels():
    rows = {name: default for name, default, *_ in docs._settings(defense["aft"], object)}
    assert rows["`epsilon`"] == "`6/255`"
    assert (rows["`lr`"], rows["`weight_decay`"]) == ("`0.01`", "`0.0005`")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        if file.startswith("https:"):
            continue
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_table_of_the_documentation_has_every_page():
    links = re.findall(r"\]\((\w+\.md)\)", (docs.HERE / "README.md").read_text())
    assert {page.name for page in PAGES} - {"README.md"} == set(links)


def texts() -> list[str]:
    """Every text in the code, as it is printed but for what stands in braces."""
    found = []
    for folder in ("bench", "slurm", "defenses", "attacks"):
        for path in (ROOT / folder).rglob("*.py"):
            found += [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
    return [text for text in found if isinstance(text, str)]


def test_every_error_message_of_the_faq_is_one_that_the_code_prints():
    headings = re.findall(r"^### `(.+)`$", (docs.HERE / "faq.md").read_text(), flags=re.MULTILINE)
    known = texts()
    assert len(headings) > 15
    for heading in headings:
        for part in (piece.strip(" ();") for piece in heading.split("…")):
            assert any(part in text for text in known), part


def test_every_setting_that_the_documentation_names_exists():
    from bench.experiment.load import load

    cfg = load([])
    heads = {*PER_CELL, "grid", "dataset", "model", "dispatch", "tracking", "report"}
    for page in PAGES:
        for words in re.findall(r"`([^`]+)`", page.read_text()):
            for key in re.findall(r"(?:^|[ \[{])((?:\w+\.)+\w+)(?=[=,} ]|$)", words):
                head, *rest = key.split(".")
                if head not in heads or rest[-1] in ("py", "md", "yaml", "csv") or re.search(r"[A-Z]{3}|shrink", key):
                    continue
                node = cfg
                for part in (head, *rest):
                    if part in ("submitit", "additional"):
                        break
                    assert part in node, f"{page.name}: {key}"
                    node = node[part]
