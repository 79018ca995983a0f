"Questions about real-looking files, from the shell: right answers, pictures, agreement, and one line for what cannot be."
import gzip, os, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from slm_study.assistant.assistant import Reply, agree
from slm_study.assistant.cli import main, tell
from slm_study.assistant.reader import as_said, read_data
from slm_study.curation.log_formats import FORMATS, fill_log
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

def test_a_picture_is_kept_under_a_name_that_was_free(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reply = lambda model, answer, ran=True, **files: Reply(model, "print(1)", ran, answer, "" if ran else "ValueError: no", files, .01, .01)
    for _ in range(2): assert tell([reply("a", "", **{"x.png": b"\x89PNG"}), reply("b", "2")], False, True) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-2.png", "x.png"]
    out = capsys.readouterr()
    assert out.out == "" and "b says otherwise" in out.err
    assert tell([reply("a", "7"), reply("b", "7 ")], True, True) == 0 and agree([reply("a", "7"), reply("b", "7 ")])
    out = capsys.readouterr()
    assert out.out == "print(1)\n\n7\n" and out.err == "slm-study: a and b agree\n"
    assert tell([reply("a", "", False), reply("b", "", False)], False, True) == 1
    out = capsys.readouterr()
    assert out.out == "" and "no program ran" in out.err and out.err.count("ValueError") == 2
    assert not agree([reply("a", "7")]) and not agree([reply("a", "7"), reply("b", "7", False)])
