"Curation where it does not teach: other processes, hostile text, the splits in bulk."
import json, os, random, subprocess, sys

import pytest

from slm_study.curation.corpus import make_pair
from slm_study.curation.questions import AGGREGATES
from slm_study.curation.slots import SLOT_COUNTS, SLOT_TOKENS, Column, fill_slots, program_to_slots, to_slots
from slm_study.curation.sources import SOURCES, load_source
from slm_study.curation.tasks import FAMILIES, generate_tasks, make_task, sample_pair, same_answer
from slm_study.curation.worlds import WORLDS, all_names
from slm_study.recipes import StudyError

HARD = ["'", '"', "\\", "\n", "\t", "{", "}", "[", "]", "(", ")", "#", "π", "日本", "C0", "V1", "N2", "F0", "class", "None", " ", "a", "b", "0", "5", "-", ".", ",", "+", "*", "?", "^", "$", "%", "`", "“", "”", "\x00", "\ud7ff", "😀"]

def run_python(code:str, **env)-> str:
    "stdout of a fresh interpreter"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout

def test_same_seed_same_tasks_in_another_process():
    code = ("import hashlib, json, random\nfrom slm_study.curation.tasks import generate_tasks\nfrom slm_study.curation.corpus import make_pair\n"
            "tasks = [t.to_dict() for t in generate_tasks(12, 3, 'schema')]\nrng = random.Random('x')\npairs = [make_pair(rng) for _ in range(300)]\n"
            "print(hashlib.sha256(json.dumps([tasks, pairs], sort_keys=True).encode()).hexdigest())")
    assert run_python(code, PYTHONHASHSEED="1") == run_python(code, PYTHONHASHSEED="77")

def test_references_answer_in_a_fresh_interpreter(tmp_path):
    for task in generate_tasks(8, 11, "iid", ("bursts", "plot", "log_top", "failed_logins", "group_share", "describe", "largest_rows", "pendulum")):
        for name, text in task.files.items(): (tmp_path/name).write_text(text, encoding="utf-8")
        out = subprocess.run([sys.executable, "-c", task.preamble + task.program], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "MPLBACKEND": "agg"}, timeout=120)
        assert same_answer(task.answer, out.stdout), (task.request, out.stdout, out.stderr[-500:])

@pytest.mark.parametrize("family", FAMILIES)
def test_family_varies(family):
    rng = random.Random(5)
    pairs = [sample_pair(rng, "train", (family,)) for _ in range(150)]
    assert len({p[0] for p in pairs}) > 30
    assert len({p[3] for p in pairs}) >= 3
    assert all(20 < len(p[3]) < 600 for p in pairs)
    assert len({json.dumps(make_task(i, "iid", (family,)).answer) for i in range(8)}) >= 3

def test_schema_split_shares_no_name_with_training():
    rng, known = random.Random(2), all_names("train")
    for _ in range(500):
        columns = [c for c in sample_pair(rng, "schema")[2] if c.kind != "file"]
        assert not {c.name.casefold().replace(" ", "_") for c in columns} & known

def test_pairs_are_linked_and_round_trip():
    rng, left = random.Random(9), 0
    for split in ("train", "schema"):
        for _ in range(1500):
            request, _, columns, program, _ = sample_pair(rng, split)
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
