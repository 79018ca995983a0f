"Curation where it does not teach: other processes, hostile text, the splits in bulk."
import json, os, random, re, subprocess, sys

import pytest

from slm_study.curation.corpus import held_out_tasks, make_pair, seen_before
from slm_study.curation.prompts import render
from slm_study.curation import questions
from slm_study.curation.questions import AGGREGATES, held_out
from slm_study.curation.slots import SLOT_COUNTS, SLOT_TOKENS, Column, fill_slots, program_to_slots, to_slots
from slm_study.curation.sources import SOURCES, load_source
from slm_study.curation.log_formats import FORMATS, HELD_OUT_FORMATS
from slm_study.curation.variation import THESAURUS, telegraphic, vary
from slm_study.curation.tasks import FAMILIES, LOG_FAMILIES, SCIENCE_FAMILIES, SPLITS, Task, families_of, make_task, run_reference, sample_pair, same_answer
from slm_study.curation.worlds import WORLDS, all_names
from slm_study.recipes import StudyError

HARD = ["'", '"', "\\", "\n", "\t", "{", "}", "[", "]", "(", ")", "#", "π", "日本", "C0", "V1", "N2", "F0", "class", "None", " ", "a", "b", "0", "5", "-", ".", ",", "+", "*", "?", "^", "$", "%", "`", "“", "”", "\x00", "\ud7ff", "😀"]

def run_python(code:str, **env)-> str:
    "stdout of a fresh interpreter"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout

MANY = """
import hashlib, json, random
from slm_study.curation.tasks import generate_tasks
from slm_study.curation.corpus import make_pair
if __name__ == "__main__":
    tasks = [t.to_dict() for s in ("iid", "composition", "format") for t in generate_tasks(10, 3, s, workers=%d)]
    rng = random.Random("x")
    print(hashlib.sha256(json.dumps([tasks, [make_pair(rng) for _ in range(200)]], sort_keys=True).encode()).hexdigest())
"""

def test_same_bytes_in_another_process_with_other_hashes_and_workers(tmp_path):
    (tmp_path/"two.py").write_text(MANY % 2) # processes are started anew, so they need a file
    two = subprocess.run([sys.executable, "two.py"], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.getcwd()}, timeout=200)
    assert two.returncode == 0, two.stderr[-1500:]
    assert run_python("import slm_study.curation.inference_tasks, slm_study.curation.log_tasks, slm_study.curation.machine_tasks\n" + MANY % 1, PYTHONHASHSEED="1") == two.stdout # nor does it count what was imported first

FRESH = """
import contextlib, io, json, os, sys
for i, (files, program) in enumerate(json.load(open("tasks.json"))):
    os.makedirs(str(i)); os.chdir(str(i))
    for name, text in files.items(): open(name, "w", encoding="utf-8").write(text)
    with contextlib.redirect_stdout(io.StringIO()) as out: exec(program, {"__name__": "__main__"})
    os.chdir("..")
    print(json.dumps(out.getvalue()))
"""

def test_references_answer_in_a_fresh_interpreter_with_other_threads(tmp_path):
    tasks = [make_task(11, "iid", (f,)) for f in FAMILIES]
    (tmp_path/"tasks.json").write_text(json.dumps([(t.files, t.preamble + t.program) for t in tasks]))
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", FRESH], cwd=tmp_path, capture_output=True, text=True, timeout=120, env={**os.environ, "MPLBACKEND": "agg", "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "5"})
    assert out.returncode == 0, out.stderr[-1500:]
    for task, line in zip(tasks, out.stdout.splitlines(), strict=True): assert same_answer(task.answer, json.loads(line)), (task.request, line)

