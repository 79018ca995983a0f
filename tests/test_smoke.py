"The whole study on the smoke recipe, as a user runs it: once to its end, killed and resumed, and with everything that can be wrong."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from slm_study.assistant.cli import only_one
from slm_study.evaluation.worker import tree
from slm_study.report.comparisons import with_process_noise
from slm_study.report.tables import NOT_FOR
from slm_study.records import BACKENDS, METRICS, OPTIONAL, collect, read_csv
from slm_study.recipes import MODELS, TECHNIQUES, Run

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def slm(*args, **kw): return subprocess.run([BIN/"slm-study", *map(str, args)], capture_output=True, text=True, cwd="/", **kw)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "A finished smoke study; it was killed once in the middle of an evaluation."
    out = tmp_path_factory.mktemp("smoke")
    command = [BIN/"slm-study", "run", "--recipe", "smoke", "--out", str(out)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd="/")
    for _ in range(3000):
        if (written := list(out.glob("*/seed0/*/record.json"))) or first.poll() is not None: break
        time.sleep(.2)
    time.sleep(8)                                  # their runs are over (Snakemake touches what a run has made), others are in their middle
    kept = {p: p.stat().st_mtime_ns for p in written}
    os.killpg(first.pid, signal.SIGKILL); first.wait()
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stdout[-3000:]+done.stderr[-2000:]
    return out, kept, done


def test_a_kill_ends_every_step(tmp_path):
    "`kill` of slm-study: no step of it goes on, and the folder is free again."
    out = tmp_path/"out"
    command = lambda pid: (Path("/proc")/str(pid)/"cmdline").read_bytes() if (Path("/proc")/str(pid)).exists() else b""
    with open(tmp_path/"said", "w") as said:
        first = subprocess.Popen([BIN/"slm-study", "run", "--recipe", "smoke", "--out", str(out)], stdout=said, stderr=subprocess.STDOUT, cwd="/")
        for _ in range(600):
            below = tree(first.pid)
            begun = any(b"ipykernel" in command(p) for p in below)
            if begun or first.poll() is not None: break
            time.sleep(.2)
        first.terminate()
        assert first.wait(60) == 1 and begun
    for _ in range(100):
        if not any(map(command, below)): break
        time.sleep(.2)
    assert not [command(p) for p in below if command(p)]
    assert f"finished runs are kept in {out}" in (tmp_path/"said").read_text()
    with only_one(out): pass


def test_killed_study_goes_on(study):
    out, kept, done = study
    assert 1 <= len(kept) < len(MODELS)*len(TECHNIQUES), "the kill came before the first record, or after the last"
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items()), "a finished run was done again"
    assert not list(out.rglob("*.tmp")), "a torn file was left"


def test_every_cell_has_its_metrics(study):
    out, _, _ = study
    records = read_csv(out/"figures"/"records.csv")
    assert {(m, t) for m, t in zip(records.model, records.technique)} == {(m, t) for m in MODELS for t in TECHNIQUES}
    for key, group in records.groupby(["model", "technique", "backend"]):
        wanted = {m for m in METRICS if m not in OPTIONAL and (m not in NOT_FOR or not NOT_FOR[m](*key[1:]))}
        assert wanted <= set(group.metric), f"{key} lacks {wanted-set(group.metric)}"
    assert {(m, t, b) for m, t, b in zip(records.model, records.technique, records.backend)} == {(m, t, b) for m in MODELS for t in TECHNIQUES for b in BACKENDS}
    assert np.isfinite(records.value).all() and not records.duplicated(["model", "technique", "seed", "metric", "backend"]).any()
    pd.testing.assert_frame_equal(records, with_process_noise(collect(out)), rtol=1e-4, check_dtype=False)


def test_figures_and_tables(study):
    made = {p.name for p in (study[0]/"figures").iterdir()}
    for stem in ("table_1", "table_2", "table_notes"): assert {f"{stem}.{s}" for s in ("csv", "md", "tex")} <= made
    for stem in ("1", "2", "3", "4a", "4b", "5a", "5b", "6a", "6b"): assert {f"figure_{stem}.{s}" for s in ("svg", "png")} <= made
    assert {"records.csv", "claims.md", "claims.csv", "runs.json"} <= made


def test_programs_ran_isolated_and_tables_say_how(study):
    figures = study[0]/"figures"
    assert {run["sandbox"] for run in json.loads((figures/"runs.json").read_text())} <= set("ABC")
    for stem in ("table_1", "table_2", "table_vs_base"): assert "sandbox tier" in (figures/f"{stem}.md").read_text(), stem


def test_second_run_does_nothing(study):
    out, _, _ = study
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.json")}
    done = slm("run", "--recipe", "smoke", "--out", out)
    assert done.returncode == 0 and "Nothing to be done" in done.stdout+done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.json")}


def test_pruned_checkpoint_is_smaller_and_plain(study):
    code = """import sys; from transformers import AutoModelForCausalLM
size = lambda p: AutoModelForCausalLM.from_pretrained(p).num_parameters()
print(size(sys.argv[1]), size(sys.argv[2])); assert 'slm_study' not in sys.modules"""
    for model in MODELS:
        run = Run("smoke", model, "pruning", out=study[0])
        pruned, tuned = map(int, subprocess.run([sys.executable, "-c", code, run.folder/"model", run.tuned], capture_output=True, text=True, cwd="/").stdout.split()[-2:])
        assert pruned < tuned


