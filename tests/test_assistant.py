"Questions about real-looking files, from the shell: right answers, pictures, what the programs agree on, and one line for what cannot be."
import gzip, os, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from slm_study.assistant import assistant
from slm_study.assistant.assistant import Assistant, Reply
from slm_study.assistant.cli import main, tell
from slm_study.assistant.reader import as_said, read_data
from slm_study.curation.log_formats import FORMATS, fill_log
from slm_study.curation.prompts import render
from slm_study.curation.slots import fill_slots, handover_of
from slm_study.recipes import StudyError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Files to ask about; GGUF files are written into it once."
    tmp = tmp_path_factory.mktemp("asked")
    for fmt in ("openssh", "java"): (tmp/f"{fmt}.log").write_text(fill_log(fmt, np.random.default_rng(2), 150))
    (tmp/"java.log.gz").write_bytes(gzip.compress((tmp/"java.log").read_bytes()))
    pd.DataFrame(dict(queue=["long", "short", "short"]*20, cores=range(60))).to_csv(tmp/"jobs.csv", index=False)
    return tmp

def ask(folder, *args):
    "As in a shell: a process that finds the package, in a folder of its own."
    path = os.pathsep.join([str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-c", "import sys; from slm_study.assistant.cli import main; sys.exit(main())", "ask", *args, "--runs", str(folder/"runs")],
                          cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})

def test_a_question_about_every_kind_of_file(folder):
    for name, n in (("openssh.log", 150), ("java.log.gz", 150)):
        done = ask(folder, "how many lines are there?", "--data", str(folder/name))
        assert (done.returncode, done.stdout) == (0, f"{n}\n"), done.stderr
    done = ask(folder, "mean cores per queue", "--data", str(folder/"jobs.csv"), "--show-code")
    assert done.returncode == 0 and "groupby('queue')['cores'].mean()" in done.stdout and "28.5" in done.stdout and "30.0" in done.stdout

def test_what_cannot_be_asked_is_one_line_and_exit_2(folder):
    for args, says in ((["how many?", "--data", str(folder/"none.log")], "none.log: cannot be read"), (["how many?", "--data", str(folder)], "cannot be read"),
                       (["  "], "REQUEST: is empty"), (["how many?", "--model", "gpt"], "model"), (["how many?", "--recipe", "pockets"], "pockets")):
        done = ask(folder, *args)
        assert done.returncode == 2 and done.stdout == "" and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr

@pytest.mark.parametrize("fmt", FORMATS)
def test_every_known_format_is_read_with_its_fields(fmt, tmp_path):
    (tmp_path/"a.log").write_text(fill_log(fmt, np.random.default_rng(5), 120))
    data = read_data(tmp_path/"a.log")
    assert data.format == fmt and len(data.columns) > len(FORMATS[fmt].fields)/2
    for f in FORMATS[fmt].fields.values():
        if f.pattern not in {c.pattern for c in data.columns}: continue
        for name in f.names: # whatever people call it, unless another field of this format is called so too
            if sum(name in g.names for g in FORMATS[fmt].fields.values()) == 1:
                assert name in [c.name for c in as_said(data, f"how many lines per {name}?") if c.pattern == f.pattern], (fmt, name)

@pytest.mark.parametrize("name,text", [("hosts.csv", "host,active\na,True\nb,False\nc,True\nd,\n"), ("hosts.jsonl", '{"host": "a", "active": true}\n{"host": "b", "active": false}\n{"host": "c", "active": true}\n')])
def test_true_and_false_are_no_texts(name, text, tmp_path, monkeypatch):
    "A program that asks for true rows as curated ones ask for any value must find them."
    monkeypatch.chdir(tmp_path); Path(name).write_text(text)
    columns = read_data(name).columns
    _, slots = render("how many rows where active is true?", handover_of(columns), columns)
    active = next(s for s, v in slots.items() if v == "active")
    read = "pd.read_csv(F0)" if name.endswith("csv") else "pd.read_json(F0, lines=True)"
    program = fill_slots(f"df = {read}\nn = len(df[df[{active}] == V0])", slots)
    there = dict(pd=pd)
    exec(program, there)
    assert there["n"] == 2, program

