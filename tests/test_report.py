"The report: drawn without torch, from records alone; one record moves only what uses it; contradictions stop it."
import json, subprocess, sys
import pandas as pd
import pytest

from slm_study.recipes import TECHNIQUES, StudyError
from slm_study.records import METRICS, QUALITY, write_csv
from slm_study.report.claims import VERDICTS, ledger, write_report
from slm_study.report.figures import figure_1, figure_4a, figure_6a, figure_funnel, plt
from slm_study.report.tables import NO_QUALITY, made_up_records, table_1, table_2, table_all, table_notes

TABLES = [f"{t}.{s}" for t in ("table_1", "table_2", "table_notes", "table_all", "table_splits", "table_vs_base", "table_aa", "table_base_again", "table_device") for s in ("csv", "md", "tex")]
FIGURES = [f"figure_{f}.{s}" for f in ("1", "2", "3", "4a", "4b", "5a", "5b", "6a", "6b", "quality_vs_time", "noise", "memory", "funnel") for s in ("svg", "png")]

AGAIN = dict(again=[dict(model="starcoder", technique="base", seed=0, backend="torch", metric="prefill_ms", unit="ms", first=5., second=5.1, ratio=1.02, low=.97, high=1.06)]) # base's second run

WITHOUT_TORCH = """
import json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('torch', 'transformers'): raise ImportError(name + ' is blocked in this test')
sys.meta_path.insert(0, Block())
import numpy as np
from slm_study.records import read_csv
from slm_study.report.claims import write_report
w = np.random.default_rng(0).normal(size=(64, 32)); masked = w.copy(); masked[:9] = 0
write_report(read_csv(sys.argv[1]), sys.argv[2], pruned_example=dict(dense=w, masked=masked, removed=w[32:]), outcomes=json.loads(sys.argv[3]))
assert 'torch' not in sys.modules
"""

@pytest.fixture(scope="module")
def report(tmp_path_factory):
    "A whole report of made-up records, written by a process that cannot import torch."
    folder = tmp_path_factory.mktemp("report")
    write_csv(made_up_records(), folder/"records.csv")
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(folder/"records.csv"), str(folder/"out"), json.dumps(AGAIN)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder/"out"

def test_everything_is_written_without_torch(report):
    assert sorted(p.name for p in report.iterdir()) == sorted([*TABLES, *FIGURES, "claims.csv", "claims.md"])
    assert all(p.stat().st_size > 100 for p in report.iterdir())

def test_one_record_changes_only_what_uses_it(report, tmp_path):
    from slm_study.records import read_csv
    records = read_csv(report.parent/"records.csv")
    here = (records.model == "starcoder") & (records.technique == "pruning") & (records.metric == "latency_ms") & (records.backend == "torch")
    assert here.sum() == 1
    changed = records.copy()
    changed.loc[here, ["value", "low", "high"]] *= .5
    new = {p.name: p.read_bytes() for p in write_report(changed, tmp_path/"out", outcomes=AGAIN)}
    differ = {n for n, b in new.items() if b != (report/n).read_bytes()}
    assert differ == {f"{t}.{s}" for t in ("table_1", "table_notes", "table_all") for s in ("csv", "md", "tex")} | {"figure_4a.svg", "figure_4a.png"}
    cells = (pd.read_csv(report/"table_1.csv") != pd.read_csv(tmp_path/"out"/"table_1.csv")).sum().sum()
    assert cells == 1

@pytest.mark.parametrize("backend, metric, tables, figures", [
    ("torch", "time_ratio", {"table_all", "table_vs_base"}, {"figure_noise", "figure_quality_vs_time"}),
    ("llama.cpp-q4_0", "ms_per_token", {"table_device"}, set())])