def test_executed_notebooks_are_kept(study):
    assert len(list((study[0]/"notebooks").glob("3_evaluate-*.ipynb"))) == len(MODELS)*len(TECHNIQUES)


def test_a_failing_cell_leaves_its_notebook_and_one_line(study, tmp_path):
    "A checkpoint that was cut off: status 1, one line with the file, the executed notebook kept."
    copy = tmp_path/"out"
    shutil.copytree(study[0], copy, ignore=shutil.ignore_patterns(".snakemake", ".lock"))
    weights = Run("smoke", "starcoder", "base", out=copy).tuned/"model.safetensors"
    whole = weights.read_bytes(); weights.unlink(); weights.write_bytes(whole[:1000])
    (Run("smoke", "starcoder", "base", out=copy).folder/"record.json").unlink()
    done = subprocess.run([sys.executable, "-m", "slm_study.studies", "3_evaluate", "--recipe", "smoke", "--model", "starcoder", "--technique", "base", "--out", copy], capture_output=True, text=True, cwd="/")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert str(weights.parent) in last and "truncated or damaged" in last and "run the study again" in last
    assert (copy/"notebooks"/"3_evaluate-starcoder-base-seed0.ipynb").exists()
    assert not (Run("smoke", "starcoder", "base", out=copy).folder/"record.json").exists()


@pytest.mark.parametrize("given,says", [("-p tecnique pruning", "tecnique: no such parameter; this notebook has recipe, model, technique, seed, out"),
                                        ("-p model starcode", "model: 'starcode' is not one of tinyllama, starcoder"),
                                        ("-p technique prune", "technique: 'prune' is not one of untuned, base"),
                                        ("-p recipe pockett", "pockett: no such recipe; there are")])
def test_misspelt_parameter_stops_before_any_work(tmp_path, given, says):
    done = subprocess.run([BIN/"papermill", ROOT/"nbs"/"studies"/"3_evaluate.ipynb", tmp_path/"out.ipynb", *given.split(), "-p", "out", tmp_path/"work"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and says in done.stderr
    assert not (tmp_path/"work").exists()


def test_study_notebook_works_by_itself_from_any_folder(study, tmp_path):
    done = subprocess.run([BIN/"papermill", ROOT/"nbs"/"studies"/"3_evaluate.ipynb", "out.ipynb", "-p", "model", "starcoder", "-p", "technique", "pruning", "-p", "out", str(study[0])],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path/"out.ipynb").exists()


def test_wrong_calls_say_so_in_one_line():
    for args, says in ((["run", "--recipe", "none"], "no such recipe"), (["run", "--model", "gpt"], "is not one of tinyllama, starcoder"), (["run", "--technique", "magic"], "is not one of untuned")):
        done = slm(*args)
        assert done.returncode == 2 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1
    for args in (["--help"], ["run", "--help"]):
        done = slm(*args)
        assert done.returncode == 0
    assert "slm-study run --recipe smoke" in done.stdout


def test_edited_records_are_refused(study, tmp_path):
    (tmp_path/"figures").mkdir()
    text = (study[0]/"figures"/"records.csv").read_text()
    (tmp_path/"figures"/"records.csv").write_text(text.replace(",untuned,", ",untunned,", 1))
    done = subprocess.run([BIN/"papermill", ROOT/"nbs"/"studies"/"4_results.ipynb", tmp_path/"out.ipynb", "-p", "recipe", "smoke", "-p", "out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode != 0 and "no such technique" in done.stderr and "records.csv" in done.stderr
    assert sorted(p.name for p in (tmp_path/"figures").iterdir()) == ["records.csv"]


def test_results_are_of_this_recipe_alone(study, tmp_path):
    "Runs that the recipe does not name any more are left out, and what an earlier study wrote is gone."
    copy, given = tmp_path/"out", yaml.safe_load((ROOT/"recipes"/"smoke.yaml").read_text())
    shutil.copytree(study[0], copy, ignore=shutil.ignore_patterns(".snakemake", ".lock", "*.safetensors", "*.gguf"))
    assert {"sweep.csv", "table_sweep.md", "curve_tau.csv", "figure_tau.png"} <= {p.name for p in (copy/"figures").iterdir()}
    def linked(): return set(re.findall(r"\]\(([\w.]+)\)", (copy/"figures"/"README.md").read_text()))
    def made(): return {p.name for p in (copy/"figures").iterdir() if p.name.startswith(("table_", "figure_")) and p.suffix != ".svg"}
    assert made() | {"claims.md"} == linked()
    (tmp_path/"smoke.yaml").write_text(yaml.safe_dump({**given, "techniques": ["base", "pruning"], "sweep": {**given["sweep"], "run": False}}))
    done = subprocess.run([BIN/"papermill", ROOT/"nbs"/"studies"/"4_results.ipynb", tmp_path/"out.ipynb", "-p", "recipe", tmp_path/"smoke.yaml", "-p", "out", copy, "--log-output"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "left out, since the recipe does not name them: starcoder/seed0/combined" in done.stdout+done.stderr
    assert set(read_csv(copy/"figures"/"records.csv").technique) == {"base", "pruning"}
    assert not {"sweep.csv", "table_sweep.md", "curve_tau.csv", "figure_tau.png"} & {p.name for p in (copy/"figures").iterdir()}
    assert made() | {"claims.md"} == linked()