def reply(answer, votes=2, of=2, error="", unused=(), **files): return Reply(answer, files, votes, of, "print(1)", "a", not error, error, unused, .01, .01)

def test_a_picture_is_kept_under_a_name_that_was_free(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2): assert tell([reply("", 1, **{"x.png": b"\x89PNG"}), reply("2", 1)], False, True) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-2.png", "x.png"]
    out = capsys.readouterr()
    assert out.out == "" and "1 of 2 programs say so" in out.err and "1 of 2: 2" in out.err

def test_a_weaker_sandbox_is_named(monkeypatch, capsys):
    class Weaker:
        tuned, sandbox = True, SimpleNamespace(why=["A: bubblewrap is missing"], tier=SimpleNamespace(name="B"))
        def __init__(self, *args, **kw): pass
        def __enter__(self): return self
        def __exit__(self, *_): pass
        def ask(self, request, data): return [reply("7")]
    monkeypatch.setattr(assistant, "Assistant", Weaker)
    assert main(["ask", "how many?"]) == 0
    out, err = capsys.readouterr()
    assert out == "7\n" and "slm-study: the programs ran in sandbox tier B (A: bubblewrap is missing)\n" in err

def test_what_is_said_beside_an_answer(capsys):
    said = lambda *replies, show_code=False: (tell(list(replies), show_code, True), *capsys.readouterr())
    assert said(reply("7"), show_code=True) == (0, "print(1)\n\n7\n", "slm-study: all 2 programs that were written say so, which is less of a proof the more a question is in your own words; --show-code shows one\n")
    assert said(reply("7", 1, 1)) == (0, "7\n", "") # nothing to compare it with
    status, out, err = said(reply("7", 3, 5), reply("8 9", 1, 5), reply("", 1, 5, "ValueError: no"))
    assert (status, out) == (0, "7\n") and "3 of 5" in err and "1 of 5: 8 9" in err and "ValueError" not in err
    status, out, err = said(reply("7", unused=("3", "level")))
    assert (status, out) == (3, "7\n") and "no use of '3', 'level'" in err and "say so" not in err
    status, out, err = said(reply("", 1, 2, "ValueError: no"), reply("", 1, 2, "KeyError: 'a'"))
    assert (status, out) == (1, "") and "no program ran (ValueError: no; KeyError: 'a')" in err and len(err.splitlines()) == 1

def test_words_of_the_log_need_no_quotes(folder):
    "As people ask; the answers are counted here, by other means."
    text = (folder/"openssh.log").read_text()
    with Assistant(runs=str(folder/"runs")) as assistant:
        told = lambda request: assistant.ask(request, [read_data(folder/"openssh.log")])[0]
        assert told("how many failed password lines are there?").answer == str(sum("Failed password" in l for l in text.splitlines()))
        assert told("count the lines that mention accepted password").answer == str(sum("Accepted password" in l for l in text.splitlines()))

def test_no_program_names_a_slot_that_has_no_value(folder):
    with Assistant(runs=str(folder/"runs")) as assistant:
        for model in assistant.models:
            texts = lambda slots: [assistant.write(model, "df C0 category\ntop N0 C0\n<|program|>\n", slots, draw)[1] for draw in range(4)]
            assert all("N0" in t for t in texts({"C0": "queue", "N0": 3})) and not any("N0" in t for t in texts({"C0": "queue"}))

def test_a_log_without_years_is_asked_no_date(folder):
    with Assistant(runs=str(folder/"runs")) as assistant:
        with pytest.raises(StudyError, match="have no year"): assistant.ask("how many lines after 2024-03-05?", [read_data(folder/"openssh.log")])

def test_fields_of_a_file(folder):
    done = ask(folder, "--data", str(folder/"openssh.log"))
    assert done.returncode == 0 and all(f"\n  {name} " in done.stdout for name in ("time", "host", "user", "port")), done.stderr

@pytest.mark.parametrize("args, says", [(["--draws", "-1"], "draws: -1"), (["--draws", "x"], "--draws")])
def test_draws_that_cannot_be(folder, args, says):
    done = ask(folder, "how many lines are there?", "--data", str(folder/"openssh.log"), *args)
    assert done.returncode == 2 and says in done.stderr
