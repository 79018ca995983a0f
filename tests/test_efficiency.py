"Each variant is timed in turns with base, in its own process; what a planted variant does wrong is found and named."
import json, os, subprocess, sys, textwrap, time
from contextlib import ExitStack
import pytest, torch
from transformers import AutoModelForCausalLM

from slm_study.recipes import Run, Size, StudyError
from slm_study.records import METRICS, OPTIONAL, Metric, tidy, write_record
from slm_study.models import blocks, config_for, lm_head, load_checkpoint, save_checkpoint
from slm_study.compression.early_exit import ExitHeads, save_exits
from slm_study.finetuning.pretrain import train_tokenizer
from slm_study.evaluation.arms import Arm, TorchArm, work
from slm_study.evaluation.budget import LIMITS, Watch, held, prove
from slm_study.evaluation.efficiency import base_again, encode, in_turns, measure, summarise
from slm_study.report.comparisons import budget_note, collect_outcomes, remarks, table_budget
from slm_study.runtime.gguf import export

PROMPTS = [f"print(df['amount'].mean() + {'1'*i})" for i in range(1, 5)]
SETTINGS = dict(max_new_tokens=20, fixed_tokens=12, repeats=9, threads=1, batch=2)

def tokenizer(): return train_tokenizer(["import pandas as pd\nprint(df['amount'].mean() + 123)\n"]*50, 400)

def save(folder, model="tinyllama", layers=2, hidden=64):
    torch.manual_seed(0)
    tok = tokenizer()
    net = AutoModelForCausalLM.from_config(config_for(model, Size(hidden=hidden, layers=layers, ffn=2*hidden, positions=128), len(tok)))
    save_checkpoint(net, tok, folder)
    return folder

@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

@pytest.fixture(scope="module")
def base(tmp_path_factory): return save(tmp_path_factory.mktemp("models")/"base", layers=4, hidden=128)

# A clock that ticks with the work, so that no verdict here depends on the machine: 0.3 ms for each block, give or take 2 %, and whatever sleeps.
CLOCK = """
import random, time
class Clock:
    now, chance = 0., random.Random(0)
    def tick(self, seconds): self.now += seconds
clock = Clock()
time.perf_counter, time.sleep = (lambda: clock.now), clock.tick
def plant(model): pass
def prepare(model):
    for block in model.model.layers:
        down = block.mlp.down_proj
        down.forward = lambda x, real=down.forward: (clock.tick(.0003*clock.chance.uniform(.98, 1.02)), real(x))[1]
    plant(model)
"""

# each fake is a whole variant: base's checkpoint, and code that runs on the loaded model
FAKES = dict(
    sleeps="""
        def plant(model):
            down = model.model.layers[0].mlp.down_proj
            real = down.forward
            down.forward = lambda x: (time.sleep(.003), real(x))[1]""",
    stops_early="""
        def plant(model):
            real = model.lm_head.forward
            def forward(x):
                z = real(x); z[..., 0] = z.max() + 1
                return z
            model.lm_head.forward = forward""",
    keeps_a_second_model="""
        import copy
        KEPT = []
        def plant(model):
            for _ in range(24): KEPT.append(copy.deepcopy(model)) # small models: as many as make 30 MiB""")

@pytest.fixture(scope="module")
def measured(base, tmp_path_factory):
    "Base, base again and the fakes, all in turns: name -> (metrics, raw)."
    folder, ids = tmp_path_factory.mktemp("fakes"), encode(base, PROMPTS)[0]
    common = dict(backend="torch", path=str(base), prompts=ids, eos=0, **{k: v for k, v in SETTINGS.items() if k != "repeats"})
    for name, code in dict(base="", twin="", **FAKES).items(): (folder/f"{name}.py").write_text(CLOCK + textwrap.dedent(code))
    with ExitStack() as stack:
        arms = {n: stack.enter_context(Arm(dict(common, prepare=str(folder/f"{n}.py")))) for n in ("base", "twin", *FAKES)}
        sizes = {n: a.ready() for n, a in arms.items()}
        fixed, out = in_turns(arms, "fixed", SETTINGS["repeats"]), {}
        for n in ("base", *FAKES):
            mine = dict(variant=fixed[n], twin=fixed["twin"], **({"base": fixed["base"]} if n in FAKES else {}))
            free = [dict(success=False, **arms[n].work("free", i)) for i in range(len(PROMPTS))]
            raw = dict(backend="torch", early_exit=False, sizes=sizes[n], fixed=mine, memory=arms[n].work("memory"), free=free, batch=[arms[n].work("batch", i) for i in range(2)])
            out[n] = {m.metric: m for m in summarise(raw)}, raw
    return out