def test_there_are_enough_families_and_wordings():
    machine = set(LOG_FAMILIES) | {"group_percentile", "distinct_per_group", "group_portion", "common_pair", "cross_table", "group_top_row", "period_aggregate", "busiest_period",
                                   "period_share", "rolling", "crossings", "changes", "sessions", "cumulative", "missing", "missing_by", "without_duplicates"}
    assert machine <= set(FAMILIES)
    assert len(FAMILIES) >= 45 and len(machine) >= 25 and len(SCIENCE_FAMILIES) >= 20
    assert len(set(FORMATS) - set(HELD_OUT_FORMATS)) >= 8 and len(HELD_OUT_FORMATS) >= 2
    assert {f.difficulty for f in FAMILIES.values()} == {1, 2, 3}
    for f in FAMILIES.values(): assert len(set(f.wordings)) >= 10, f.name

@pytest.mark.parametrize("family", FAMILIES)
def test_family_varies(family):
    rng = random.Random(5)
    pairs = [sample_pair(rng, "train", (family,)) for _ in range(100)]
    assert len({p[0] for p in pairs}) > 40
    assert len({p[3] for p in pairs}) >= 20
    for p in pairs:
        assert p[3].count("\n") <= 14 and len(re.sub(r"r'[^'\n]*'", "''", p[3])) < 660, p[3] # patterns of logs apart
    tasks = [make_task(i, "iid", (family,)) for i in range(4)]
    assert len({json.dumps(t.answer) for t in tasks}) >= 2
    assert all(same_answer(t.answer, run_reference(t.program, t.files, t.preamble)[1]) for t in tasks[:2])
    assert Task.from_dict(json.loads(json.dumps(tasks[0].to_dict()))) == tasks[0]

def fold(text): return " ".join(text.casefold().split()).strip(" .?!")

def test_no_split_shares_a_request_or_a_program_with_training():
    rng = random.Random(1)
    train = [sample_pair(rng) for _ in range(20_000)]
    requests, programs = {fold(p[0]) for p in train}, {p[3] for p in train}
    for split in SPLITS[1:]:
        for _ in range(300):
            request, _, _, program, name, _ = sample_pair(rng, split)
            assert fold(request) not in requests and program not in programs, (split, name, request, program)

@pytest.fixture
def parts(monkeypatch):
    "Draws of a split with the parts of the last question"
    last, init = [], questions.Question.__init__
    def remember(self, *args, **kw):
        init(self, *args, **kw)
        last[:] = [self]
    monkeypatch.setattr(questions.Question, "__init__", remember)
    def draw(rng, split, family): return sample_pair(rng, split, (family,)), last[0]
    return draw

def test_combinations_are_held_out_and_every_part_is_trained(parts):
    rng, trained, tested = random.Random(3), set(), set()
    for name in FAMILIES:
        for _ in range(40):
            q = parts(rng, "train", name)[1]
            assert not any(held_out(name, p) for p in q.parts)
            trained |= set(q.parts)
    for name in families_of("composition"):
        for _ in range(8):
            q = parts(rng, "composition", name)[1]
            assert any(held_out(name, p) for p in q.parts)
            tested |= set(q.parts)
    assert len(trained) >= 20 and tested <= trained, tested - trained
    assert len(families_of("composition")) >= 25

def test_held_out_wordings_are_said_in_phrasing_alone(monkeypatch, parts):
    said, format_wording = [], questions.ALTERNATIVES
    class Spy: # sees which wording is chosen
        def sub(self, f, wording):
            said.append(wording)
            return format_wording.sub(f, wording)
    monkeypatch.setattr(questions, "ALTERNATIVES", Spy())
    rng = random.Random(4)
    for split in ("train", "iid", "composition", "schema", "phrasing"):
        for name in families_of(split):
            for _ in range(4):
                parts(rng, split, name)
                ways = FAMILIES[name].wordings
                assert said[-1] in (ways[-2:] if split == "phrasing" else ways[:-2]), (split, said[-1])

def test_held_out_formats_are_in_format_alone():
    rng = random.Random(6)
    for split in SPLITS:
        logs = tuple(n for n in families_of(split) if n in LOG_FAMILIES)
        seen = {v for _ in range(200) for c in sample_pair(rng, split, logs)[2] if c.kind == "file" for v in c.values}
        assert seen and (seen <= set(HELD_OUT_FORMATS) if split == "format" else not seen & set(HELD_OUT_FORMATS)), (split, seen)

