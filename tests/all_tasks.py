"""Ten thousand tasks of all families and splits: every reference is run once more in another process. `python tests/all_tasks.py [tasks] [workers]`."""
import concurrent.futures, itertools, json, multiprocessing, os, sys, time
from collections import Counter

from slm_study.curation.tasks import FAMILIES, LOG_FAMILIES, SPLITS, TABLE_FAMILIES, generate_tasks, run_reference, same_answer


def again(task):
    """Run a reference anew; what went wrong, or None."""
    try: text = run_reference(task.program, task.files, task.preamble)[1]
    except Exception as e: return f"{type(e).__name__}: {e}"
    return None if same_answer(task.answer, text) else f"printed {text!r}, wanted {task.answer}"


def all_tasks(n, workers, seed=0):
    """Make `n` tasks, run each again in a process that did not make it; counts, failures and a table of families."""
    start, made, wrong = time.time(), [], []
    for i, split in enumerate(SPLITS): made += generate_tasks(n//len(SPLITS) + (i < n % len(SPLITS)), seed + i, split, workers=workers)
    seconds = time.time() - start
    os.environ.update(PYTHONHASHSEED="4242", OMP_NUM_THREADS="2") # of the processes that are started now
    with concurrent.futures.ProcessPoolExecutor(max(1, workers), multiprocessing.get_context("spawn")) as pool:
        for task, reason in zip(made, pool.map(again, made, chunksize=32)):
            if reason: wrong.append((task.task_id, task.family, reason[:300]))
    rows = []
    for name in FAMILIES:
        ts = [t for t in made if t.family == name]
        kind = "log" if name in LOG_FAMILIES else "table" if name in TABLE_FAMILIES else "science"
        rows.append((name, kind, FAMILIES[name].difficulty, len(ts), *(len(set(x)) for x in ([t.request for t in ts], [t.program for t in ts], [json.dumps(t.answer) for t in ts]))))
    return dict(tasks=len(made), families=len({t.family for t in made}), splits=dict(Counter(t.split for t in made)), failures=len(wrong), seconds_made=round(seconds), seconds_in_all=round(time.time() - start), examples=wrong[:5]), rows


if __name__ == "__main__":
    n, workers = (int(given or usual) for given, usual in itertools.zip_longest(sys.argv[1:3], (10_000, 2)))
    report, rows = all_tasks(n, workers)
    print(f"{'family':22}{'kind':9}{'difficulty':>10}{'tasks':>7}{'requests':>10}{'programs':>10}{'answers':>9}")
    for r in rows: print(f"{r[0]:22}{r[1]:9}{r[2]:10}{r[3]:7}{r[4]:10}{r[5]:10}{r[6]:9}")
    print(json.dumps(report, indent=1))
    # every family that was drawn is drawn again and again: requests, programs and answers all vary
    same = [r[0] for r in rows if r[3] >= 20 and (min(r[4:6]) < r[3] / 4 or r[6] < 4)]
    print("families that hardly vary:", same)
    sys.exit(bool(report["failures"] or same or report["families"] < len(FAMILIES)))
