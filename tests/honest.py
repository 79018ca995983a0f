"""Honest programs, and what a fresh interpreter makes of them."""
import os, subprocess, sys, tempfile
from pathlib import Path

from slm_study.curation.tasks import generate_tasks
from slm_study.evaluation.jail import Job
from slm_study.evaluation.isolation import environment

_PLOT = "import numpy as np, matplotlib.pyplot as plt\nrng = np.random.default_rng({i})\nfig, ax = plt.subplots()\nax.{kind}\nplt.savefig('f.png')\nimport os; print(os.path.getsize('f.png') > 1000)"
_KINDS = ("plot(rng.normal(size=50))", "hist(rng.normal(size=200))", "bar(range(5), rng.random(5))", "scatter(rng.random(30), rng.random(30))", "imshow(rng.random((8, 8)))", "boxplot(rng.normal(size=(20, 3)))")

SPECIAL = [Job(p) for p in [
    *[_PLOT.format(i=i, kind=k) for i, k in enumerate(_KINDS*4)],
    "from multiprocessing import Pool\ndef f(x): return x*x\nif __name__ == '__main__':\n    with Pool(2) as p: print(p.map(f, range(10)))",
    "from multiprocessing import Process, Queue\ndef f(q): q.put(3)\nif __name__ == '__main__':\n    q = Queue(); p = Process(target=f, args=(q,)); p.start(); print(q.get()); p.join()",
    "import multiprocessing as m\ndef f(x): return x + 1\nif __name__ == '__main__':\n    with m.get_context('spawn').Pool(1) as p: print(p.map(f, [1, 2]))",
    "from concurrent.futures import ProcessPoolExecutor\ndef f(x): return -x\nif __name__ == '__main__':\n    with ProcessPoolExecutor(2) as e: print(list(e.map(f, range(4))))",
    "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as e: print(sum(e.map(lambda x: x*x, range(100))))",
    "import threading\nr = []\nt = threading.Thread(target=lambda: r.append(1)); t.start(); t.join(); print(r)",
    "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()\nprint('main ends')",
    "import asyncio\nasync def f(): await asyncio.sleep(0.01); return 5\nprint(asyncio.run(f()))",
    "import subprocess\nprint(subprocess.run(['echo', 'hi'], capture_output=True, text=True).stdout)",
    "import subprocess, sys\nprint(subprocess.run([sys.executable, '-c', 'print(6*7)'], capture_output=True, text=True).stdout)",
    "import tempfile, os\nwith tempfile.TemporaryDirectory() as d:\n    open(os.path.join(d, 'a'), 'w').write('x'); print(os.listdir(d))",
    "import tempfile\nwith tempfile.NamedTemporaryFile('w+') as f: f.write('abc'); f.seek(0); print(f.read())",
    "if __name__ == '__main__': print('main')", "def main(): print('in main')\nif __name__ == '__main__': main()",
    "input()", "try: input('?')\nexcept EOFError: print('no input')", "import sys\nprint(sys.stdin.read() == '')", "import sys\nprint(len(sys.argv))",
    "import atexit\natexit.register(print, 'bye')\nprint('hello')", "import sys\nsys.exit(0)", "import sys\nsys.exit('message')", "raise SystemExit(4)", "exit()", "quit(2)", "import os\nos._exit(3)",
    "1/0", "assert 1 == 2", "print(undefined)", "import nothing_of_that_name", "def f(: pass", "x = [1, 2\nprint(x)", "raise KeyboardInterrupt", "class E(Exception): pass\nraise E('own')",
    "import signal, os\nsignal.signal(signal.SIGALRM, lambda *a: print('alarm'))\nsignal.setitimer(signal.ITIMER_REAL, 0.05)\nsignal.pause()", "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)", "import os\nos.abort()",
    "import sqlite3\nc = sqlite3.connect('a.db'); c.execute('create table t (x)'); c.execute('insert into t values (4)'); print(c.execute('select * from t').fetchall())",
    "import json, csv, io, re, math, random, statistics, datetime, collections, itertools, functools, decimal, fractions, hashlib, zlib, gzip, bz2, lzma, zipfile, tarfile, pickle, uuid, urllib.parse, xml.etree.ElementTree\nprint(math.pi)",
    "import zipfile\nwith zipfile.ZipFile('a.zip', 'w') as z: z.writestr('x', 'y')\nprint(zipfile.ZipFile('a.zip').namelist())",
    "import gzip\nopen('x.gz', 'wb').write(gzip.compress(b'abc'))\nprint(gzip.open('x.gz').read())",
    "import pandas as pd\nd = pd.DataFrame({'t': pd.date_range('2024-01-01', periods=48, freq='h'), 'v': range(48)})\nprint(d.set_index('t').resample('D').v.sum())",
    "import pandas as pd\nd = pd.DataFrame({'a': ['x', 'y', 'x'], 'b': [1, 2, 3]})\nd.to_csv('o.csv', index=False); print(pd.read_csv('o.csv').groupby('a').b.sum()); print(d.pivot_table(index='a', values='b'))",
    "import pandas as pd\npd.DataFrame({'a': [1, 2]}).to_parquet('a.parquet'); print(pd.read_parquet('a.parquet'))", "import pandas as pd\npd.DataFrame({'a': [1]}).to_json('a.json'); print(open('a.json').read())",
    "import numpy as np\na = np.random.default_rng(0).normal(size=(200, 200)); print(round(float(np.linalg.norm(np.linalg.inv(a) @ a - np.eye(200))), 6))", "import numpy as np\nnp.save('a.npy', np.arange(4)); print(np.load('a.npy'))",
    "import numpy as np\nnp.memmap('m', dtype='f4', mode='w+', shape=(10,))[:] = 1; print('ok')", "import warnings\nwarnings.warn('careful')\nprint(1)", "import logging\nlogging.warning('w')\nprint(2)",
    "from sklearn.cluster import KMeans\nimport numpy as np\nprint(KMeans(2, n_init=1, random_state=0).fit(np.array([[0.], [1.], [10.], [11.]])).n_clusters)",
    "from scipy import stats\nprint(round(stats.norm.cdf(1.96), 3))", "import seaborn as sns, pandas as pd\nsns.barplot(pd.DataFrame({'a': [1, 2], 'b': [3, 4]}), x='a', y='b').figure.savefig('b.png'); print(1)",
    "import inspect\ndef f(): return 1\nprint(inspect.getsource(f))", "import os\nprint(os.path.basename(__file__))", "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))).__module__)",
    "from dataclasses import dataclass\n@dataclass\nclass P: x: int\nprint(P(3))", "from __future__ import annotations\ndef f(x: Unknown): return 1\nprint(f(1))", "import sys\nsys.setrecursionlimit(3000)\ndef f(n): return n and f(n - 1)\nprint(f(2500))",
    "def f(): return f()\ntry: f()\nexcept RecursionError: print('deep')", "print('ü → 語 🎉')", "import sys\nprint(sys.stdout.encoding)", "import locale, time\nprint(time.strftime('%Y') > '2000')",
    "import os\nprint(sorted(k for k in os.environ if k == 'HOME'))", "import socket\na, b = socket.socketpair(); a.send(b'x'); print(b.recv(1))",
    "import threading, http.server, urllib.request\ns = http.server.HTTPServer(('127.0.0.1', 0), http.server.SimpleHTTPRequestHandler)\nthreading.Thread(target=s.serve_forever, daemon=True).start()\nprint(urllib.request.urlopen(f'http://127.0.0.1:{s.server_port}/').status)",
    "import ctypes\nprint(ctypes.sizeof(ctypes.c_long))", "import os\nr, w = os.pipe()\nif os.fork() == 0: os.write(w, b'c'); os._exit(0)\nos.wait(); print(os.read(r, 1))", "import os\nprint(os.cpu_count() > 0)", "import mmap\nm = mmap.mmap(-1, 4096); m[:3] = b'abc'; print(m[:3])",
    "import fcntl\nf = open('lock', 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('locked')", "import os\nos.mkdir('d'); os.symlink('d', 'e'); os.rename('d', 'f'); print(sorted(os.listdir('.'))[:3])", "import shutil\nprint(shutil.disk_usage('.').total > 0)",
    "import resource\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0)", "import platform\nprint(platform.system())", "import getpass\ntry: getpass.getuser()\nexcept Exception: pass\nprint(1)", "import matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show(); print('shown')",
    "import time\nt = time.perf_counter(); time.sleep(0.05); print(time.perf_counter() - t >= 0.05)", "import uuid, secrets\nprint(len(str(uuid.uuid4())), len(secrets.token_hex(4)))", "import sys\nsys.stderr.write('only a warning\\n')", "import builtins\nprint(callable(builtins.open))",
]]


