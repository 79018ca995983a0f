"The two base models that come with the project: from which recipe, how large, and do they do what their cards say?"
import hashlib
import json

import pytest

from slm_study.curation.corpus import held_out_tasks
from slm_study.evaluation.generation import generate
from slm_study.evaluation.quality import evaluate_samples
from slm_study.evaluation.sandbox import Sandbox
from slm_study.finetuning.pretrain import base_hash
from slm_study.models import architecture, load_checkpoint
from slm_study.recipes import MODELS, Run, load_recipe, root

FOLDERS = {m: root()/"bases"/m for m in MODELS}
FACTS = {m: json.loads((f/"slm_study.json").read_text()) for m, f in FOLDERS.items()}


@pytest.mark.parametrize("model", MODELS)
def test_a_base_is_what_its_recipe_says(model):
    facts, recipe = FACTS[model], load_recipe("bases")
    assert facts["recipe_hash"] == base_hash(recipe), "recipes/bases.yaml has changed since this base was trained: run `make bases`"
    assert facts["tokens"] == recipe.pretrain.tokens and facts["model"] == model
    pocket = load_recipe("pocket").data
    assert (pocket.test_tasks, pocket.seed, pocket.slots) == (recipe.data.test_tasks, recipe.data.seed, recipe.data.slots), "the study's test tasks were kept out of the base's training"
    assert Run("pocket", model).pretrained == FOLDERS[model], "the default study starts from the shipped base"


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_small_and_those_of_the_card(model):
    weights = FOLDERS[model]/"model.safetensors"
    assert weights.stat().st_size < 12*2**20
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == FACTS[model]["sha256"]
    card = (FOLDERS[model]/"README.md").read_text()
    assert FACTS[model]["sha256"] in card and f"{FACTS[model]['score']['right']} of {FACTS[model]['score']['n']}" in card
    net, _ = load_checkpoint(FOLDERS[model])
    assert architecture(net) == dict(tinyllama="llama", starcoder="gpt_bigcode")[model] and net.num_parameters() == FACTS[model]["parameters"]


@pytest.mark.parametrize("model", MODELS)
def test_a_base_scores_as_recorded(model):
    "Other tasks than the card's, so within what chance allows (four standard deviations, and never nothing)."
    tasks, score = held_out_tasks(60, 4_321, True), FACTS[model]["score"]
    net, tokenizer = load_checkpoint(FOLDERS[model])
    generations = generate(net, tokenizer, [t.prompt for t in tasks], 160, 60, progress=False)
    with Sandbox() as sandbox: samples = evaluate_samples(tasks, generations, sandbox)
    right, p = sum(s["correct"] for s in samples)/len(samples), score["right"]/score["n"]
    room = 4*(p*(1 - p)*(1/len(samples) + 1/score["n"]))**.5
    print(f"{model}: {100*right:.0f} % of {len(samples)}, {100*p:.0f} % on the card")
    assert right > 0 and abs(right - p) <= room