@pytest.fixture(scope="module")
def named(measured):
    "The report's words for each fake, from records alone."
    row = lambda t, m: dict(recipe="fakes", model="tinyllama", technique=t, seed=0, metric=m.metric, value=m.value, low=m.low, high=m.high, n=m.n, unit=METRICS[m.metric].unit, backend=m.backend)
    words = lambda n: remarks(tidy([row(t, m) for t, k in (("base", "base"), ("pruning", n)) for m in measured[k][0].values()])).remark.iloc[0]
    return {n: (measured[n][0], words(n)) for n in FAKES}

def test_a_sleep_in_the_forward_is_named(named):
    metrics, said = named["sleeps"]
    assert metrics["time_ratio"].low > 1.3 and said.startswith("slower per token") and "fewer tokens" not in said and "memory" not in said

def test_stopping_early_is_named_and_is_not_faster(named, measured):
    metrics, said = named["stops_early"]
    whole = measured["base"][0]
    assert metrics["new_tokens"].value == 1 < whole["new_tokens"].value and metrics["latency_ms"].value < whole["latency_ms"].value/2 # a sample looks much faster
    assert "fewer tokens" in said and "not faster per token" in said and not said.startswith("faster")

def test_a_second_model_kept_alive_is_named(named):
    metrics, said = named["keeps_a_second_model"]
    assert "memory above its weights" in said and "slower" not in said and "fewer" not in said

def test_base_against_base_is_not_named(measured):
    "A/A: the second base process does what the first does."
    metrics, raw = measured["base"]
    assert .98 < metrics["aa_ratio"].value < 1.02 and len(raw["fixed"]["twin"]) == SETTINGS["repeats"] and "time_ratio" not in metrics

@pytest.mark.parametrize("model", ["tinyllama", "starcoder"])
def test_both_architectures_on_llama_cpp(tmp_path, model):
    folder = save(tmp_path/model, model)
    files = tuple(export(folder, tmp_path/f"{t}.gguf", t) for t in ("q4_0", "f16"))
    metrics, raw = measure(folder, PROMPTS, base=folder, gguf=files, backend="llama.cpp", **SETTINGS)
    got = {m.metric: m for m in metrics}
    assert {"parameters", "disk_mib", "latency_ms", "ms_per_token", "time_ratio", "aa_ratio", "ms_per_token_batch8", "prefill_ms", "new_tokens", "throughput_samples_s", "peak_mem_mib", "mem_rest_mib"} <= set(got)
    assert {m.backend for m in metrics} == {"llama.cpp"} and len(raw["free"]) == len(PROMPTS)
    for name in ("latency_ms", "ms_per_token", "time_ratio"): assert 0 < got[name].low <= got[name].value <= got[name].high
    json.dumps(raw)
    assert base_again(raw) == []

def test_base_is_measured_twice_in_every_metric(tmp_path):
    folder = save(tmp_path/"m", "starcoder")
    for how in (dict(backend="torch"), dict(backend="llama.cpp", gguf=(export(folder, tmp_path/"m.gguf", "f16"),))):
        metrics, raw = measure(folder, PROMPTS, **how, **SETTINGS)
        again = {r["metric"]: r for r in base_again(json.loads(json.dumps(raw)))}
        assert set(again) == {m.metric for m in metrics} - set(raw["sizes"]) - {"aa_ratio"} - set(OPTIONAL)
        assert again["new_tokens"]["ratio"] == again["new_tokens"]["low"] == 1 and abs(again["mem_weights_mib"]["second"] - again["mem_weights_mib"]["first"]) < .01
        assert all(r["low"] <= r["ratio"] <= r["high"] for r in again.values() if r["low"] is not None)
        assert {r["metric"] for r in again.values() if r["low"] is None} >= {"peak_mem_mib", "mem_kv_mib"}

def test_the_parts_of_memory_are_the_peak(measured):
    got = {k: m.value for k, m in measured["base"][0].items()}
    assert abs(sum(got[f"mem_{k}_mib"] for k in ("libraries", "weights", "kv", "rest")) - got["peak_mem_mib"]) < .1

