"README.md is nbs/index.ipynb as Markdown: `python tests/readme.py` writes it, tests/test_house.py holds the two together."
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent


def render() -> str:
    "The index notebook as Markdown, code cells by their output alone where they say `#| echo: false`, links from the root."
    nb = nbformat.read(ROOT/"nbs"/"index.ipynb", 4)
    nb.cells = [c for c in nb.cells if not c.source.startswith(("#| hide", "#| default_exp"))]
    for c in nb.cells:
        if c.cell_type == "code" and c.source.startswith("#| echo: false"):
            c.cell_type, c.source = "markdown", "\n\n".join("".join(o["data"]["text/markdown"]) for o in c.pop("outputs") if "text/markdown" in o.get("data", {}))
            c.pop("execution_count", None)
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    text = re.sub(r"\]\(\.\./", "](", text)                        # ../figures/... as seen from the root
    text = re.sub(r"\]\((?!https?:|#|figures/|[A-Z]+\.md|[A-Z]+\)|recipes/|nbs/|tests/)([\w./-]+\.ipynb)", r"](nbs/\1", text)
    return "<!-- made from nbs/index.ipynb by `make export`; edit that -->\n\n" + text + "\n"


if __name__ == "__main__":
    path = ROOT/"README.md"
    path.with_suffix(".md.tmp").write_text(render(), encoding="utf-8")
    path.with_suffix(".md.tmp").replace(path)
