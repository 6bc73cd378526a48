"""What single files say of themselves wins over the configuration they are loaded with, or is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.models import tiny
from dedpo_diffusion.models.backbone import Backbone
from dedpo_diffusion.models.loading import load_pipeline
from dedpo_diffusion.models.marks import Marks, read_marks, schedule
from dedpo_diffusion.models.single_file import family
from dedpo_diffusion.sampling.sampler import load_sampler, sample
from dedpo_diffusion.weights.base_model import look_up

EMPTY = torch.tensor([])
SPEC = "modelspec.prediction_type"


@pytest.fixture(scope="module")
def files(folders, tmp_path_factory) -> dict[str, Path]:
    """A single file of SDXL without marks, and folders of the same architecture that say three things of the schedule."""
    where = tmp_path_factory.mktemp("marks")
    found = {"plain": tiny.single_file(folders["sdxl"], where / "plain.safetensors"), "epsilon": folders["sdxl"]}
    for name, zero in (("v", False), ("v_zero_snr", True)):
        found[name] = shutil.copytree(folders["sdxl"], where / name)
        declare(found[name], prediction_type="v_prediction", rescale_betas_zero_snr=zero)
    return found


def declare(folder: Path, **changes) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def marked(files, to: Path, *names: str, metadata=None, **tensors) -> Path:
    save_file(load_file(files["plain"]) | dict.fromkeys(names, EMPTY) | tensors, to, metadata=metadata)
    return to


def says(pipe) -> tuple[str, bool]:
    return pipe.scheduler.config.prediction_type, bool(pipe.scheduler.config.get("rescale_betas_zero_snr"))


V, ZERO, NOISE = ("v_prediction", False), ("v_prediction", True), ("epsilon", False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "metadata", "config", "expected", "said"),
    [
        ((), None, "epsilon", NOISE, ""),
        ((), None, "v_zero_snr", ZERO, ""),
        (("v_pred",), None, "epsilon", V, "it predicts v, by the tensor v_pred; {} says otherwise and is overruled"),
        (("v_pred", "ztsnr"), None, "v", ZERO, "its noise schedule ends at zero SNR, by the tensor v_pred and the tensor ztsnr"),
        (("v_pred", "ztsnr"), None, "v_zero_snr", ZERO, ""),
        (("ztsnr",), None, "v", ZERO, "by the tensor ztsnr"),
        ((), {SPEC: "v"}, "epsilon", V, f"it predicts v, by its {SPEC}"),
        ((), {SPEC: "epsilon"}, "v", NOISE, f"it predicts noise (epsilon), by its {SPEC}"),
        ((), {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, "epsilon", ZERO, "by its ss_v_parameterization"),
        (("v_pred",), {SPEC: "v"}, "v", V, ""),
    ],
)
def test_a_mark_wins_over_the_configuration_and_one_line_says_so(files, tmp_path, capsys, names, metadata, config, expected, said):
    pipe = load_pipeline(str(marked(files, tmp_path / "m.safetensors", *names, metadata=metadata)), config=str(files[config]))
    assert says(pipe) == expected
    lines = [line for line in capsys.readouterr().out.splitlines() if "overruled" in line]
    assert len(lines) == bool(said) and said.format(files[config]) in "".join(lines)
    if expected == ZERO and said:
        assert pipe.scheduler.config.timestep_spacing == "trailing"  # sampling begins where the schedule ends


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "metadata", "words"),
    [
        (("v_pred",), {SPEC: "epsilon"}, "the tensor v_pred marks a model that predicts v, and its modelspec.prediction_type one"),
        (("ztsnr",), None, "the tensor ztsnr marks zero terminal SNR, but nothing says that it predicts v"),
        ((), {SPEC: "rectified_flow"}, "predicts 'rectified_flow' (modelspec.prediction_type)"),
        ((), {SPEC: "epsilon", "ss_v_parameterization": "True"}, "its metadata contradict each other"),
    ],
)
def test_marks_that_do_not_go_together_are_refused_and_the_option_decides(files, tmp_path, names, metadata, words):
    file = marked(files, tmp_path / "m.safetensors", *names, metadata=metadata)
    with pytest.raises(UserError) as caught:
        load_pipeline(str(file), config=str(files["epsilon"]))
    assert words in str(caught.value) and str(caught.value).startswith(f"{file}: ") and "--model_prediction" in str(caught.value)
    assert says(load_pipeline(str(file), config=str(files["epsilon"]), prediction="v")) == V


@pytest.mark.slow
@pytest.mark.parametrize(("option", "expected"), [("epsilon", NOISE), ("v", V), ("v_zero_snr", ZERO)])
def test_the_option_is_right_for_files_and_folders(files, tmp_path, capsys, option, expected):
    file = marked(files, tmp_path / "m.safetensors", "v_pred", "ztsnr")
    assert says(load_pipeline(str(file), config=str(files["epsilon"]), prediction=option)) == expected
    capsys.readouterr()
    assert says(load_pipeline(str(files["epsilon"]), prediction=option)) == expected
    assert (f"by --model_prediction {option}" in capsys.readouterr().out) == (option != "epsilon")
    assert look_up(str(file), None, option).zero_snr == (option == "v_zero_snr")
    with pytest.raises(UserError, match="give --model_prediction epsilon, v or v_zero_snr"):
        load_pipeline(str(file), prediction="vpred")


@pytest.mark.slow
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_a_stored_schedule_is_that_of_the_configuration_or_decides_about_zero_snr(files, tmp_path, zero, half):
    pipe = load_pipeline(str(files["v"]))
    alphas = schedule({**pipe.scheduler.config, "rescale_betas_zero_snr": zero})
    file = marked(files, tmp_path / "m.safetensors", alphas_cumprod=alphas.half() if half else alphas)
    for config in ("v", "v_zero_snr"):
        assert says(load_pipeline(str(file), config=str(files[config]))) == ("v_prediction", zero)
    if not zero:
        return
    with pytest.raises(UserError, match="its tensor alphas_cumprod marks zero terminal SNR"):
        load_pipeline(str(file), config=str(files["epsilon"]))
    other = marked(files, tmp_path / "other.safetensors", alphas_cumprod=torch.linspace(0.999, 0.001, 1000))
    with pytest.raises(UserError, match="its tensor alphas_cumprod is another noise schedule"):
        load_pipeline(str(other), config=str(files["v"]))


@pytest.mark.parametrize(
    "name",
    [
        "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min", "scaled_fp8",
        "model.diffusion_model.input_blocks.1.0.in_layers.2.scale_weight", "model.diffusion_model.out.2.weight_scale",
        "model.diffusion_model.out.2.weight.absmax", "model.diffusion_model.out.2.weight.quant_state.bitsandbytes__nf4",
        "model.diffusion_model.out.2.comfy_quant",
    ],
)  # fmt: skip
def test_edm_and_quantised_files_are_refused_by_the_tensor_that_tells(files, tmp_path, name):
    file = marked(files, tmp_path / "m.safetensors", **{name: torch.ones(1)})
    for read in (family, lambda path: load_pipeline(str(path), config=str(files["epsilon"])), lambda path: look_up(str(path))):
        with pytest.raises(UserError, match=r"EDM|Playground|quantised") as caught:
            read(file)
        assert f"(it has the tensor {name})" in str(caught.value)


def test_weights_as_whole_numbers_are_refused(files, tmp_path):
    name = "model.diffusion_model.out.2.weight"
    file = marked(files, tmp_path / "m.safetensors", **{name: torch.ones(4, 8, 3, 3, dtype=torch.int8)})
    with pytest.raises(UserError, match="is stored as I8, so it is a quantised checkpoint") as caught:
        family(file)
    assert name in str(caught.value)


@pytest.mark.slow
def test_what_an_export_is_told_of_its_base_is_what_is_loaded(files, tmp_path):
    for names, config in ((("v_pred", "ztsnr"), "epsilon"), (("v_pred",), "v_zero_snr"), ((), "v")):
        file = marked(files, tmp_path / "m.safetensors", *names)
        base, pipe = look_up(str(file), str(files[config])), load_pipeline(str(file), config=str(files[config]))
        assert (base.prediction, base.zero_snr) == says(pipe)


def test_no_marks_are_none(files):
    assert read_marks(files["plain"]) == Marks()


def test_training_takes_the_schedule_of_the_marks(files, tmp_path):
    file = marked(files, tmp_path / "m.safetensors", "v_pred", "ztsnr")
    by_mark, by_folder = (
        Backbone(str(name), device=torch.device("cpu"), config=config)
        for name, config in ((file, str(files["epsilon"])), (files["v_zero_snr"], None))
    )
    assert by_mark.process.alphas_cumprod[-1] == 0 and by_mark.process.prediction == "v_prediction"
    assert by_mark.fingerprint == by_folder.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [None, "ddim", "euler", "euler_a", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sampling_from_zero_snr_is_finite(files, tmp_path, scheduler, prediction):
    folder = shutil.copytree(files["epsilon"], tmp_path / "base")
    declare(folder, prediction_type=prediction, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    pipe = load_sampler(str(folder), scheduler=scheduler, device="cpu")
    assert len(sample(pipe, ["a circle"], [0], steps=2, guidance=2.0)) == 1  # or it would refuse what is not finite


@pytest.mark.parametrize("kind", ["PNDMScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler"])
def test_a_sampler_that_cannot_start_from_zero_snr_is_replaced_aloud(files, tmp_path, capsys, kind):
    folder = shutil.copytree(files["v_zero_snr"], tmp_path / "base")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", kind]}))
    declare(folder, _class_name=kind)
    pipe = load_pipeline(str(folder))
    assert type(pipe.scheduler).__name__ == "DDIMScheduler" and pipe.scheduler.alphas_cumprod[-1] == 0
    assert says(pipe) == ZERO and f"its {kind} cannot start from zero SNR" in capsys.readouterr().out
