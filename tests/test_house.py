"What must hold of the tree itself: modules equal notebooks, notebooks clean and within bounds, one set of pins, no promise without a file."
import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from readme import render
from slm_study.records import read_csv
from slm_study.report.tables import table_1, table_2, table_all, write_table

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if not {".ipynb_checkpoints", "_proc"} & set(p.parts))
LIBRARY = [p for p in NOTEBOOKS if "studies" not in p.parts and p.name != "index.ipynb"]
STUDIES = [p for p in NOTEBOOKS if "studies" in p.parts]
name = lambda p: p.relative_to(ROOT).as_posix()


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])
def code(path): return [source(c) for c in cells(path) if c["cell_type"] == "code"]
def exported(path): return [s for s in code(path) if re.match(r"\s*#\|\s*export", s)]
def lines(text): return len([l for l in text.splitlines() if l.strip()])
def module_of(path): return next(m[1] for s in code(path) if (m := re.search(r"#\|\s*default_exp\s+(\S+)", s)))


@pytest.fixture(scope="module")
def exported_again(tmp_path_factory):
    "The tree, exported and cleaned anew in another folder."
    copy = tmp_path_factory.mktemp("tree")/"slm_study"
    copy.mkdir()
    shutil.copytree(ROOT/"nbs", copy/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copytree(ROOT/"slm_study", copy/"slm_study", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT/"settings.ini", copy)
    for path in copy.rglob("slm_study/**/*.py"):
        if path.name != "__init__.py": path.unlink()
    for command in ("nbdev_export", "nbdev_clean"):
        done = subprocess.run([Path(sys.executable).parent/command], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return copy


def test_modules_equal_notebooks(exported_again):
    made = {p.relative_to(exported_again): p.read_text() for p in (exported_again/"slm_study").rglob("*.py")}
    there = {p.relative_to(ROOT): p.read_text() for p in (ROOT/"slm_study").rglob("*.py")}
    assert sorted(made) == sorted(there), "a module without its notebook, or the other way round: run `make export`"
    assert not [str(p) for p in made if made[p] != there[p]], "these modules differ from their notebooks: run `make export`"


def test_notebooks_are_clean(exported_again):
    dirty = [name(p) for p in NOTEBOOKS if p.read_text() != (exported_again/p.relative_to(ROOT)).read_text()]
    assert not dirty, "run `make export`, which cleans them"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_size(path):
    assert len(cells(path)) <= 70
    assert sum(map(lines, exported(path))) <= 350
    assert max(map(lines, exported(path)), default=0) <= 50
    assert path.stat().st_size < 300_000


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_library_notebook(path):
    plain = [s for s in code(path) if not re.match(r"\s*#\|\s*(export|hide|default_exp)", s)]
    assert plain, "exports code and demonstrates none of it"
    assert any(re.search(r"\bassert\b|test_\w+\(|expect_fail", s) for s in plain), "asserts nothing"
    text = "".join(source(c) for c in cells(path) if c["cell_type"] == "markdown")
    assert text.lstrip().startswith("# ") and re.search(r"^> \S", text, re.M), "needs a heading and its `>` line"
    assert "nbdev_export()" in code(path)[-1]
    assert any(c.get("outputs") for c in cells(path)), "shows nothing: execute it"


@pytest.mark.parametrize("path", STUDIES, ids=name)
def test_study_notebook(path):
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    names = [t.target.id for t in ast.parse(source(tagged[0])).body]
    assert set(names) <= {"recipe", "model", "technique", "seed", "out"}
    check = code(path)[1]
    assert "check_parameters(globals(), " + ", ".join(f'"{n}"' for n in names) + ")" in check, "the cell after the parameters checks them, all of them"
    assert not exported(path)


def test_no_traces_of_a_machine():
    outputs = {p: json.dumps([c.get("outputs") for c in cells(p)]) for p in NOTEBOOKS}
    found = [name(p) for p, text in outputs.items() if re.search(r"/root/|/home/\w|/Users/|site-packages|/tmp/(?:tmp|ipykernel)|"+re.escape(str(ROOT)), text)]
    assert not found, "an output shows a path of somebody's machine"


def test_names_are_there_and_imports_used():
    "Pages, modules and tests alike; pyproject.toml has the rules."
    done = subprocess.run([Path(sys.executable).parent/"ruff", "check", "--no-cache", "--output-format", "concise", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_order():
    "A notebook imports only what stands before it; in reading order there is no circle."
    order = {"slm_study."+module_of(p): i for i, p in enumerate(LIBRARY)}
    for path in LIBRARY:
        me = "slm_study."+module_of(path)
        for cell in exported(path):
            for node in ast.walk(ast.parse(cell)):
                if not isinstance(node, ast.ImportFrom): continue
                assert not any(a.name == "*" for a in node.names), f"{name(path)}: import *"
                for used in {node.module, *(f"{node.module}.{a.name}" for a in node.names)} & order.keys(): # a module, or names of one
                    assert order[used] < order[me], f"{name(path)} imports {used}, which stands after it"


def test_inits_are_empty():
    assert not [name(p) for p in (ROOT/"slm_study").rglob("__init__.py") if p.read_text().strip()]


def test_settings_and_environment_agree():
    settings = configparser.ConfigParser(delimiters=["="]); settings.read(ROOT/"settings.ini")
    pins = settings["DEFAULT"]["requirements"].split()+settings["DEFAULT"]["dev_requirements"].split()
    environment = yaml.safe_load((ROOT/"environment.yml").read_text())["dependencies"]
    pip = next(d for d in environment if isinstance(d, dict))["pip"]
    assert pip[0] == "-c constraints.txt" and sorted(pip[1:]) == sorted(pins)
    constraints = dict(l.split("==") for l in (ROOT/"constraints.txt").read_text().splitlines() if l and not l.startswith("#"))
    for pin in pins:
        package, version = pin.split("==")
        assert constraints[package] == version, f"constraints.txt has another {package}"


def test_every_dependency_has_its_reason():
    settings = configparser.ConfigParser(delimiters=["="]); settings.read(ROOT/"settings.ini")
    text = (ROOT/"CONTRIBUTING.md").read_text()
    for key in ("requirements", "dev_requirements"):
        for pin in settings["DEFAULT"][key].split(): assert f"`{pin.split('==')[0]}`" in text, f"CONTRIBUTING.md does not say why {pin} is there"


def test_readme_is_the_index():
    assert (ROOT/"README.md").read_text(encoding="utf-8") == render(), "run `make export`"


def test_links_in_readme_exist():
    links = re.findall(r"\]\(((?!https?:|#)[^)\s]+)\)", (ROOT/"README.md").read_text(encoding="utf-8"))
    assert links and not [l for l in links if not (ROOT/l.split("#")[0]).exists()]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_links_in_notebooks_exist(path):
    links = [l for c in cells(path) if c["cell_type"] == "markdown" for l in re.findall(r"\]\(((?!https?:|#)[^)\s]+)\)", source(c))]
    assert not [l for l in links if not (path.parent/l.split("#")[0]).exists()]


def test_readme_says_what_the_records_say():
    "What the front page shows of the results, made anew from figures/pocket and the recipe, is what stands there."
    _, *shown = [c for c in cells(ROOT/"nbs"/"index.ipynb") if c["cell_type"] == "code"]
    ns = {}
    for cell in shown:
        tree = ast.parse(source(cell)); last = tree.body.pop()
        exec(compile(tree, "index.ipynb", "exec"), ns)
        assert eval(compile(ast.Expression(last.value), "index.ipynb", "eval"), ns).data == "".join(cell["outputs"][0]["data"]["text/markdown"]), "execute nbs/index.ipynb and run `make export`"


def test_committed_figures_come_from_a_clean_tree(tmp_path):
    "figures/pocket was made by runs, all of them with one commit, and holds every table and figure."
    folder = ROOT/"figures"/"pocket"
    made = {p.name for p in folder.iterdir()}
    for stem in ("table_1", "table_2", "table_notes"): assert {f"{stem}.{s}" for s in ("csv", "md", "tex")} <= made
    for stem in ("1", "2", "3", "4a", "4b", "5a", "5b", "6a", "6b"): assert {f"figure_{stem}.{s}" for s in ("svg", "png")} <= made
    records = read_csv(folder/"records.csv")
    for stem, table in dict(table_1=table_1, table_2=table_2, table_all=table_all).items(): assert write_table(table(records), tmp_path/stem)[0].read_text() == (folder/f"{stem}.csv").read_text(), stem
    runs = json.loads((folder/"runs.json").read_text())
    assert {r["dirty"] for r in runs} == {False} and len({r["commit"] for r in runs}) == 1
