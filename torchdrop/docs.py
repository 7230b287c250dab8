"""The documentation as HTML: ``python -m torchdrop.docs [FOLDER]``. Needs ``pip install 'torchdrop[docs]'``.

A page is a module's reference, a guide, which is a markdown file in the folder of the code, or a guide with the
reference of its package below it. In a clone of the repository its README and its benchmarks are pages as well.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os.path
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, get_type_hints

from ._extras import optional

ROOT = Path(__file__).resolve().parents[1]
"""The folder in which the paths of guides begin. A link between guides is relative to the file that has it."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:]*)(#[^):]*)?\)")
"""A link or an image whose target is a file or a heading."""


class Page(NamedTuple):
    """One page: its name, its guide, and whether the module of that name has its reference on it."""

    name: str
    guide: str = ""
    reference: bool = True


PAGES = (
    Page("torchdrop", "README.md"),
    Page("torchdrop.map", "torchdrop/README.md", reference=False),
    Page("torchdrop.layers", "torchdrop/layers/README.md", reference=False),
    Page("torchdrop.functional"),
    Page("torchdrop.losses"),
    Page("torchdrop.configure", "torchdrop/configure/README.md"),
    Page("torchdrop.rules"),
    Page("torchdrop.schedules", "torchdrop/schedules.md"),
    Page("torchdrop.integrations", "torchdrop/integrations/README.md", reference=False),
    Page("torchdrop.seeds", "torchdrop/seeds.md", reference=False),
    Page("torchdrop.monte_carlo", "torchdrop/monte_carlo/README.md"),
    Page("torchdrop.monte_carlo.structured", "torchdrop/monte_carlo/structured.md", reference=False),
    Page("torchdrop.monte_carlo.sequences"),
    Page("torchdrop.monte_carlo.metrics"),
    Page("torchdrop.monte_carlo.plots"),
    Page("torchdrop.monte_carlo.task_plots"),
    Page("torchdrop.calibrate", "torchdrop/calibrate/README.md"),
    Page("torchdrop.calibrate.plots"),
    Page("torchdrop.acquisition"),
    Page("torchdrop.aids", "torchdrop/aids/README.md"),
    Page("torchdrop.tune", "torchdrop/tune/README.md"),
    Page("torchdrop.core", "torchdrop/core/README.md", reference=False),
    Page("torchdrop.kernels", "torchdrop/kernels/README.md", reference=False),
    Page("torchdrop.demo", "torchdrop/demo/README.md", reference=False),
    Page("torchdrop.benchmarks", "benchmarks/README.md", reference=False),
    Page("torchdrop.changes", "torchdrop/CHANGELOG.md", reference=False),
    Page("torchdrop.contributing", "torchdrop/CONTRIBUTING.md", reference=False),
)
"""The pages, in the order of the navigation."""

TEMPLATE = """
{% extends "default/module.html.jinja2" %}
{% block title %}{{ titles[module.modulename] }}{% endblock %}
{% block module_list_link %}
    {% if module.modulename != "torchdrop" %}
        <a class="pdoc-button module-list-button" href="{{ "../" * module.modulename.count(".") }}torchdrop.html">torchdrop</a>
    {% endif %}
{% endblock %}
{% block nav_submodules %}
    <h2>Pages</h2>
    <ul>
        {% for name in all_modules %}
            <li>{{ (name, "") | link(text=titles[name]) }}</li>
        {% endfor %}
    </ul>
{% endblock %}
{% block module_contents %}
    {% if module.modulename in guides and module.members %}
        <h1>Reference of <code>{{ module.modulename }}</code></h1>
    {% endif %}
    {{ super() }}
{% endblock %}
{% macro module_name() %}
    {% if module.modulename not in guides %}<h1 class="modulename">{{ module.modulename }}</h1>{% endif %}
{% endmacro %}
{% macro inherited(cls) %}
    {% for base, members in cls.inherited_members.items() if base[0].startswith("torchdrop.") %}
        {% for m in members if m.docstring and not m.name.startswith("_") %}
            <dd id="{{ m.qualname }}" class="{{ m.kind }}">{{ m.name }}</dd>
        {% endfor %}
    {% endfor %}
{% endmacro %}
"""  # noqa: E501


def file_of(page: str) -> str:
    """Returns the path of a page's file, relative to the folder.

    >>> file_of("torchdrop.monte_carlo")
    'torchdrop/monte_carlo.html'
    """
    return page.replace(".", "/") + ".html"


def title_of(guide: str) -> str:
    """Returns the first heading of a guide.

    >>> title_of("# Seeds\\n\\nText")
    'Seeds'
    """
    return guide.partition("\n")[0].lstrip("# ")


