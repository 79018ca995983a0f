"""Long runs: many programs, some hostile; and a driver that is killed again and again. `python tests/soak.py` runs both in full."""
import itertools, json, os, random, sqlite3, subprocess, sys, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from hostile import HOSTILE

from slm_study.evaluation.jail import Job, Limits
from slm_study.evaluation.sandbox import Sandbox
from slm_study.evaluation.jail import bait
from slm_study.evaluation import worker

# hostile programs that end by a limit take a second each; in the long run they are all there, each in its turn
_HONEST = ("print({i}*7)", "import pandas as pd\nprint(pd.Series([{i}, 1]).sum() - 1 + {i}*6)", "import numpy as np\nprint(int(np.arange({i} + 1).size - 1)*7)", "open('x', 'w').write(str({i}*7)); print(open('x').read())",
           "import sys\nsys.exit({i} % 5 + 1)", "1/0", "import os\nprint({i}*7 if os.listdir('.') == ['program.py'] else os.listdir('.'))")
_WANT = ("ok", "ok", "ok", "ok", "exception", "exception", "ok")


def _mounts():
    with open("/proc/self/mounts") as f: return len(f.readlines())


def _memory(pids):
    total = 0
    for p in pids:
        try:
            with open(f"/proc/{p}/status") as f: total += sum(int(l.split()[1]) for l in f if l.startswith("RssAnon"))
        except OSError: pass
    return total/1024


def soak(programs, share, seed, workers=2, show=False):
    """Run `programs`, a `share` of them hostile; what went wrong and what grew."""
    rng, jobs, want = random.Random(seed), [], []
    with Sandbox(workers=workers, limits=Limits(seconds=5, memory_mib=512)) as box, bait(box.scratch) as (told, secret, touched):
        for i in range(programs):
            if rng.random() < share:
                program = rng.choice(HOSTILE)[1]
                for k, v in told.items(): program = program.replace(f"${k}", repr(v))
                jobs.append(Job(program, limits=Limits(seconds=0.5, memory_mib=256))); want.append(None)
            else:
                kind = rng.randrange(len(_HONEST))
                jobs.append(Job(_HONEST[kind].replace("{i}", str(i)))); want.append((_WANT[kind], f"{i*7}\n" if _WANT[kind] == "ok" else ""))
        box.run_many(jobs[:20], progress=False)
        count = lambda: (len(os.listdir("/proc/self/fd")), _mounts())
        before, memory, wrong, start = count(), [], [], time.time()
        for at in range(0, programs, 500):
            outs = box.run_many(jobs[at:at + 500], progress=show)
            wrong += [(at + i, o) for i, (o, w) in enumerate(zip(outs, want[at:at + 500])) if w and (o.verdict, o.stdout) != w or o.verdict == "infrastructure_error" or (not w and ("OPEN" in o.stdout or secret in o.stdout))]
            memory.append(_memory([p for w in box.pool for p in w.wait_ready().pids] + [os.getpid()]))
        after = count()
        left = [p for w in box.pool for p in worker.tree(w.process.pid) if p not in w.pids]
        report = dict(programs=programs, hostile=want.count(None), wrong=len(wrong), touched=touched(), descriptors_grown=after[0] - before[0], mounts_grown=after[1] - before[1], processes_left=len(left),
                      memory_mib_first=round(memory[0]), memory_mib_last=round(memory[-1]), memory_mib_max=round(max(memory)), seconds=round(time.time() - start), tier=box.tier.name, examples=[str(w)[:400] for w in wrong[:5]])
    return report


def _alive(pid):
    """Is the process there, and not only waiting for init to take note of its end?"""
    try:
        with open(f"/proc/{pid}/stat") as f: return f.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError: return False


_DRIVER = """
import json, sys; sys.path.insert(0, {root!r})
from slm_study.evaluation.sandbox import Sandbox, Job
with Sandbox(workers=2, preload=("json",), calibrate=False, store={db!r}) as box:
    print(*[p for w in box.pool for p in w.wait_ready().pids], flush=True)
    box.run_many([Job(f"import time; time.sleep({{i % 7}}/200); print({{i}})", key=str(i)) for i in range({n})], progress=False)
"""


def kill_driver(folder, programs, kills, seed):
    """kill -9 the driver at random moments until `kills` are done, then let it finish; what is on disk and what is left running."""
    rng, db, left, done = random.Random(seed), Path(folder)/"outcomes.db", 0, 0
    code = _DRIVER.format(root=str(Path(__file__).parents[1]), db=str(db), n=programs)
    for attempt in range(kills + 1):
        p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        if attempt < kills:
            early = rng.random() < 0.3
            if early: time.sleep(rng.uniform(0.3, 1.5)); pids = []
            else: pids = p.stdout.readline().split(); time.sleep(rng.uniform(0, 0.5))
            children = pids or [str(x) for x in worker.tree(p.pid)]
            done += p.poll() is None
            p.kill()
        else: children = p.stdout.readline().split()
        p.wait()
        p.stdout.close()
        time.sleep(1)
        left += sum(map(_alive, children))
    rows = sqlite3.connect(db).execute("SELECT key, outcome FROM outcome").fetchall()
    return dict(planned=programs, recorded=len(rows), distinct=len({k for k, _ in rows}), wrong=sum(json.loads(o)["stdout"] != f"{k}\n" for k, o in rows), kills=done, left=left)


if __name__ == "__main__":
    import tempfile
    n, kills = (int(given or usual) for given, usual in itertools.zip_longest(sys.argv[1:3], (10_000, 50)))
    first = soak(n, 0.02, seed=0, show=True)
    print("soak", json.dumps(first, indent=1), flush=True)
    with tempfile.TemporaryDirectory() as d: second = kill_driver(d, 40*kills, kills, seed=0) # enough programs to outlast the kills
    print("killed drivers", json.dumps(second, indent=1))
    flat = first["descriptors_grown"] == first["mounts_grown"] == first["processes_left"] == first["wrong"] == first["touched"] == 0 and first["memory_mib_last"] < 1.5*first["memory_mib_first"] + 50
    sys.exit(not (flat and second["kills"] == kills and second["recorded"] == second["distinct"] == second["planned"] and second["wrong"] == second["left"] == 0))