def references(n, seed=5):
    """The tasks' own programs."""
    return [Job(t.program, t.files, preamble=t.preamble) for t in generate_tasks(n, seed, "iid")]


def fresh(job, folder):
    """Exit status and output of `job` in a fresh interpreter; the preamble goes first, as in the sandbox."""
    with tempfile.TemporaryDirectory(dir=folder) as d:
        for name, data in job.files.items(): Path(d, name).write_text(data)
        Path(d, "program.py").write_bytes(job.program if isinstance(job.program, bytes) else job.program.encode("utf8", "surrogatepass"))
        start = ["program.py"]
        if job.preamble: Path(d, "_start.py").write_text(f"exec({job.preamble!r}); exec(compile(open('program.py').read(), 'program.py', 'exec'))"); start = ["_start.py"]
        env = environment(str(Path(folder)/"mpl")) | {"HOME": d, "TMPDIR": str(folder), "PATH": os.environ["PATH"]}
        p = subprocess.run([sys.executable, *start], cwd=d, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
        return p.returncode, p.stdout.decode("utf8", "replace")


def compare(jobs, box, folder, show=False):
    """Run `jobs` here and there; (job, outcome, exit status, stdout) where they differ and the sandbox does not say that it is the reason."""
    from tqdm import tqdm
    outs, differ = box.run_many(jobs, progress=show), []
    for job, out in zip(jobs, tqdm(outs, desc="fresh interpreters", disable=not show)):
        code, stdout = fresh(job, folder)
        same = out.exit_status == code and out.stdout == stdout
        if not same and out.verdict != "sandbox_limit": differ.append((job, out, code, stdout))
    return differ, sum(o.verdict == "sandbox_limit" for o in outs)


if __name__ == "__main__":
    from slm_study.evaluation.sandbox import Sandbox
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    jobs = SPECIAL + references(n)
    with tempfile.TemporaryDirectory() as d, Sandbox() as box: differ, limited = compare(jobs, box, d, show=True)
    print(f"{len(jobs)} honest programs: {len(differ)} differ from a fresh interpreter, {limited} labelled sandbox_limit")
    for job, out, code, stdout in differ: print(repr(job.program[:150]), "|", out.verdict, out.exit_status, repr(out.stdout[:100]), repr(out.stderr[-150:]), "| fresh:", code, repr(stdout[:100]))
    sys.exit(bool(differ))
