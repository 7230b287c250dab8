"""The guides: their examples run as they stand, their links lead somewhere, and they name all there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import torchdrop
from tests import ROOT
from torchdrop import docs

pytestmark = pytest.mark.slow

README = ROOT / "README.md"
GUIDES = [README, *sorted((ROOT / "torchdrop").rglob("*.md")), ROOT / "benchmarks" / "README.md"]
EXAMPLES = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)#:]*)(?:#([^):]*))?\)")


def text(guide: Path) -> str:
    return guide.read_text(encoding="utf-8")


def name(guide: Path) -> str:
    return guide.relative_to(ROOT).as_posix()


def headings(guide: Path) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    found = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text(guide), flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def layers() -> set[str]:
    public = {entry: getattr(torchdrop, entry) for entry in torchdrop.__all__}
    return {entry for entry, value in public.items() if isinstance(value, type) and issubclass(value, nn.Module)}


@pytest.mark.parametrize("guide", [guide for guide in GUIDES if EXAMPLES.search(text(guide))], ids=name)
def test_examples_run(guide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other, from the first of a guide to its last, with no warning."""
    code = compile("\n".join(EXAMPLES.findall(text(guide))), name(guide), "exec")
    exec(code, {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert ("# Dropout(p=0.1, inplace=False)" in text(guide)) == ("Dropout(p=0.1, inplace=False)\n" in printed)


def test_every_block_of_python_is_an_example_that_runs() -> None:
    for guide in GUIDES:
        assert text(guide).count("```python") == len(EXAMPLES.findall(text(guide))), name(guide)
    with_examples = {name(guide) for guide in GUIDES if EXAMPLES.search(text(guide))}
    parts = ("aids", "calibrate", "configure", "core", "integrations", "kernels", "layers", "monte_carlo", "tune")
    assert with_examples >= {f"torchdrop/{part}/README.md" for part in parts}
    assert with_examples >= {"README.md", "torchdrop/schedules.md", "torchdrop/seeds.md"}


def test_the_readme_is_short() -> None:
    assert len(text(README).splitlines()) <= 200
    assert len(EXAMPLES.findall(text(README))) == 5


def test_the_test_command_is_what_ci_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "<!-- tests -->" in script
    (command,) = re.findall(r"<!-- tests -->\n```bash\n(.*)\n```", text(README))
    for part in ("torch==2.13.0", "-e '.[test]'", "ruff check", "mypy", "pytest"):
        assert part in command


@pytest.mark.parametrize("guide", GUIDES, ids=name)
def test_links_lead_to_files_and_headings(guide: Path) -> None:
    for target, heading in LINK.findall(text(guide)):
        file = Path(os.path.normpath(guide.parent / target)) if target else guide
        assert file.exists(), target
        assert not heading or heading in headings(file), f"{target}#{heading}"


def test_the_readme_leads_to_all_guides() -> None:
    linked = {Path(os.path.normpath(ROOT / target)) for target, _ in LINK.findall(text(README)) if target}
    assert {name(guide) for guide in GUIDES if guide != README} <= {name(file) for file in linked}


@pytest.mark.parametrize("guide", [README, ROOT / "torchdrop" / "layers" / "README.md"], ids=name)
def test_tables_name_all_layers(guide: Path) -> None:
    rows = "\n".join(line for line in text(guide).splitlines() if line.startswith("|"))
    assert {layer for layer in layers() if f"`{layer}`" not in rows} == set()


def test_the_guide_names_all_functions_of_layers() -> None:
    rows = "\n".join(line for line in text(ROOT / "torchdrop" / "layers" / "README.md").splitlines() if line[:1] == "|")
    dimensions = {f"{stem}{n}d" for stem in ("dropout", "drop_block") for n in (2, 3)}
    missing = {entry for entry in torchdrop.functional.__all__ if f"`{entry}`" not in rows}
    assert missing - dimensions == {"local_reparameterization", "masksembles_masks", "masksembles_predict"}


class TestSite:
    WITH_REFERENCE = tuple(Path(docs.file_of(page.name)).name for page in docs.PAGES if page.reference)
    """Identifiers in docstrings may name what a class has from torch.nn.Module, which is not on the site."""

    def test_has_all_guides(self) -> None:
        assert {name(guide) for guide in GUIDES} <= {page.guide for page in docs.PAGES}

    def test_is_built_without_warnings(self, tmp_path: Path) -> None:
        pytest.importorskip("pdoc", reason="the site is made by pdoc")
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "torchdrop.docs", str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        page = (tmp_path / "torchdrop" / "monte_carlo.html").read_text(encoding="utf-8")
        assert "Repeating and splitting a prediction" in page
        assert 'id="ClassificationPrediction.mutual_information"' in page
        for path in tmp_path.rglob("*.html"):
            written = re.sub(r"<script.*?</script>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
            for target in re.findall(r'(?:href|src)="([^":]+)"', written):
                file, _, heading = target.partition("#")
                reached = Path(os.path.normpath(path.parent / file)) if file else path
                assert reached.exists(), f"{path.name}: {target}"
                if heading and path.name not in self.WITH_REFERENCE:
                    assert f'id="{heading}"' in reached.read_text(encoding="utf-8"), f"{path.name}: {target}"

    def test_without_pdoc_it_says_what_to_install(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "pdoc", None)
        with pytest.raises(SystemExit) as error:
            docs.main([str(tmp_path / "site")])
        assert error.value.code == 2
        assert "pip install 'torchdrop[docs]'" in capsys.readouterr().err
        assert not (tmp_path / "site").exists()

    def test_links_to_what_is_no_page_are_words(self) -> None:
        pages = {"benchmarks/README.md": "torchdrop/benchmarks.html", "README.md": "torchdrop.html"}
        assert docs.linked("[results](results), [top](../README.md#speed)", "benchmarks/README.md", pages) == (
            "results, [top](../torchdrop.html#speed)"
        )
        images: set[Path] = set()
        shown = docs.linked("![a](benchmarks/results/overview.svg) ![b](absent.svg)", "README.md", pages, images)
        assert shown == "![a](overview.svg) "
        assert images == {ROOT / "benchmarks" / "results" / "overview.svg"}
