"""Ordinary mistakes, ten of every stage: what is said of each, whole. Nothing heavy is imported for those of the command line."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dedpo_diffusion import settings
from dedpo_diffusion.core.options import field_docs, find_options
from dedpo_diffusion.core.recipes import find_config, recipe_files
from dedpo_diffusion.pipelines import STAGES, main

FILES = {
    "tab.yaml": "seed: 1\n\tout: x\n",
    "typo.yaml": "seed: 1\nsteps: 3\nsed: 2\n",
    "nested.yaml": "optim:\n  steps: 3\n  learning_rat: 0.1\n",
    "value.yaml": "seed: 1\n\n# a comment\noptim: {steps: many}\n",
    "list.yaml": "- seed\n- out\n",
    "open.yaml": "seed: [1\n",
    "plain.yaml": "seed: twelve\n",
}
WHOLE = "does not fit; it takes a whole number"
TO = "labelstudio, argilla, datasets, imagefolder or csv"
NO_PAIRS = "holds no parquet files; make a pair dataset with `dedpo ingest` or `dedpo propose`"
BOOL = "does not fit; it takes true or false"
MISTAKES = {
    "ingest": [
        ("auto", "SOURCE and --out are missing"),
        ("auto x", "--out is missing: <out>"),
        ("auto x --otu y", "there is no option --otu; did you mean --out?"),
        ("auto x --out", "--out needs a value: a path"),
        ("auto x y --out z", "nothing takes 'y'; it takes FORMAT, SOURCE, then options"),
        ("auto x --out y --ties kep", "--ties: 'kep' does not fit; it takes one of keep or drop; did you mean keep?"),
        ("auto x --out y --seed one", f"--seed: 'one' {WHOLE}"),
        ("auto x --out y --columns prompt", '--columns: \'prompt\' does not fit; it takes a table such as {"name": "value"}'),
        ("auto x --out y --config tab.yaml", "tab.yaml line 2: a tab; use spaces"),
        ("auto x --source y --out z", "there is no option --source; SOURCE is given without a name"),
    ],
    "propose": [
        ("", "--model, --prompts and --out are missing"),
        ("--model m --prompts p", "--out is missing: <out>"),
        ("--model m --prompts p --outt o", "there is no option --outt; did you mean --out?"),
        ("--model m --prompts p --out o --step 3", "there is no option --step; did you mean --steps?"),
        ("--model m --prompts p --out o --steps 2.5", f"--steps: '2.5' {WHOLE}"),
        ("--model m --prompts p --out o --guidance much", "--guidance: 'much' does not fit; it takes a number"),
        (
            "--model m --prompts p --out o --pairing al",
            "--pairing: 'al' does not fit; it takes one of disjoint, all, best_worst, threshold or rso; did you mean all?",
        ),
        ("--model m --prompts p --out o --device gpu", "--device gpu: there is no such device; it takes cpu, cuda or cuda:0"),
        ("--model m --prompts p --out o extra", "nothing takes 'extra'; the options of this stage have names, such as --out"),
        ("--config typo.yaml", "typo.yaml line 3: there is no option sed; did you mean seed?"),
    ],
    "pairs": [
        ("", "ACTION and PAIRS are missing"),
        ("export P", "--to and --out are missing: `dedpo pairs export` needs it"),
        ("export P --to csv", "--out is missing: `dedpo pairs export` needs it"),
        ("push P", "OWNER/NAME is missing: `dedpo pairs push` needs it"),
        ("import P --to csv --out o", "ACTION: 'import' does not fit; it takes one of export, push or join; did you mean export?"),
        ("export P --to excel --out o", f"--to: 'excel' does not fit; it takes one of {TO}"),
        ("export P --to labelstudo --out o", f"--to: 'labelstudo' does not fit; it takes one of {TO}; did you mean labelstudio?"),
        ("export P --format csv --out o", "there is no option --format"),
        ("export P --to csv --out o --fields htm", "--fields: 'htm' does not fit; it takes one of image or html; did you mean html?"),
        ("export P --to csv --out o --seed one", f"--seed: 'one' {WHOLE}"),
        ("export P Q --to csv --out o", "REPOSITORY is for `dedpo pairs push`; leave it out"),
        ("push P Q/R S", "nothing takes 'S'; it takes ACTION, PAIRS, REPOSITORY, then options"),
        ("export P --to csv --out o --images data", "--images is for labelstudio, and csv has one way to hold images; leave it out"),
        ("export nowhere --to csv --out o", f"nowhere/pairs {NO_PAIRS}"),
    ],
    "validate": [
        ("", "PAIRS is missing: <pairs>"),
        ("P --pairs P", "there is no option --pairs; PAIRS is given without a name"),
        ("P Q", "nothing takes 'Q'; it takes PAIRS, then options"),
        ("P --dept headers", "there is no option --dept; did you mean --depth?"),
        ("P --depth header", "--depth: 'header' does not fit; it takes one of headers or decode; did you mean headers?"),
        ("P --near few", f"--near: 'few' {WHOLE}"),
        ("P --worker 2", "there is no option --worker; did you mean --workers?"),
        ("P --out", "--out needs a value: a path"),
        ("P --config list.yaml", "list.yaml line 1: this must be a table of settings, such as `seed: 0`"),
        ("nowhere", "nowhere/pairs holds no parquet files; make a pair dataset with `dedpo ingest` or `dedpo propose`"),
    ],
    "vote": [
        ("", "FOLDERS is missing: <folders>"),
        ("P --prot 80", "there is no option --prot; did you mean --port?"),
        ("P --port web", f"--port: 'web' {WHOLE}"),
        ("P --order rand", "--order: 'rand' does not fit; it takes one of random or disagreement; did you mean random?"),
        ("P --share maybe", f"--share: 'maybe' {BOOL}"),
        ("P --judges", "--judges needs a value: words, separated by blanks"),
        ("--judges a b P", "FOLDERS is missing: <folders>;"
         " give it before --judges, which takes all words that follow"),
        ("P --floor+ 0.5", "--floor takes one value, so nothing can be added to it; leave the + out"),
        ("P --repeats some", "--repeats: 'some' does not fit; it takes a number"),
        ("P --config missing.yaml", "there is no file missing.yaml; `dedpo recipes` lists the ones that come with dedpo"),
    ],
    "label": [
        ("P", "--with is missing: <judges>"),
        ("--with pickscore P", "PAIRS is missing: <pairs>; give it before --with, which takes all words that follow"),
        ("P --with", "--with needs a value: words, separated by blanks"),
        ("P --wth pickscore", "there is no option --wth; did you mean --with?"),
        ("P --judge pickscore", "there is no option --judge"),
        ("P --with clip --batch big", f"--batch: 'big' {WHOLE} or auto"),
        ("P --with clip --summary perhaps", f"--summary: 'perhaps' {BOOL}"),
        ("P --with clip --dtype bf16", "--dtype: 'bf16' does not fit; it takes one of auto, float32, bfloat16 or float16; did you mean bfloat16?"),  # noqa: E501
        ("P --with clip --self_training.timesteps 3", "--self_training.timesteps: it takes 2 whole numbers, separated by a blank,"
         " and 1 is given"),
        ("P --with clip --vlm.max_sides 3", "there is no option --vlm.max_sides; did you mean --vlm.max_side?"),
    ],
    "calibrate": [
        ("", "PAIRS is missing: <pairs>"),
        ("P --metod stack", "there is no option --metod; did you mean --method?"),
        ("P --method stac", "--method: 'stac' does not fit; it takes one of temperature, stack or adapt; did you mean stack?"),
        ("P --folds few", f"--folds: 'few' {WHOLE}"),
        ("P --invert perhaps", f"--invert: 'perhaps' {BOOL}"),
        ("P --judges", "--judges needs a value: words, separated by blanks"),
        ("P Q", "nothing takes 'Q'; it takes PAIRS, then options"),
        ("P --seed", "--seed needs a value: a whole number"),
        ("P --config open.yaml", "open.yaml line 2: this is not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("P --config plain.yaml", f"plain.yaml line 1: seed: 'twelve' {WHOLE}"),
    ],
    "merge": [
        ("", "PAIRS is missing: <pairs>"),
        ("P --methd tuned", "there is no option --methd; did you mean --method?"),
        ("P --method tunned", "--method: 'tunned' does not fit; it takes one of human_only, naive, dedpo, tuned or adapted;"
         " did you mean tuned?"),
        ("P --power half", "--power: 'half' does not fit; it takes a number"),
        ("P --missing ties", "--missing: 'ties' does not fit; it takes one of error or tie; did you mean tie?"),
        ("P --folds 2.5", f"--folds: '2.5' {WHOLE}"),
        ("P --picture maybe", f"--picture: 'maybe' {BOOL}"),
        ("P --target tuned", "there is no option --target"),
        ("P --objective.power follow", "objective.power=follow is now objective.power=adaptive"),
        ("P Q", "nothing takes 'Q'; it takes PAIRS, then options"),
    ],
    "train": [
        ("", "--model, --out and --data.pairs are missing"),
        ("--config shapes_lora.yaml --data.pairs P", "--out is missing: <out>"),
        ("--steps 20", "there is no option --steps; did you mean --optim.steps?"),
        ("--optim.learning_rat 1e-4", "there is no option --optim.learning_rat; did you mean --optim.learning_rate?"),
        ("--lr 1e-4", "there is no option --lr; did you mean --optim.learning_rate?"),
        ("--config nested.yaml", "nested.yaml line 3: there is no option optim.learning_rat; did you mean learning_rate?"),
        ("--config value.yaml", f"value.yaml line 4: optim.steps: 'many' {WHOLE}"),
        ("--config sdxl_lora_12g", "there is no file sdxl_lora_12g; did you mean sdxl_lora_12gb.yaml?"),
        ("--optim.betas 0.9", "--optim.betas: it takes 2 numbers, separated by a blank, and 1 is given"),
        ("--lora.dora maybe", f"--lora.dora: 'maybe' {BOOL}"),
        ("--gradient_checkpointing selectiv", "--gradient_checkpointing: 'selectiv' does not fit; it takes true or false or selective;"
         " did you mean selective?"),
    ],
    "export": [
        ("", "SOURCE and --out are missing"),
        ("RUN", "--out is missing: <out>"),
        ("RUN --out x --format koya", "--format: 'koya' does not fit; it takes one of diffusers, kohya, merged or checkpoint;"
         " did you mean kohya?"),
        ("RUN --out x --strength bst", "--strength: 'bst' does not fit; it takes a number or best; did you mean best?"),
        ("RUN --out x --rank small", f"--rank: 'small' {WHOLE}"),
        ("RUN --out x --add", "--add needs a value: words, separated by blanks"),
        ("RUN --out x --average off --card maybe", f"--card: 'maybe' {BOOL}"),
        ("RUN --out x --result r.json", "there is no option --result; did you mean --results?"),
        ("--out x --add a RUN", "SOURCE is missing: <source>;"
         " give it before --add, which takes all words that follow"),
        ("RUN --output x", "there is no option --output; did you mean --out?"),
        ("RUN --out x.safetensors", "there is no RUN; give the folder of a run, which `dedpo train` makes, or a LoRA file"),
    ],
    "inspect": [
        ("", "PATH is missing: <path>"),
        ("f --jsn", "there is no option --jsn; did you mean --json?"),
        ("f --json maybe", f"--json: 'maybe' {BOOL}"),
        ("--json f", f"--json: 'f' {BOOL}"),
        ("f g", "nothing takes 'g'; it takes PATH, then options"),
        ("f --hash sha256", f"--hash: 'sha256' {BOOL}"),
        ("f -j", "there is no option -j"),
        ("f --path g", "there is no option --path; PATH is given without a name"),
        ("f --config", "--config needs a YAML file behind it"),
        ("f --json=", "--json: nothing is given; it takes true or false"),
    ],
    "sample": [
        ("", "--model, --prompts and --out are missing"),
        ("--model m --prompts p --out o --loras x", "there is no option --loras; did you mean --lora?"),
        ("--model m --prompts p --out o --strength strong", "--strength: 'strong' does not fit; it takes a number"),
        ("--model m --prompts p --out o --strength 1 2 x", "--strength: 'x' does not fit; it takes a number"),
        ("--model m --prompts p --out o --scheduler ddmi", "--scheduler: 'ddmi' does not fit; it takes one of ddim, euler, euler_a,"
         " dpmpp_2m or unipc; did you mean ddim?"),
        ("--model m --prompts p --out o --size big", f"--size: 'big' {WHOLE}"),
        ("--model m --prompts p --out o --optim.steps 3", "there is no option --optim.steps; did you mean --steps?"),
        ("--model m --prompts p --out o --seeds", "--seeds needs a value: a whole number"),
        ("--model m --out o", "--prompts is missing: <prompts>"),
        ("--model m --prompts p --out o --config tab.yaml", "tab.yaml line 2: a tab; use spaces"),
    ],
    "score": [
        ("", "FOLDERS and --with are missing"),
        ("a", "--with is missing: <scorers>"),
        ("--with pickscore a b", "FOLDERS is missing: <folders>; give it before --with, which takes all words that follow"),
        ("a --with", "--with needs a value: words, separated by blanks"),
        ("a --scorer pickscore", "there is no option --scorer"),
        ("a --with x --batch many", f"--batch: 'many' {WHOLE} or auto"),
        ("a --with x --embeddings maybe", f"--embeddings: 'maybe' {BOOL}"),
        ("a --with x --embedding true", "there is no option --embedding; did you mean --embeddings?"),
        ("a --with x --device cudo", "--device cudo: there is no such device; it takes cpu, cuda or cuda:0"),
        ("a --with x --config typo", "typo.yaml line 1: there is no option seed"),
    ],
    "compare": [
        ("", "FOLDERS is missing: <folders>"),
        ("a b --target t.json", "there is no option --target; did you mean --targets?"),
        ("a b --targets", "--targets needs a value: paths, separated by blanks"),
        ("--targets t.json a b", "FOLDERS is missing: <folders>; give it before --targets, which takes all words that follow"),
        ("a b --resamples lots", f"--resamples: 'lots' {WHOLE}"),
        ("a b --heldout x", "there is no option --heldout; did you mean --held_out?"),
        ("a b --held-out", "there is no option --held-out; did you mean --held_out?"),
        ("a b --out", "--out needs a value: a path"),
        ("a b --primary+ x", "--primary takes one value, so nothing can be added to it; leave the + out"),
        ("a b --with x", "there is no option --with"),
    ],
    "quickstart": [
        ("here", "nothing takes 'here'; the options of this stage have names, such as --out"),
        ("--step 3", "there is no option --step; did you mean --steps?"),
        ("--optim.steps 3", "there is no option --optim.steps; did you mean --steps?"),
        ("--pairs", "--pairs needs a value: a whole number"),
        ("--pairs folder", f"--pairs: 'folder' {WHOLE}"),
        ("--human_share half", "--human_share: 'half' does not fit; it takes a number"),
        ("--seed 1.5", f"--seed: '1.5' {WHOLE}"),
        ("--model m", "there is no option --model"),
        ("--eval_prompt 3", "there is no option --eval_prompt; did you mean --eval_prompts?"),
        ("--config plain.yaml", f"plain.yaml line 1: seed: 'twelve' {WHOLE}"),
    ],
    "cache": [
        ("--remove x --folder empty", "empty: no cache 'x'; `dedpo cache` lists the names"),
        ("--remove x y --folder empty", "empty: no cache 'x'; `dedpo cache` lists the names"),
        ("--remove x --remove_all true", "give --remove NAME or --remove_all true, not both"),
        ("--remove", "--remove needs a value: words, separated by blanks"),
        ("--remove_al true", "there is no option --remove_al; did you mean --remove_all?"),
        ("--remove_all maybe", "--remove_all: 'maybe' does not fit; it takes true or false"),
        ("--out o", "there is no option --out"),
        ("--folde f", "there is no option --folde; did you mean --folder?"),
        ("list", "nothing takes 'list'; the options of this stage have names, such as --remove"),
        ("--config nowhere.yaml", "there is no file nowhere.yaml; `dedpo recipes` lists the ones that come with dedpo"),
        ("--config plain.yaml", "plain.yaml line 1: there is no option seed"),
    ],
    "align": [
        ("", "--model is missing: <model>"),
        ("--model m", "give prompts, for which the model proposes pairs, or pairs, a dataset or a source that `dedpo ingest` reads"),
        ("--model m --prompts p --pairs P",
         "prompts and pairs are both given; give prompts to propose pairs, or pairs that there are already"),
        ("--model m --prompts p",
         "nobody labels these pairs, and merging learns from people; give votes, such as 100, the answers to wait for"),
        ("--model m --prompts p --vote 30", "there is no option --vote; did you mean --votes?"),
        ("--model m --prompts p --votes many", f"--votes: 'many' {WHOLE}"),
        ("--model m --prompts p --people me", "--people: 'me' does not fit; it takes one of real or simulated"),
        ("--model m --prompts p --people simulated",
         "people: simulated is for the embedded model (model: shapes); the model is m"),
        ("--config align_shape", "there is no file align_shape; did you mean align_shapes.yaml?"),
        ("--config align_shapes --human_share 2", "human_share is 2.0; simulated people label a share of the pairs, above 0 and up to 1"),
        ("--config align_shapes --images_per_prompt 3", "images_per_prompt is 3; give an even number, as two images make a pair"),
        ("--config align_shapes extra", "nothing takes 'extra'; the options of this stage have names, such as --out"),
        ("--config typo.yaml", "typo.yaml line 3: there is no option sed; did you mean seed?"),
    ],
}  # fmt: skip


def in_full(stage: str, message: str) -> str:
    """A message with the descriptions of options that it repeats, which are named as <out>."""
    texts = field_docs(getattr(settings, f"{stage.capitalize()}Settings"))
    return re.sub(r"<(\w+)>", lambda match: texts[match[1]].rstrip("."), message)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("stage", "words", "message"), [(stage, *row) for stage, rows in MISTAKES.items() for row in rows])
def test_a_mistake_is_one_line_in_english(stage, words, message, folder, capsys):
    assert main([stage, *shlex.split(words)]) == 2
    found = capsys.readouterr()
    first, *rest = found.err.splitlines()
    assert first == f"dedpo {stage}: error: {in_full(stage, message)}" and not found.out
    assert rest in ([], [f"`dedpo {stage} --help` shows the options"])
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)  # nothing was written


def test_ten_of_every_stage():
    assert MISTAKES.keys() >= {*STAGES} and all(len(rows) >= 10 for rows in MISTAKES.values())


def test_mistakes_of_the_command_line_import_nothing_heavy():
    code = (
        "import sys\nfrom dedpo_diffusion.pipelines import main\n"
        "assert main(['train', '--config', 'shapes_lora', '--steps', '20']) == 2\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib', 'accelerate'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_misspelt_stage(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "dedpo: error: no stage 'trian'; did you mean train?\n`dedpo --help` shows the stages\n"


def test_a_gpu_that_is_not_here(folder, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["train", "--config", "shapes_lora", "--data.pairs", "P", "--out", "R", "--device", "cuda"]) == 2
    wanted = "no CUDA device is here; leave --device out, or install a CUDA build of torch"
    assert capsys.readouterr().err == f"dedpo train: error: {wanted}\n"


def test_recipes_are_found_by_name_from_anywhere(folder, capsys):
    assert find_config("sdxl_lora_12gb") == find_config("sdxl_lora_12gb.yaml") == recipe_files()["sdxl_lora_12gb"]
    (folder / "sdxl_lora_12gb.yaml").write_text("seed: 3\n")  # a file of the current folder wins
    assert find_config("sdxl_lora_12gb") == find_config("sdxl_lora_12gb.yaml") == Path("sdxl_lora_12gb.yaml")
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for name in recipe_files():
        assert re.search(rf"^  {name}\.yaml +\w+  \S", listed, re.M), name


@pytest.mark.parametrize("stage", list(STAGES))
def test_help_shows_what_people_use_first_and_all_of_it_on_demand(stage, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main([stage, "--help"]) == 0
    short = capsys.readouterr().out
    assert main([stage, "--help_all"]) == 0
    every = capsys.readouterr().out
    rows = [re.findall(r"^  (--[\w.]+|[A-Z]+)\b", text, re.M) for text in (short, every)]
    assert len(rows[0]) <= 11 and set(rows[0]) <= set(rows[1]) and len(set(rows[1])) == len(rows[1])
    assert f"usage: dedpo {stage}" in short and "--config FILE" in short and "--config CONFIG" not in every
    chosen = getattr(settings, f"{stage.capitalize()}Settings")
    assert len(rows[1]) == sum(not option.group for option in find_options(chosen).values())
    if len(rows[1]) > len(rows[0]):
        assert f"`dedpo {stage} --help_all` shows" in short
    assert not re.search(r"None|typing|NoneType|<class", every)


def test_the_help_of_the_command_names_every_stage_once(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert sorted(re.findall(r"^  (\w+)  ", said, re.M)) == sorted(STAGES)
    order = [said.index(f"\n{title}\n") for title in ("make pairs", "label", "train", "look")]
    assert order == sorted(order)