def test_the_end_token_ends_a_free_run_and_not_a_fixed_one(base):
    spec = dict(backend="torch", path=str(base), prompts=[[5, 6, 7]], eos=0, **{k: v for k, v in SETTINGS.items() if k != "repeats"})
    tokens = work(TorchArm(spec), "free")["tokens"]
    assert len(tokens) == 20
    stop = next(i for i in range(1, 20) if tokens[i] not in tokens[:i])
    arm = TorchArm(dict(spec, eos=tokens[stop]))
    early = work(arm, "free")
    assert early["stop_reason"] == "eos" and early["new_tokens"] == stop + 1 and work(arm, "fixed")["ms_per_token"] > 0

@pytest.mark.parametrize("model", ["tinyllama", "starcoder"])
def test_what_early_exit_promises_is_what_it_reads(tmp_path, model):
    folder = save(tmp_path/"m", model)
    net, layers = load_checkpoint(folder)[0], len(blocks(load_checkpoint(folder)[0]))
    for tau, depth in ((1e-9, 1), (1., layers)): # every token leaves at once, or none does
        save_exits(folder, exits := ExitHeads.of(net, [1]), tau)
        arm = TorchArm(dict(backend="torch", path=str(folder), prompts=[[5, 6, 7]], eos=None, early_exit=True, **{k: v for k, v in SETTINGS.items() if k != "repeats"}))
        block, head = (sum(m.out_features*m.in_features for m in part.modules() if isinstance(m, torch.nn.Linear)) for part in (blocks(net)[0], lm_head(net)))
        full, ask = layers*block + head, net.config.hidden_size**2 + head
        fills = (layers - 1)*exits.kv*exits.hidden # keys and values of the skipped blocks
        promised = 100*(block + ask + fills)/full if depth == 1 else 100
        assert abs(work(arm, "fixed")["read_pct"] - promised) < 1e-9
        free = work(arm, "free")
        assert free["layers_pct"] <= free["computed_pct"] <= 100 and (free["layers_pct"] == 100) == (depth == layers)

def test_a_torn_checkpoint_is_one_line(tmp_path):
    folder = save(tmp_path/"m")
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:500])
    with Arm(dict(backend="torch", path=str(folder), prompts=[[5]]*2, eos=0, max_new_tokens=4, fixed_tokens=4, threads=1, batch=2)) as arm:
        with pytest.raises(StudyError) as e: arm.ready()
    assert str(folder) in str(e.value) and "\n" not in str(e.value)

@pytest.mark.parametrize("change, message", [(dict(repeats=1), "two of each"), (dict(fixed_tokens=1), "two of each"), (dict(threads=0), "one thread")])
def test_settings_that_cannot_work(tmp_path, change, message):
    with pytest.raises(StudyError, match=message): measure(tmp_path, PROMPTS, **{**SETTINGS, **change})

def test_more_tokens_than_positions(base):
    arm = TorchArm(dict(backend="torch", path=str(base), prompts=[[5]]*2, eos=0, max_new_tokens=4, fixed_tokens=500, threads=1, batch=2))
    with pytest.raises(StudyError, match="fixed_tokens: 500"): work(arm, "fixed")

