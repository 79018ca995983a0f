"""Quality numbers from hand-made samples and from real runs."""
import json
from dataclasses import dataclass, replace

import pytest

from slm_study.curation.tasks import generate_tasks
from slm_study.evaluation.quality import CRITERIA, criteria, evaluate_samples, q_score, q_score_keywords, quality_metrics, repair_table, sample_of
from slm_study.evaluation.jail import Outcome
from slm_study.evaluation.sandbox import Sandbox
from slm_study.records import METRICS

@dataclass(frozen=True)
class Text:
    text: str
    new_tokens: int = 10
    stop_reason: str = "eos"
    seconds: float = 0.1

TASKS = [replace(t, prompt=t.request) for t in generate_tasks(16, seed=9, split="iid")]

@pytest.fixture(scope="module")
def box():
    with Sandbox(workers=1, calibrate=False) as b: yield b

def evaluate(box, texts): return evaluate_samples(TASKS[:len(texts)], texts, box, slots=False, progress=False)

def test_references_are_right_and_empty_texts_are_not(box):
    right, empty = evaluate(box, [Text(t.program) for t in TASKS]), evaluate(box, [Text("") for _ in TASKS])
    value = lambda s: {m.metric: m.value for m in quality_metrics(s)}
    assert [value(right)[k] for k in ("valid_raw_pct", "valid_pct", "exec_pct", "accuracy_pct", "syntax_errors", "inference_success_pct")] == [100, 100, 100, 100, 0, 100]
    assert [value(empty)[k] for k in ("valid_raw_pct", "valid_pct", "exec_pct", "accuracy_pct", "syntax_errors", "inference_success_pct")] == [0, 0, 0, 0, 0, 0]

def test_one_denominator(box):
    texts = [Text(t.program if i % 2 else "print(", stop_reason="eos" if i % 4 else "length") for i, t in enumerate(TASKS)]
    got = {m.metric: m for m in quality_metrics(evaluate(box, texts))}
    parts = [got.pop(f"accuracy_{k}_families_pct").n for k in ("known", "new")]
    assert {m.n for m in got.values()} == {sum(parts)} == {len(TASKS)} and min(parts) > 0 and set(got) <= set(METRICS)
    assert got["accuracy_pct"].value <= got["exec_pct"].value <= got["valid_pct"].value
    assert got["valid_raw_pct"].value == 50 and got["syntax_errors"].value == len(TASKS)/2 and got["inference_success_pct"].value == 75
    assert all(m.low <= m.value <= m.high for m in got.values())

def test_wrong_output_runs_but_is_not_right(box):
    s = evaluate(box, [Text("print('something else')"), Text("import sys; sys.exit(1)"), Text("while True: pass")][:2])
    assert [(x["executed"], x["correct"]) for x in s] == [(True, False), (False, False)]

def test_a_program_cannot_claim_to_be_right(box):
    cheat = "import gc\nfor o in gc.get_objects():\n    if isinstance(o, dict) and 'answer' in o: print(o['answer'])\nprint('{\"correct\": true}')"
    assert not evaluate(box, [Text(cheat)])[0]["correct"]

def test_repaired_and_raw_stand_side_by_side(box):
    s = evaluate(box, [Text(f"```python\n{t.program}```") for t in TASKS[:4]])
    assert all(not x["valid_raw"] and x["valid"] and x["correct"] and not x["correct_raw"] and x["repairs"] == ["fences"] for x in s)
    assert repair_table(s).loc["fences", "correct"] == 4

def test_slots_are_filled():
    task = replace(TASKS[0], slots={"C0": "the 'name'", "N0": -3})
    assert sample_of(task, Text("print(df[C0] + N0)"))["program_raw"] == "print(df[\"the 'name'\"] + -3)"

def test_samples_are_json(box): json.dumps(evaluate(box, [Text("print('\ud800')"), Text("x = 1\0")]))

def test_surrogates_and_monsters_do_not_stop_the_evaluation(box):
    s = evaluate(box, [Text(t) for t in ("\ud800", "("*5_000, "x"*100_000, "\0", "```", "print(1)")])
    assert s[-1]["executed"] and not any(x["executed"] for x in s[:-1])

@pytest.mark.parametrize("name,program,outcome,met", [
    ("library", "import numpy as np\nx = np.pi", Outcome("ok", 0), True), ("library", "import numpy as np", Outcome("ok", 0), False), ("library", "# numpy", Outcome("ok", 0), False),
    ("printed", "print(1)", Outcome("ok", 0, stdout="1\n"), True), ("printed", "if 0: print(1)", Outcome("ok", 0), False), ("printed", "print(1); 1/0", Outcome("exception", 1, stdout="1\n"), False),
    ("visualisation", "plt.savefig('a.png')", Outcome("ok", 0), False), ("visualisation", "x = 1", Outcome("ok", 0, files={"x": b"\x89PNG\r\n"}), True), ("visualisation", "x = 1", Outcome("ok", 0, files={"a.png": b"hello"}), False),
    ("data", "import random\nx = random.random()", Outcome("ok", 0), True), ("data", "x = 'np.random'", Outcome("ok", 0), False), ("syntax", "x = 1", Outcome("ok", 0), True), ("syntax", "x = (", Outcome("exception", 1), False)])
def test_criteria(name, program, outcome, met): assert criteria(program, outcome)[name] is met

def test_scores_are_between_0_and_100():
    assert q_score(dict.fromkeys(CRITERIA, True)) == 100 and q_score(dict.fromkeys(CRITERIA, False)) == 0
    assert q_score_keywords("") == 0 and q_score_keywords("import pandas\nKMeans print( plt.plot data") == 100