def test_schema_split_shares_no_name_with_training():
    fields = [f for fmt in FORMATS.values() for f in fmt.fields.values()]
    rng, known = random.Random(2), all_names("train") | {n.casefold().replace(" ", "_") for f in fields for n in f.names}
    assert not known & (all_names("schema") | {n.casefold().replace(" ", "_") for f in fields for n in f.new_names})
    for _ in range(500):
        columns = [c for c in sample_pair(rng, "schema")[2] if c.kind != "file"]
        assert not {c.name.casefold().replace(" ", "_") for c in columns} & known

def test_slots_do_not_depend_on_the_order_of_columns():
    "A request and its program in slots are the same whatever order the table's columns, or the log's fields, stand in."
    rng, shuffled = random.Random(5), 0
    for task in held_out_tasks(120, 3, True):
        files = [i for i, c in enumerate(task.columns) if c.kind == "file"]
        if len(files) > 1 or len(task.columns) > 16: continue
        rest = [c for c in task.columns if c.kind != "file"]
        columns = (*(task.columns[i] for i in files), *rng.sample(rest, len(rest)))
        prompt, slots = render(task.request, task.handover, columns)
        assert prompt.split("\n")[1] == task.prompt.split("\n")[1]
        said = set(re.findall(r"\b[CVNF]\d+\b", task.prompt.split("\n")[1]))
        assert {s: slots[s] for s in said} == {s: task.slots[s] for s in said}
        shuffled += columns != task.columns
    assert shuffled > 40

def test_what_a_model_has_met_is_counted_as_it_reads():
    tasks = held_out_tasks(20, 4, True)
    own = [(t.prompt, program_to_slots(t.program, t.slots)) for t in tasks]
    n = {s: sum(t.split == s for t in tasks) for s in {t.split for t in tasks}}
    assert seen_before(tasks, own) == {s: [k, k, k] for s, k in n.items()}
    assert seen_before(tasks, [(p, "pass") for p, _ in own]) == {s: [k, k, 0] for s, k in n.items()}
    assert seen_before(tasks, [("df C0 number\nno such request\n<|program|>\n", "pass")]) == {s: [k, 0, 0] for s, k in n.items()}

def test_pairs_are_linked_and_round_trip():
    rng, left = random.Random(9), 0
    for split in ("train", "schema"):
        for _ in range(1500):
            request, _, columns, program, *_ = sample_pair(rng, split)
            slots = to_slots(request, columns).slots
            p = program_to_slots(program, slots)
            assert fill_slots(p, slots) == program
            left += any(repr(c.name) in p for c in columns) or any(repr(v) in p for c in columns if c.kind == "category" for v in c.values)
    assert left < 15 # of 3,000

def test_slots_round_trip_on_hostile_names():
    rng = random.Random(0)
    def name(): return "".join(rng.choices(HARD, k=rng.randint(1, 6)))
    for _ in range(2000):
        values = list(dict.fromkeys(name() for _ in range(4)))
        slots = {f"{'CVF'[i % 3]}{i}": v for i, v in enumerate(values)} | {"N0": rng.choice((rng.randint(-10**6, 10**6), rng.uniform(-10, 10), 1e-7, 2.5e20))}
        program = "rows = df[" + "].f(".join(slots) + ")]  # C0 'V1'\nx = [" + ", ".join(slots) + "]\n"
        assert program_to_slots(fill_slots(program, slots), slots) == program