def test_one_record_changes_only_what_uses_it_on_every_backend(report, tmp_path, backend, metric, tables, figures):
    from slm_study.records import read_csv
    changed = read_csv(report.parent/"records.csv")
    here = (changed.model == "tinyllama") & (changed.technique == "weight_sharing") & (changed.metric == metric) & (changed.backend == backend)
    assert here.sum() == 1
    changed.loc[here, ["value", "low", "high"]] *= 1.3
    new = {p.name: p.read_bytes() for p in write_report(changed, tmp_path/"out", outcomes=AGAIN)}
    differ = {n.partition(".")[0] for n, b in new.items() if b != (report/n).read_bytes()}
    assert differ - {"claims"} == tables | figures

def test_a_figure_holds_no_date(report):
    svg = (report/"figure_4a.svg").read_text()
    assert "<dc:date>" not in svg and svg.startswith("<?xml")

@pytest.mark.parametrize("metric", ["latency_ms", "exec_pct", "peak_mem_mib"])
def test_a_missing_metric_is_a_gap_not_a_number(metric):
    records = made_up_records()
    gap = records[~((records.model == "tinyllama") & (records.technique == "base") & (records.metric == metric))]
    full, open_ = table_2(records), table_2(gap)
    differ = full != open_
    assert differ.sum().sum() == 1 and (open_[differ] == "missing").sum().sum() == 1

@pytest.mark.parametrize("spoil, message", [
    (lambda r: pd.concat([r, r.iloc[[3]]]), "stands twice"),
    (lambda r: r.assign(unit=r.unit.replace("MiB", "MB")), "another unit"),
    (lambda r: r.assign(technique=r.technique.replace("early_exit", "earlyexit")), "no such technique"),
    (lambda r: pd.concat([r, r.assign(recipe="smoke")]), "2 recipes")])
@pytest.mark.parametrize("draw", [table_1, table_2, table_notes, table_all, figure_4a, figure_6a, figure_funnel, ledger])
def test_contradictory_records_stop_everything_in_one_line(spoil, message, draw):
    with pytest.raises(StudyError, match=message) as e: draw(spoil(made_up_records()))
    assert "\n" not in str(e.value)
    plt.close("all")

def test_an_empty_study_is_all_gaps(tmp_path):
    none = made_up_records().head(0)
    assert set(table_1(none)["Latency (ms)"]) == {"missing"}
    assert len(write_report(none, tmp_path)) > 30

def test_every_known_technique_and_metric_has_a_place():
    records = made_up_records()
    assert len(table_1(records)) == len(TECHNIQUES)
    assert len(table_all(records).columns) == 2 + len(METRICS)
    from slm_study.report.figures import COLOURS
    assert set(TECHNIQUES) <= set(COLOURS)

def test_ledger_is_whole():
    for book in (ledger(), ledger(made_up_records())):
        assert len(book) >= 60 and set(book.verdict) <= set(VERDICTS)
        assert (book[["statement", "published", "computed", "evidence"]].map(len) > 0).all().all()

def test_masked_pruning_that_shrinks_nothing_is_contradicted():
    records = made_up_records()
    sizes = records.metric.isin(["parameters"])
    records.loc[sizes, "value"] = 2e6
    book = ledger(records)
    said = book[book.statement.str.contains("set to zero") | book.statement.str.contains("tied as it ships")]
    assert len(said) == 3 and set(said.verdict) == {"contradicted"}

def test_figure_1_shows_the_manifest_or_the_plan():
    assert "plan" in figure_1().get_title(loc="left")
    plt.close("all")

def test_a_study_that_wrote_no_programs_is_reported_with_its_reason(tmp_path):
    "Random weights: times and memory alone; every other cell says why it is empty."
    records = made_up_records()
    write_report(records[~records.metric.isin(QUALITY)], tmp_path/"out")
    device, all_of_it = (pd.read_csv(tmp_path/"out"/f"table_{t}.csv") for t in ("device", "all"))
    assert set(device["accuracy_pct (%)"]) == {NO_QUALITY} and set(all_of_it["exec_pct (%)"]) == {NO_QUALITY}
    assert not device["ms_per_token (ms)"].str.contains("missing|not measured").any()
