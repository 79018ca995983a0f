"QLoRA as a user meets it: killed and resumed, twice from one seed, in two processes, and with everything that can be wrong."
import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

from slm_study.finetuning import qlora
from slm_study.finetuning.adapters import check_memory
from slm_study.finetuning.pretrain import encode_all, read_rows, run_trainer, train_tokenizer
from slm_study.finetuning.qlora import finetune
from slm_study.models import config_for, save_checkpoint
from slm_study.recipes import Run, Size, StudyError

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
PAIRS = [dict(prompt=f"largest of C{i} where C{j} is above N{k}\n", completion=f"print(df[df[C{j}] > N{k}][C{i}].max())") for i in range(6) for j in range(6) for k in range(6) if i != j]
SIZE = Size(hidden=64, layers=2, heads=2, kv_heads=1, ffn=96, positions=64)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def working_folder(folder, **settings):
    "A recipe and, as if earlier steps had run, bases and corpus; `settings` are of QLoRA."
    out = folder/"out"
    (out/"corpus").mkdir(parents=True)
    for name, rows in (("train", PAIRS), ("validation", PAIRS[:8])): (out/"corpus"/f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = train_tokenizer([p["prompt"]+p["completion"] for p in PAIRS], 320, [f"C{i}" for i in range(6)]+[f"N{i}" for i in range(6)])
    for model in ("tinyllama", "starcoder"):
        torch.manual_seed(0)
        save_checkpoint(AutoModelForCausalLM.from_config(config_for(model, SIZE, len(tokenizer))), tokenizer, out/model/"pretrained")
    return out, recipe(folder, **settings)


def recipe(folder, name="recipe", **settings):
    path = folder/f"{name}.yaml"
    path.write_text(json.dumps(dict(qlora=dict(tokens=12_000, batch_size=8, max_length=64) | settings)))
    return path


def run_of(recipe, out, model="starcoder"): return Run(recipe, model, out=out)
def command(recipe, out, *launcher): return [*(launcher or (sys.executable, "-m")), "slm_study.finetuning.qlora", "--recipe", str(recipe), "--model", "starcoder", "--out", str(out)]
def tuned(recipe, out, *launcher): return subprocess.run(command(recipe, out, *launcher), capture_output=True, text=True, cwd="/", env=ENV)
def adapter(run): return load_file(f"{run.tuned}_adapter/adapter_model.safetensors")
def log_of(run): return json.loads((run.tuned/"slm_study.json").read_text())["log"]
def processes(run): return json.loads((run.tuned/"slm_study.json").read_text())["processes"]
def losses(run): return [e["loss"] for e in log_of(run) if "loss" in e]
def farthest(a, b): return max((a[n]-b[n]).abs().max().item() for n in a | b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An uninterrupted run, in this process."
    out, path = working_folder(tmp_path_factory.mktemp("whole"))
    run = run_of(path, out)
    finetune(run.pretrained, read_rows(run.corpus/"train.jsonl"), run.recipe.qlora, run.tuned, "whole", validation=read_rows(run.corpus/"validation.jsonl"))
    return run


def test_killed_training_ends_in_the_same_adapter(whole, tmp_path):
    out, path = working_folder(tmp_path)
    run, training = run_of(path, out), Path(f"{run_of(path, out).tuned}_training")
    first = subprocess.Popen(command(path, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", env=ENV)
    while first.poll() is None and len(list(training.glob("checkpoint-*/trainer_state.json"))) < 2: time.sleep(.02)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL, "it was over before the kill"
    assert not run.tuned.exists() and not Path(f"{run.tuned}_adapter").exists()
    done = tuned(path, out)
    assert done.returncode == 0, done.stderr[-2000:]
    begun = re.search(r"goes on from checkpoint-(\d+)", done.stdout)
    assert begun and 0 < int(begun[1]) < log_of(run)[-1]["step"]
    assert farthest(adapter(run), adapter(whole)) < 1e-5
    assert not training.exists()


def test_same_seed_same_adapter_other_seed_other_adapter(whole, tmp_path):
    rows, check = read_rows(whole.corpus/"train.jsonl"), read_rows(whole.corpus/"validation.jsonl")
    made = {}
    for name, seed in (("again", 0), ("other", 1)):
        finetune(whole.pretrained, rows, whole.recipe.qlora, tmp_path/name, "whole", seed, validation=check)
        made[name] = load_file(tmp_path/f"{name}_adapter"/"adapter_model.safetensors")
    assert farthest(made["again"], adapter(whole)) == 0
    assert farthest(made["other"], adapter(whole)) > 1e-3


def test_checkpointing_and_accumulation_change_memory_not_the_result(whole, tmp_path):
    rows = read_rows(whole.corpus/"train.jsonl")
    made = {}
    for name, more in dict(plain={}, checkpointing=dict(checkpointing=True), parts=dict(accumulate=4)).items():
        settings = whole.recipe.qlora.model_copy(update=dict(tokens=3000, dropout=0., lr=1e-3) | more)
        finetune(whole.pretrained, rows, settings, tmp_path/name, name)
        made[name] = load_file(tmp_path/f"{name}_adapter"/"adapter_model.safetensors")
    moved = max(t.abs().max().item() for n, t in made["plain"].items() if "lora_B" in n)
    assert farthest(made["plain"], made["checkpointing"]) < 0.2*moved
    assert farthest(made["plain"], made["parts"]) < 0.2*moved


def test_two_processes_train_as_one_with_twice_the_parts(tmp_path):
    "accelerate launch: the same loss curve, and one writer."
    out, path = working_folder(tmp_path, dropout=0., tokens=6000, lr=1e-3)
    two = tuned(path, out, sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m")
    assert two.returncode == 0, two.stderr[-3000:]
    assert processes(run_of(path, out)) == 2
    curve, made = losses(run_of(path, out)), adapter(run_of(path, out))
    one = tuned(recipe(tmp_path, "parts", dropout=0., tokens=6000, lr=1e-3, accumulate=2), out)
    assert one.returncode == 0, one.stderr[-3000:]
    alone = losses(run_of(path, out))
    assert processes(run_of(path, out)) == 1
    assert len(curve) == len(alone) > 5 and alone[-1] < alone[0]-0.2
    assert max(abs(a-b) for a, b in zip(curve, alone)) < 0.01
    assert farthest(made, adapter(run_of(path, out))) < 0.1*max(t.abs().max().item() for t in made.values())
    assert two.stdout.count("100 %") <= 1, "both processes told of their progress"


def refused(whole, tmp_path, says, checkpoint=None, rows=None, **settings):
    "It says so in one line and leaves what stands there."
    (tmp_path/"tuned").mkdir(exist_ok=True); (tmp_path/"tuned"/"mine").write_text("kept")
    with pytest.raises(StudyError) as e:
        finetune(checkpoint or whole.pretrained, rows or PAIRS, whole.recipe.qlora.model_copy(update=settings), tmp_path/"tuned", "tune")
    assert re.search(says, str(e.value)) and "\n" not in str(e.value)
    assert [p.name for p in (tmp_path/"tuned").iterdir()] == ["mine"] and not (tmp_path/"tuned_adapter").exists()


def test_a_loss_that_is_no_number_stops_at_once(whole, tmp_path):
    refused(whole, tmp_path, r"the loss is (nan|inf) at step \d+; lower the learning rate", lr=1e30, warmup_ratio=0., tokens=4000)


def test_too_little_memory_is_known_before_anything_is_loaded(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(qlora, "check_memory", lambda needed, name: check_memory(needed, name, lambda: 1.))
    monkeypatch.setattr(qlora, "load_4bit", lambda *a: pytest.fail("it was loaded"))
    refused(whole, tmp_path, r"needs about [\d,]+ MiB, 1 MiB are free; lower batch_size")


def test_checkpoints_of_another_recipe_are_set_aside(whole, tmp_path, capsys, monkeypatch):
    "Even where weights and data are the same and only alpha differs."
    settings = whole.recipe.qlora.model_copy(update=dict(tokens=2000))
    monkeypatch.setattr(qlora, "merge", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))  # stopped after training: its checkpoints stay
    with pytest.raises(KeyboardInterrupt): finetune(whole.pretrained, PAIRS, settings, tmp_path/"tuned", "tune")
    monkeypatch.undo()
    finetune(whole.pretrained, PAIRS, settings.model_copy(update=dict(alpha=16)), tmp_path/"tuned", "tune")
    said = capsys.readouterr().out
    assert "it starts anew, and what was there is now tuned_training_" in said and "goes on" not in said
    assert len(list(tmp_path.glob("tuned_training_*/checkpoint-*"))) == 2


def test_a_killed_training_remembers_how_long_nothing_got_better(tmp_path, capsys):
    "Stopped in the second of three vain tenths, it ends with the third, as it would have."
    torch.manual_seed(0)
    tokenizer = train_tokenizer([p["prompt"]+p["completion"] for p in PAIRS], 320)
    net = lambda: AutoModelForCausalLM.from_config(config_for("starcoder", SIZE, len(tokenizer)))
    rows = encode_all(tokenizer, [(p["prompt"], p["completion"]) for p in PAIRS], 64)
    patient = dict(load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False)
    def train(folder, model, *more):
        return run_trainer(model, rows, folder, "train", 12_000, 8, 0., 0., 0, validation=rows[:16], callbacks=[EarlyStoppingCallback(3), *more], **patient) # a rate of 0: no tenth is better than the first
    first = net()
    whole = train(tmp_path/"whole", copy.deepcopy(first))
    last = max(e["step"] for e in whole if "eval_loss" in e)
    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step > last*3//4: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train(tmp_path/"killed", copy.deepcopy(first), Kill())
    again = train(tmp_path/"killed", copy.deepcopy(first))
    assert "goes on from" in capsys.readouterr().out
    assert [(e["step"], e["eval_loss"]) for e in again if "eval_loss" in e] == [(e["step"], e["eval_loss"]) for e in whole if "eval_loss" in e]
