"""The training of the demo model: its computations; with --slow, all stages for a few steps."""

import contextlib
import json
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from PIL import Image
from safetensors.torch import load_file
from sparsectrl_lcm.export.plan import read_parts
from transformers import CLIPTokenizer

DEMO = Path(__file__).parents[2] / "demo"
sys.path.append(str(DEMO))

import clips  # noqa: E402
import curves  # noqa: E402
import make_bundle  # noqa: E402
import refine  # noqa: E402
import train  # noqa: E402
import train_vae  # noqa: E402
import training  # noqa: E402
from clips import Batch, Clips  # noqa: E402
from denoiser import Denoiser, control  # noqa: E402
from networks import KINDS, LATENT_SIZE, make_vae  # noqa: E402
from training import read_curve  # noqa: E402
from world import FRAMES, SIZE, scene  # noqa: E402


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train.train(folder, torch.device("cpu"), scale=0.001, batch=1)
    return folder


@pytest.fixture(scope="module")
def few_clips(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Clips:
    tokenizer = CLIPTokenizer.from_pretrained(trained / "base" / "tokenizer")
    return Clips(tmp_path_factory.mktemp("clips"), 12, make_vae().eval().requires_grad_(False), tokenizer)


@pytest.mark.slow
def test_all_stages_leave_checkpoints_that_fit_each_other(trained: Path) -> None:
    parts = read_parts(make_bundle.export_options(trained))
    assert (parts.sizes.width, parts.sizes.height, parts.sizes.frames) == (SIZE, SIZE, FRAMES)
    assert parts.scheduler.prediction_type == "v_prediction"
    for stage in train.STEPS:
        assert (trained / f"{stage}.pt").exists()


@pytest.mark.slow
def test_the_last_stages_go_on_from_checkpoints(trained: Path, tmp_path: Path) -> None:
    train.refine_only(tmp_path, trained, torch.device("cpu"), scale=0.001, batch=1)
    parts = read_parts(make_bundle.export_options(tmp_path))
    assert (parts.sizes.width, parts.sizes.height, parts.sizes.frames) == (SIZE, SIZE, FRAMES)
    unets = [load_file(folder / "base/unet/diffusion_pytorch_model.safetensors") for folder in (trained, tmp_path)]
    assert any(not torch.equal(unets[1][name], value) for name, value in unets[0].items())


def test_refinement_trains_the_steps_of_the_runtime() -> None:
    scheduler = LCMScheduler.from_config(dict(train_vae_schedule()), beta_schedule="linear")
    scheduler.set_timesteps(refine.STEPS)
    assert refine.schedule() == scheduler.timesteps.tolist()


def test_outlines_count_for_the_latents_around_them() -> None:
    scribbles = torch.zeros(1, 2, SIZE, SIZE)
    scribbles[0, 1, 20, 41] = 1.0
    near = refine.near_outlines(scribbles, LATENT_SIZE)
    expected = torch.zeros(1, 1, 2, LATENT_SIZE, LATENT_SIZE)
    expected[0, 0, 1, 1:4, 4:7] = 1.0
    assert torch.equal(near, expected)


def test_the_checkpoints_that_ship_fit_each_other() -> None:
    parts = read_parts(make_bundle.export_options(make_bundle.TRAINED))
    assert (parts.sizes.width, parts.sizes.height, parts.sizes.frames) == (SIZE, SIZE, FRAMES)


@pytest.mark.slow
def test_a_training_that_is_over_does_nothing(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "backward", None)
    written = {path: path.stat().st_mtime_ns for path in trained.glob("*.pt")}
    train.train(trained, torch.device("cpu"), scale=0.001, batch=1)
    assert {path: path.stat().st_mtime_ns for path in trained.glob("*.pt")} == written


@pytest.mark.slow
def test_two_trainings_do_not_share_a_folder(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds a training from scratch"):
        train.refine_only(trained, make_bundle.TRAINED, torch.device("cpu"), scale=0.001, batch=1)
    (tmp_path / "words.pt").touch()
    with pytest.raises(SystemExit, match="holds the last stages of another training"):
        train.train(tmp_path, torch.device("cpu"), scale=0.001, batch=1)


def test_matrices_go_to_muon_and_what_is_frozen_to_none() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    module[2].requires_grad_(False)
    adamw, muon = training.make_optimizers(module, 1e-3)
    assert [id(one) for one in muon.param_groups[0]["params"]] == [id(module[1].weight)]
    assert [id(one) for one in adamw.param_groups[0]["params"]] == [id(module[0].weight), id(module[1].bias)]


def test_the_curve_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LOG_STEPS", 3)
    train_vae.train_vae(tmp_path, torch.device("cpu"), 3)
    (row,) = read_curve(tmp_path, "vae")
    assert row["step"] == 3 and row["loss"] > 0 and row["psnr"] > 0
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["scaling_factor"] == 1


def test_an_interrupted_stage_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LOG_STEPS", 4)
    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)
    ends, curves_of = [], []
    for name, stop in (("whole", None), ("interrupted", 6)):
        torch.manual_seed(4)
        module = torch.nn.Linear(3, 1)
        average = training.averaged(module)
        for last in (stop, None) if stop else (None,):

            def loss(step: int, module: torch.nn.Module = module, last: int | None = last):
                if step == last:
                    raise KeyboardInterrupt
                value = (module(torch.randn(8, 3, generator=training.generator(step))) - 1).square().mean()
                return value, {"same": 2.0}

            (tmp_path / name).mkdir(exist_ok=True)
            stage = training.Stage("stage", 12, 1e-2, warmup=2)
            with contextlib.suppress(KeyboardInterrupt):
                training.fit(stage, tmp_path / name, module, average, loss)
        ends.append([*module.parameters(), *average.parameters()])
        curves_of.append(list(read_curve(tmp_path / name, "stage")))
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))
    assert [row["step"] for row in curves_of[1]] == [4, 8, 12]
    assert {row["same"] for rows in curves_of for row in rows} == {2.0}
    assert curves_of[0][-1]["loss"] == curves_of[1][-1]["loss"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shown", [(True, True, True), (False, True, False)])
def test_residuals_are_those_of_diffusers(kind: str, shown: tuple[bool, ...], tmp_path: Path) -> None:
    torch.manual_seed(1)
    denoiser = Denoiser(tmp_path)
    for parameter in denoiser.parameters():  # zero-initialised convolutions would hide errors
        torch.nn.init.normal_(parameter, std=0.1)
    model = denoiser.controlnets[kind]
    places, wanted = torch.tensor([[0, 2, 3]]), torch.tensor([shown])
    side, channels = (SIZE, 3) if kind == "scribble" else (LATENT_SIZE, 4)
    pictures = torch.rand(1, 3, channels, side, side)
    prompt = torch.randn(1, 77, denoiser.text_encoder.config.hidden_size).repeat_interleave(4, 0)
    batch = Batch(torch.zeros(0), torch.zeros(0), kind, pictures, places, wanted)
    conditioning, mask = torch.zeros(1, channels, 4, side, side), torch.zeros(1, 1, 4, side, side)
    for slot, place in enumerate(places[0]):
        if shown[slot]:
            conditioning[0, :, place], mask[0, :, place] = pictures[0, slot], 1
    sample = torch.zeros(1, 4, 4, LATENT_SIZE, LATENT_SIZE)
    with torch.no_grad():
        ours = control(model, torch.tensor([500]), prompt, batch, 4)
        down, middle = model(
            sample, torch.tensor([500]), prompt, conditioning, conditioning_mask=mask, return_dict=False
        )
    for mine, theirs in zip(ours, [*down, middle], strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4 * theirs.abs().max())


@pytest.mark.parametrize("count", [1, refine.FEW, 4, FRAMES])
def test_frames_of_a_clip_are_in_order_and_have_their_keyframes(count: int) -> None:
    for seed in range(20):
        shown, places = clips._frames(np.random.default_rng(seed), count)
        assert len(shown) == count and (np.diff(shown) > 0).all() and 0 <= shown[0] <= shown[-1] < FRAMES
        assert len(places) == min(count, 3) and (np.diff(places) > 0).all() and places[-1] < count
    assert count != FRAMES or shown.tolist() == list(range(FRAMES))


def test_each_motion_has_its_share_of_the_clips() -> None:
    seeds = list(clips._scenes(50))
    motions = [scene(seed).motion for seed in seeds]
    assert len(set(seeds)) == 50
    assert all(abs(motions.count(motion) - 50 * share) <= 2.5 for motion, share in clips.SHARES.items())


@pytest.mark.slow
def test_clips_of_some_motions_are_chosen(few_clips: Clips) -> None:
    motions = [scene(seed).motion for seed in clips._scenes(12)]
    for wanted, found in ((refine.HARD, set(refine.HARD)), (None, set(motions))):
        rows = few_clips.batch(1, 128, "scribble", refine.FEW, wanted).rows
        assert rows is not None and {motions[row] for row in rows} == found
    with pytest.raises(ValueError, match="no clip has a motion of"):
        few_clips.batch(1, 1, "scribble", refine.FEW, ("rests",))


@pytest.mark.slow
def test_the_last_stages_see_all_kinds_and_leave_what_they_begin_with(
    few_clips: Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LOG_STEPS", 6)
    assert set(refine.KINDS) == {"scribble", "rgb", None}
    monkeypatch.setattr(refine, "KINDS", ("scribble", "rgb", None))  # each with few of a clip's frames and with all
    student = Denoiser(tmp_path / "student")
    before = deepcopy(student.state_dict())
    learnt = refine.words(tmp_path, few_clips, few_clips.device, student, steps=2, batch=1)
    between = deepcopy(learnt.state_dict())
    refined = refine.refine(tmp_path, few_clips, few_clips.device, learnt, student, steps=6, batch=1)
    for model, weights in ((student, before), (learnt, between)):
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not torch.equal(refined.unet.conv_in.weight, learnt.unet.conv_in.weight)
    (row,) = read_curve(tmp_path, "refine")
    assert row["scribble"] > 0 and row["rgb"] > 0 and row["text"] > 0


def test_motion_modules_know_which_frames_they_are_shown(tmp_path: Path) -> None:
    denoiser = Denoiser(tmp_path)
    modules = [module for module in denoiser.modules() if isinstance(module, SinusoidalPositionalEmbedding)]
    states, frames = torch.randn(2, 3, modules[0].pe.shape[-1]), torch.tensor([0, 8, 15])
    whole = modules[0](torch.zeros(1, FRAMES, states.shape[-1]))
    names = list(denoiser.state_dict())
    with denoiser.showing(frames):
        shown = modules[0](states)
    assert torch.equal(shown, states + whole[:, frames])
    assert torch.equal(modules[0](states), states + whole[:, :3])
    assert list(denoiser.state_dict()) == names


def test_the_distilled_model_meets_the_clip_as_the_sampler_does(tmp_path: Path) -> None:
    """The predicted clip is what diffusers' LCM scheduler computes in its last step."""
    torch.manual_seed(2)
    denoiser = Denoiser(tmp_path).eval()
    scheduler = LCMScheduler.from_config(dict(train_vae_schedule()), beta_schedule="linear")
    scheduler.set_timesteps(4)
    timestep = scheduler.timesteps[-1]
    latents = torch.randn(1, 4, 2, LATENT_SIZE, LATENT_SIZE)
    batch = Batch(latents, torch.zeros(1, 77, dtype=torch.int64), None, latents, latents, latents)
    with torch.no_grad():
        predicted = denoiser(latents, timestep[None], batch)
        original = denoiser.original(latents, timestep[None], batch)
        scheduler._step_index = 3
        denoised = scheduler.step(predicted, timestep, latents).denoised
    assert torch.allclose(original, denoised, atol=1e-3)


def train_vae_schedule() -> dict[str, object]:
    from networks import make_schedule

    return dict(make_schedule().config)


def test_latents_are_whitened_and_pictures_stay(tmp_path: Path) -> None:
    torch.manual_seed(3)
    vae = make_vae().eval().requires_grad_(False)
    images = torch.rand(16, 3, 64, 64) * 2 - 1
    before = vae.decode(vae.encode(images).latent_dist.mean).sample
    train_vae.whiten(vae, images)
    latents = vae.encode(images).latent_dist.mean
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=1e-2)
    assert torch.allclose(vae.decode(latents).sample, before, atol=1e-3)


def test_curves_are_drawn(tmp_path: Path) -> None:
    rows = [{"step": 25, "seconds": 1.0, "loss": 0.5, "scribble": 0.4}, {"step": 50, "seconds": 2.0, "loss": 0.3}]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves.draw(tmp_path, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size[0] > picture.size[1] > 100
    with pytest.raises(SystemExit, match="no curves"):
        curves.draw(tmp_path / "nowhere", tmp_path / "none.png")