def read(guide: str) -> str:
    """Returns the text of a guide, or "" if there is none, as for the benchmarks outside of a clone.

    Outside of a clone, the README is the package's description, as it was installed.
    """
    path = ROOT / guide
    inside = guide.startswith("torchdrop/") or (ROOT / "pyproject.toml").is_file()
    if inside:
        return path.read_text(encoding="utf-8") if guide and path.is_file() else ""
    if guide != "README.md":
        return ""
    return str(importlib.metadata.metadata("torchdrop").json["description"])


def linked(text: str, guide: str, pages: Mapping[str, str], images: set[Path] | None = None) -> str:
    """Returns the text of a guide, in which links to other guides become links to their pages.

    Args:
        text: the text of the guide.
        guide: the path of the guide.
        pages: the page of each guide's path, as the path of an HTML file.
        images: collects the images that are shown, which are expected in the site's folder. A link to any other file is
            replaced by its words.

    Example:
        >>> pages = {"torchdrop/aids/README.md": "torchdrop/aids.html", "torchdrop/seeds.md": "torchdrop/seeds.html"}
        >>> linked("See [seeds](../seeds.md#seeds).", "torchdrop/aids/README.md", pages)
        'See [seeds](seeds.html#seeds).'
    """
    here = os.path.dirname(guide)
    start = os.path.dirname(pages[guide])

    def replaced(match: re.Match[str]) -> str:
        image, words, target, heading = match[1], match[2], match[3], match[4] or ""
        if not target:
            return match[0]
        path = os.path.normpath(os.path.join(here, target)).replace(os.sep, "/")
        if image:
            if not (ROOT / path).is_file():
                return ""
            if images is not None:
                images.add(ROOT / path)
            return f"![{words}]({os.path.relpath(os.path.basename(path), start or '.')})"
        if path not in pages:
            return words
        return f"[{words}]({os.path.relpath(pages[path], start or '.')}{heading})".replace(os.sep, "/")

    return LINK.sub(replaced, text)


def without_members(name: str) -> ModuleType:
    """Returns a module of this name with nothing in it."""
    made = ModuleType(name)
    made.__dict__["__all__"] = []
    return made


def evaluated(module: ModuleType) -> ModuleType:
    """Turns the annotations of a module's named tuples into types: pdoc cannot look them up and would warn."""
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, tuple) and hasattr(value, "_fields"):
            value.__new__.__annotations__.update(get_type_hints(value))
    return module


def build(folder: Path) -> list[Path]:
    """Writes the site and returns its pages; ``index.html`` leads to the first.

    Raises:
        ImportError: pdoc is not installed.
    """
    pdoc, render, jinja2 = (optional(name, "docs") for name in ("pdoc", "pdoc.render", "jinja2"))
    texts = {page.name: read(page.guide) for page in PAGES}
    shown = [page for page in PAGES if texts[page.name] or page.reference]
    places = {page.guide: file_of(page.name) for page in shown if texts[page.name]}
    images: set[Path] = set()
    guides = {page.name: linked(texts[page.name], page.guide, places, images) for page in shown if texts[page.name]}
    modules = {}
    for page in shown:
        source = evaluated(importlib.import_module(page.name)) if page.reference else without_members(page.name)
        module = modules[page.name] = pdoc.doc.Module(source)
        if page.name in guides:
            module.__dict__["docstring"] = guides[page.name]
    titles = {page.name: title_of(guides.get(page.name, page.name)) for page in shown}
    _configure(render, jinja2, guides, titles)

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, module in modules.items():
        path = folder / file_of(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render.html_module(module, modules), encoding="utf-8")
        written.append(path)
    (folder / "index.html").write_text(render.html_index(modules), encoding="utf-8")
    (folder / "search.js").write_text(render.search_index(modules), encoding="utf-8")
    for image in images:
        shutil.copy(image, folder)
    return written


def _configure(render: Any, jinja2: Any, guides: Mapping[str, str], titles: Mapping[str, str]) -> None:
    """Gives pdoc the template, and leaves guides the markdown that they are: docstrings are in Google's format."""
    render.configure(docformat="google", show_source=False)
    environment = render.env
    loader = jinja2.DictLoader({"module.html.jinja2": TEMPLATE})
    environment.loader = jinja2.ChoiceLoader([loader, environment.loader])
    environment.globals.update(guides=guides, titles=titles)
    convert, markdown = environment.filters["to_markdown"], set(guides.values())

    @jinja2.pass_context
    def to_markdown(context: Any, docstring: str) -> str:
        return docstring if docstring in markdown else convert(context, docstring)

    environment.filters["to_markdown"] = to_markdown


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m torchdrop.docs", description="Write the documentation as HTML.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("torchdrop-docs"), help="where pages go")
    folder = parser.parse_args(arguments).folder
    try:
        pages = build(folder)
    except ImportError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"{len(pages)} pages in {folder}; begin with {folder / 'index.html'}")


if __name__ == "__main__":
    main()