def test_linking_and_filling_never_raise_on_any_text():
    rng = random.Random(1)
    for _ in range(1500):
        text = "".join(rng.choices(HARD + SLOT_TOKENS + ["mean ", "top 5 ", "1e999 ", "--3"], k=rng.randint(0, 30)))
        columns = tuple(Column("".join(rng.choices(HARD, k=rng.randint(0, 4))), rng.choice(("time", "category", "number", "file")), tuple(rng.choices(HARD, k=2))) for _ in range(rng.randint(0, 20)))
        slotted = to_slots(text, columns)
        assert len(set(map(repr, slotted.slots.values()))) == len(slotted.slots) and set(slotted.slots) <= set(SLOT_TOKENS)
        assert "\n" not in slotted.schema_line or any("\n" in str(v) for c in columns for v in c.values)
        fill_slots(text, slotted.slots)
        program_to_slots(text, slotted.slots)

def test_wide_tables_and_many_mentions_keep_within_the_slots():
    columns = tuple(Column(f"col{chr(97 + i // 26)}{chr(97 + i % 26)}", "number") for i in range(200))
    slots = to_slots(" ".join(c.name for c in columns[50:150]) + " ".join(map(str, range(40))), columns).slots
    assert {k: sum(s[0] == k for s in slots) for k in "CN"} == {k: SLOT_COUNTS[k] for k in "CN"}

def test_names_within_a_world_cannot_be_mixed_up():
    for world, concepts in WORLDS.items():
        for pool in ("names", "new_names"):
            names = [n.casefold() for c in concepts for n in getattr(c, pool)]
            assert len(set(names)) == len(names), world
        values = [v.casefold() for c in concepts if c.kind == "category" for v in c.contents]
        assert len(set(values)) == len(values), world

@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2", b"\xff\xfe\x00", b'{"a": {"b": 1}}', b"null"])
def test_broken_sources_are_one_line(tmp_path, name, content):
    for suffix in ("json", "jsonl", "csv", "parquet"):
        path = tmp_path/f"rows.{suffix}"
        path.write_bytes(content)
        with pytest.raises(StudyError) as e: list(load_source(name, str(path)))
        assert str(path) in str(e.value) and "\n" not in str(e.value)

def test_a_folder_of_shards_is_one_source(tmp_path):
    for i in range(3): (tmp_path/f"{i}.jsonl").write_text(json.dumps({"prompt": f"question {i}", "chosen": "", "rejected": ""}) + "\n")
    assert [r["prompt"] for r in load_source("astronomy", str(tmp_path))] == ["question 0", "question 1", "question 2"]

def test_slots_can_be_switched_off():
    on, off = (make_pair(random.Random(8), slots) for slots in (True, False))
    assert on["program"] == off["program"] == off["completion"] != on["completion"]

def test_aggregates_are_pandas_methods():
    import pandas as pd
    for name in AGGREGATES: assert getattr(pd.Series([1.0, 2.0, 4.0]), name)() > 0

@pytest.mark.parametrize("family", ["top_values", "largest_rows", "groups_over", "log_top"])
def test_n_binds_and_the_cut_is_no_tie(family):
    for task in (make_task(i, split, (family,)) for split in ("iid", "phrasing") for i in range(6)):
        wide = re.sub(r"(head|nlargest|nsmallest)\(\d+", r"\1(99999", re.sub("counts > \\d+", "counts > 0", task.program))
        assert wide != task.program and not same_answer(task.answer, run_reference(wide, task.files, task.preamble)[1]), task.request
        if "value_counts().head" not in task.program: continue
        (counts,), = run_reference(wide, task.files, task.preamble)[0]
        n = int(re.search(r"head\((\d+)", task.program)[1])
        assert len(counts) > n and counts.iloc[n - 1] > counts.iloc[n], task.request

@pytest.mark.parametrize("family, last", [("common_pair", "print(counts[counts == counts.max()].size)"), ("busiest_period", "print(counts[counts == counts.{f}()].size)")])
def test_the_most_common_is_one(family, last):
    for task in (make_task(i, "iid", (family,)) for i in range(8)):
        *lines, end = task.program.strip().split("\n")
        assert run_reference("\n".join([*lines, last.format(f="min" if "idxmin" in end else "max")]), task.files, task.preamble)[1] == "1\n", task.request

