# Which runs are out of date, and in which order? `slm-study run` (or `make study`) calls this; so can you:
#   snakemake --cores 2 --config recipe=pocket            on this machine
#   snakemake --executor slurm -j 50 --config recipe=paper   on a cluster, with the executor plugin installed
import os, shlex, sys
from slm_study.recipes import Run, root
from slm_study.studies import STEPS, executed_path

RECIPE, OUT = str(config.get("recipe", "pocket")), str(config.get("out", ""))
STUDY = Run(RECIPE, out=OUT)
R = STUDY.recipe
STEP = f"{shlex.quote(sys.executable)} -m slm_study.studies"
GIVEN = f"--recipe {shlex.quote(str(STUDY.source))} " + (f"--out {shlex.quote(OUT)}" if OUT else "")
HALF = max(1, workflow.cores//2) if workflow.cores else 1


def run(model=None, technique=None, seed=R.seeds[0]): return Run(RECIPE, model, technique, seed, OUT)
def base(w): return made("0_pretrain", model=w.model) # trained by the rule below, or shipped
def made(step, **kw): return str(STEPS[step](run(**kw)))
def log_of(step, **kw): return str(executed_path(run(**kw), step))
def modules(*names): return [str(root()/"slm_study"/f"{n}.py") for n in names]
def sources(step, *folders):
    "The notebook of a step and the modules it is made of: when they change, its results are out of date."
    return [str(root()/"nbs"/"studies"/f"{step}.ipynb"), *sorted(str(p) for f in folders for p in (root()/"slm_study"/f).glob("*.py")), *modules("models")]


M, T, S = "{model}", "{technique}", "{seed}"
FOLDER = str(STUDY.out)
wildcard_constraints: seed=r"\d+", model="|".join(R.models), technique="|".join(R.techniques)
RECORDS = [made("3_evaluate", model=m, technique=t, seed=s) for m in R.models for t in R.techniques for s in R.seeds]
SWEEPS = [made("3b_sweep", model=m, seed=s) for m in R.models for s in R.seeds] if R.sweep.run and R.evaluation.quality else [] # random weights answer nothing

rule all:
    input: made("4_results")

rule records:
    input: RECORDS

rule bases: # for `make bases`
    input: [made("0_pretrain", model=m) for m in R.models]

rule curate:
    input: sources("1_curate", "curation")
    output: made("1_curate")
    params: R.hash("data", "bases", "models") + f", sources {R.qlora.sources}"
    log: log_of("1_curate")
    shell: f"{STEP} 1_curate {GIVEN}"

rule pretrain:
    input: sources("0_pretrain", ".")[:1], made("1_curate"), str(root()/"slm_study/finetuning/pretrain.py"), str(root()/"slm_study/models.py")
    output: f"{FOLDER}/{M}/pretrained/slm_study.json"
    params: R.hash("pretrain")
    log: f"{FOLDER}/notebooks/0_pretrain-{M}.ipynb"
    threads: HALF
    shell: f"{STEP} 0_pretrain {GIVEN} --model {{wildcards.model}}"

rule finetune:
    input: sources("2_finetune", "finetuning"), made("1_curate"), base
    output: f"{FOLDER}/{M}/seed{S}/tuned/slm_study.json"
    params: R.hash("qlora")
    log: f"{FOLDER}/notebooks/2_finetune-{M}-seed{S}.ipynb"
    threads: HALF
    shell: f"{STEP} 2_finetune {GIVEN} --model {{wildcards.model}} --seed {{wildcards.seed}}"

rule evaluate:
    # two at once; while one takes its times, the other waits for its turn (slm_study.studies.turn)
    input: sources("3_evaluate", "compression", "runtime", "evaluation"), *modules("memory", "records"), made("1_curate"), base, f"{FOLDER}/{M}/seed{S}/tuned/slm_study.json"
    output: f"{FOLDER}/{M}/seed{S}/{T}/record.json"
    params: lambda w: R.hash("evaluation", "qlora", w.technique, *(("pruning_masked",) if w.technique == "pruning" else ())) # a technique without settings of its own adds nothing; pruning's example shows the masked matrix too
    log: f"{FOLDER}/notebooks/3_evaluate-{M}-{T}-seed{S}.ipynb"
    threads: HALF
    shell: f"{STEP} 3_evaluate {GIVEN} --model {{wildcards.model}} --technique {{wildcards.technique}} --seed {{wildcards.seed}}"

rule sweep:
    # points that are done stay in points.jsonl beside the output: a killed sweep goes on
    input: sources("3b_sweep", "compression", "evaluation"), made("1_curate"), base, f"{FOLDER}/{M}/seed{S}/tuned/slm_study.json"
    output: f"{FOLDER}/{M}/seed{S}/sweep/sweep.json"
    params: R.hash("sweep", "qlora", "pruning", "evaluation")
    log: f"{FOLDER}/notebooks/3b_sweep-{M}-seed{S}.ipynb"
    threads: HALF
    shell: f"{STEP} 3b_sweep {GIVEN} --model {{wildcards.model}} --seed {{wildcards.seed}}"

rule results:
    input: sources("4_results", "report"), *modules("records"), RECORDS, SWEEPS
    output: made("4_results")
    params: R.hash()
    log: log_of("4_results")
    shell: f"{STEP} 4_results {GIVEN}"
