"""The sandbox under attack, under honest load, and when its driver dies. The long forms are in soak.py."""
import os, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from hostile import HOSTILE, run_all
from honest import SPECIAL, compare, references
from soak import kill_driver, soak

from slm_study.recipes import StudyError
from slm_study.evaluation.isolation import tiers
from slm_study.evaluation.jail import Job, Limits
from slm_study.evaluation.sandbox import Sandbox

QUICK = ("json", "numpy")
tier_a = pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")

@pytest.fixture(scope="module")
def box():
    with Sandbox(workers=2) as b: yield b

def test_the_suite_is_large_enough(): assert len(HOSTILE) >= 60

@tier_a
def test_hostile_programs_are_contained():
    with Sandbox(workers=1, calibrate=False) as b:
        assert b.tier.name == "A"
        assert run_all(b, limits=Limits(seconds=0.3, memory_mib=256)) == []

@tier_a
@pytest.mark.parametrize("layer", tiers()["A"].layers)
def test_self_test_notices_a_missing_layer(layer, box):
    quick = Sandbox(workers=1, preload=QUICK)
    quick.scratch = box.scratch
    try: assert quick.attack(tiers()["A"].without(layer))
    finally: [w.close() for w in quick.pool]

@tier_a
def test_files_and_bytes_end_somewhere(box):
    many = "n = 0\ntry:\n    while n < 5000: open(f'f{n}', 'w').close(); n += 1\nexcept OSError: pass\nprint(n)"
    room = "n = 0\ntry:\n    for i in range(64): open(f'g{i}', 'wb').write(b'x'*(1 << 20)); n += 1\nexcept OSError: pass\nprint(n)"
    assert 100 < int(box.run(many).stdout) < 4096 and 4 < int(box.run(room).stdout) <= 17

def test_honest_programs_get_the_verdict_of_a_fresh_interpreter(box, tmp_path):
    differ, refused = compare(SPECIAL[1::7] + references(3), box, tmp_path)
    assert differ == [] and (refused == 0 or box.tier.name != "A")

def test_references_all_run(box):
    jobs = references(60)
    assert [o.verdict for o in box.run_many(jobs, progress=False)] == ["ok"]*len(jobs)

def test_order_is_kept(box):
    jobs = [f"import time; time.sleep({(i*7 % 5)/50}); print({i})" for i in range(24)]
    assert [int(o.stdout) for o in box.run_many(jobs, progress=False)] == list(range(24))

@pytest.mark.parametrize("program,verdict", [("x"*10_000_000, "sandbox_limit"), ("a\0b", "exception"), (b"x = '\xff\xfe'", "exception"), ("x = '\ud800'", "exception"), ("["*50_000, "exception"),
    ("-"*200_000 + "1", "exception"), ("", "ok"), ("\ufeffprint(1)", "ok"), ("import sys\nfor i in range(10**9): sys.stdout.write('x'*10**6)", "output_limit"), ("open('missing.csv')", "exception"),
    ("import os; os.kill(os.getpid(), 15)", "signal"), ("import sys; sys.exit(300)", "exception"), ("raise KeyboardInterrupt", "signal"), ("import os; os._exit(0)", "ok")])
def test_bad_input_gets_a_verdict(box, program, verdict):
    out = box.run(program, limits=Limits(seconds=5))
    assert out.verdict == verdict, out
    assert box.run("print(3)").stdout == "3\n"

@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", ""])
def test_file_names_stay_inside(box, name):
    assert box.run("print(1)", files={name: "x"}).verdict == "sandbox_limit"

def test_files_below_folders(box):
    out = box.run("import os; os.makedirs('out'); print(open('a/b.txt').read()); open('out/c.bin', 'wb').write(b'\\0\\1')", files={"a/b.txt": "hello"})
    assert (out.stdout, out.files) == ("hello\n", {"out/c.bin": b"\0\1"})

def test_random_numbers_differ_between_programs(box):
    outs = {box.run("import random, numpy as np; print(random.random(), np.random.rand())").stdout for _ in range(3)}
    assert len(outs) == 3

def test_no_isolation_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    import slm_study.evaluation.sandbox as module
    monkeypatch.setattr(module, "failures", lambda *a: ["network"])
    with pytest.raises(StudyError, match="bubblewrap is missing.*install bubblewrap") as e: Sandbox(workers=1, preload=QUICK).__enter__()
    assert "\n" not in str(e.value)

def test_unsafe_is_stamped():
    with Sandbox(workers=1, preload=QUICK, unsafe=True, calibrate=False) as b: out = b.run("print(1)")
    assert (out.verdict, out.tier, out.layers) == ("ok", "unsafe", ("limits", "watch"))

def test_a_killed_worker_is_no_verdict_about_the_program(box):
    import threading
    victim = box.pool[0]
    threading.Timer(0.3, victim.kill).start()
    outs = box.run_many(["import time; time.sleep(0.6); print(1)"]*4, progress=False)
    assert [o.stdout for o in outs] == ["1\n"]*4

def test_interrupt_leaves_nothing():
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); sys.path.insert(0, {!r})\nfrom slm_study.evaluation.sandbox import Sandbox\nwith Sandbox(workers=2, preload=('json',), calibrate=False) as b:\n    print(*[p for w in b.pool for p in w.wait_ready().pids], b.scratch, flush=True)\n    b.run_many(['while True: pass']*8, progress=False)"
    p = subprocess.Popen([sys.executable, "-c", code.format(str(Path(__file__).parents[1]))], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    *pids, scratch = p.stdout.readline().split()
    assert len(pids) >= 4
    time.sleep(0.3); p.send_signal(signal.SIGINT); p.wait(10); time.sleep(0.3)
    assert not [x for x in pids if os.path.exists(f"/proc/{x}")] and not os.path.exists(scratch)

def test_killed_driver_loses_and_doubles_nothing(tmp_path):
    report = kill_driver(tmp_path, programs=120, kills=2, seed=1)
    assert report["recorded"] == report["planned"] == 120 and report["wrong"] == 0 and report["left"] == 0 and report["kills"] >= 1, report

def test_short_soak():
    report = soak(programs=200, share=0.03, seed=1)
    assert report["wrong"] == 0 and not report["touched"] and report["hostile"] >= 3 and report["descriptors_grown"] == 0 and report["processes_left"] == 0 and report["mounts_grown"] == 0, report

def test_full_disk_is_one_line(tmp_path):
    db = tmp_path/"o.db"
    with Sandbox(workers=1, preload=QUICK, calibrate=False, store=db) as b:
        b.store.db.execute("PRAGMA max_page_count = 6")
        with pytest.raises(StudyError, match="o.db: cannot be used") as e: b.run_many([Job(f"print('{i}'*60_000)", key=str(i)) for i in range(9)], progress=False)
        assert "\n" not in str(e.value) and "free space" in str(e.value)