def test_an_arm_ends_with_its_parent(base, tmp_path):
    "A study that is killed leaves no measuring process behind."
    code = f"""
import json, os, signal
from slm_study.evaluation.arms import Arm
arm = Arm(dict(backend="torch", path={str(base)!r}, prompts=[[5, 6, 7]]*2, eos=0, max_new_tokens=4, fixed_tokens=4, threads=1, batch=2))
arm.ready()
print(arm.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    pid = int(done.stdout)
    for _ in range(50):
        try: os.kill(pid, 0)
        except ProcessLookupError: return
        if "Z" in next(l for l in open(f"/proc/{pid}/status") if l.startswith("State")): return
        time.sleep(.1)
    raise AssertionError("the arm outlived its parent")

def takes(mib): return subprocess.Popen([sys.executable, "-c", f"x = bytearray({mib} << 20); print(len(x), flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

@pytest.mark.parametrize("limit, lives", [(256, False), (512, True)])
def test_a_watch_kills_over_its_limit_and_only_then(limit, lives):
    with takes(300) as process, Watch(process, limit) as watch:
        process.stdout.readline() # empty where it was killed before it could write
        if lives: process.stdin.write(b"\n"); process.stdin.flush()
        assert process.wait() == (0 if lives else -9)
    assert watch.passed is not lives and (300 < watch.peak_mib < 400 if lives else watch.peak_mib > 256)

def test_a_childs_memory_counts_with_its_parents():
    "A variant cannot hide its memory in a process of its own."
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; x = bytearray(300 << 20); time.sleep(2)'])"
    with subprocess.Popen([sys.executable, "-c", code]) as process, Watch(process, 256) as watch:
        assert process.wait() == -9
    assert watch.passed and watch.peak_mib > 256

@pytest.fixture(scope="module")
def q8(base, tmp_path_factory): return export(base, tmp_path_factory.mktemp("gguf")/"m.gguf", "q8_0")

def test_every_backend_is_run_under_its_limits(base, q8):
    rows = {(r["backend"], r["limit_mib"]): r for r in prove({"torch": base, "llama.cpp": q8}, encode(base, PROMPTS)[0], tokens=8)}
    assert len(rows) == 2*len(LIMITS) and all("20 ms, one core" in r["held_by"] for r in rows.values())
    assert rows["torch", 256]["fits"] is False and rows["torch", 2048]["fits"] and all(rows["llama.cpp", l]["fits"] for l in LIMITS) # interpreter and PyTorch alone pass 256 MiB
    assert 256 < rows["torch", 2048]["peak_mib"] < 2048 and rows["llama.cpp", 256]["peak_mib"] < 256
    for backend in ("torch", "llama.cpp"): # what fits, fits with more memory
        fits = [rows[backend, l]["fits"] for l in LIMITS]
        assert fits == sorted(fits)
    json.dumps(list(rows.values()))

def test_an_error_under_a_limit_is_not_a_lack_of_memory(q8, tmp_path):
    torn = tmp_path/"torn.gguf"
    torn.write_bytes(q8.read_bytes()[:2000])
    rows = prove({"llama.cpp": torn}, [[5, 6], [7]], tokens=4)
    assert {r["fits"] for r in rows} == {None} and all("torn.gguf" in r["note"] for r in rows)

def test_a_run_that_another_killed_is_not_over_its_limit(q8, monkeypatch):
    from slm_study.evaluation import budget
    real = budget.Arm.work
    monkeypatch.setattr(budget.Arm, "work", lambda self, *a: (self.process.kill(), real(self, *a))[1])
    got = held(dict(backend="llama.cpp", path=str(q8), prompts=[[5, 6]]*2, eos=None, max_new_tokens=4, fixed_tokens=4, batch=2, kv_bytes=0), 512)
    assert got["fits"] is None and "killed by signal 9" in got["note"]

def test_a_budget_goes_from_record_to_table(tmp_path):
    run = Run("smoke", "tinyllama", "base", 0, str(tmp_path))
    proofs = [dict(backend="torch", limit_mib=l, fits=l > 512, peak_mib=600., held_by="a watch", note="") for l in LIMITS]
    write_record(run.folder/"record.json", run, [Metric("disk_mib", 8.)], dict(budget=proofs))
    got = collect_outcomes(tmp_path)["budget"]
    table = table_budget(tidy([dict(recipe="smoke", model="tinyllama", technique="base", seed=0, metric="disk_mib", value=8., low=None, high=None, n=None, unit="MiB", backend="torch")]), got).set_index("Backend")
    assert table.loc["torch", [f"{l} MiB" for l in LIMITS]].tolist() == ["no", "no", "yes", "yes"] and table.loc["torch", "Peak (MiB)"] == "600"
    assert set(table.loc["llama.cpp-q4_0", [f"{l} MiB" for l in LIMITS]]) == {"not measured"} and "a watch" in budget_note(got)


def test_energy_is_the_variants_own(tmp_path):
    "Counters are read around every run: each arm gets what it used, and a table says why there is nothing without one."
    from slm_study.evaluation.energy import counters
    from slm_study.evaluation.efficiency import in_turns
    zone = tmp_path/"intel-rapl:0"; zone.mkdir()
    (zone/"energy_uj").write_text("950000"); (zone/"max_energy_range_uj").write_text("1000000")
    class Uses:
        def __init__(self, uj): self.uj = uj
        def work(self, kind, i):
            (zone/"energy_uj").write_text(str((int((zone/"energy_uj").read_text()) + self.uj) % 1_000_000))
            return dict(ms_per_token=1., prefill_ms=1.)
    got = in_turns(dict(variant=Uses(30_000), base=Uses(70_000)), "fixed", 5, zones=counters(tmp_path))
    assert {round(r["energy_j"], 6) for r in got["variant"]} == {.03} and {round(r["energy_j"], 6) for r in got["base"]} == {.07}
    assert "energy_j" not in in_turns(dict(variant=Uses(1)), "fixed", 1, zones=counters(tmp_path/"none"))["variant"][0]