def test_an_hour_of_the_day_is_called_so():
    for split in ("train", "phrasing"):
        pairs = [sample_pair(random.Random(i), split, (f,)) for i in range(60) for f in ("per_period", "period_aggregate", "busiest_period", "period_share")]
        for request, _, _, program, *_ in pairs: assert bool(re.search("hours?.of.the.day", request, re.I)) == ("dt.hour" in program), request

@pytest.mark.parametrize("value, digits, right, wrong", [
    (0.346, 3, ("0.346", "0.34567", "0.3460"), ("0.35", "0.3", "34.6", "34.567", "0.3466", "0.347", "0.346 0.346")),
    (14.29, 2, ("14.29", "14.2857142", "14.286"), ("14.3", "14", "0.142857", "14.296", "14.28")),
    (2.5, 3, ("2.5", "2.50", "2.50049"), ("2.504", "3", "2")),
    (250_000.125, 3, ("250000.125",), ("250000.2", "250000"))])
def test_more_decimals_are_right_and_fewer_are_not(value, digits, right, wrong):
    for kind, v, write in (("number", value, "{}"), ("list", [value, 7.125], "[{}, 7.125]"), ("table", [["a b", value], ["c", 7.125]], "a b {}\nc 7.125")):
        for texts, expected in ((right, True), (wrong, False)):
            for text in texts: assert same_answer(dict(kind=kind, value=v, digits=digits), write.format(text)) is expected, (kind, value, text)

def test_a_list_has_an_order_where_one_is_asked_for():
    for ordered in (True, False):
        for value, other in (([1, 2, 2], "[2, 1, 2]"), (["x", "y z"], "['y z', 'x']")): assert same_answer(dict(kind="list", value=value, ordered=ordered), other) is not ordered
        for wrong in ("[1, 2]", "[1, 1, 2]", "[1, 2, 2, 2]", "[1, 2, 3]", "{1, 2}"): assert not same_answer(dict(kind="list", value=[1, 2, 2], ordered=ordered), wrong)
    for task in (make_task(i, "iid", ("list_values",)) for i in range(5)): assert task.answer["ordered"] == bool(re.search(r"\bsorted|in order", task.request, re.I)), task.request

def test_words_that_name_an_operation_survive_rewording():
    ways = {way: group for group in THESAURUS for way in group if "{" not in way}
    texts = {"median C0 per C1": ("median", "per"), "rolling mean of C0 over N0 rows": ("rolling", "mean", "over"), "number of unique C0 per hour of the day": ("unique", "per", "hour", "day"), "share in percent of rows": ("share", "percent"),
             "the N0 lowest C0, lowest first": ("lowest", "first"), "total C0 for each C1, except for V0": ("total", "for each", "except"), "line plot of C0 over C1, print saved F0": ("line", "plot", "over", "saved"),
             "standard deviation of C0 where C1 is above N0 and not V0": ("standard deviation", "above N0", "not"), "random walk of N0 steps, default_rng seed N1: final position": ("walk", "steps", "default_rng", "final")}
    for text, names in texts.items():
        for i in range(300):
            for said, groups in ((telegraphic(random.Random(i), text), {}), (vary(random.Random(i), text), ways)):
                for name in names:
                    if name.endswith("N0"): group = [w.replace("{n}", "N0") for g in THESAURUS if "above {n}" in g for w in g] if groups else [name]
                    else: group = groups.get(name, (name,))
                    assert any(set(w.split()) <= set(re.findall(r"[\w-]+", said)) for w in group), (text, said, name)

def test_no_way_of_saying_stands_in_two_groups_of_other_meaning():
    seen = {}
    for group in THESAURUS:
        for way in group: seen.setdefault(way, []).append(group)
    shared = {way for way, groups in seen.items() if len(groups) > 1}
    assert shared <= {"greatest"} and not {"total", "top", "over", "scatter", "min", "hour", "day", "range", "error", "cluster"} & shared
    assert not {"top", "over", "scatter", "min", "hour", "day", "daily", "range", "error", "cluster", "rank", "change"} & set(seen)
