"""Trains the demo model from scratch, stage by stage. An interrupted stage continues from its last checkpoint.

    python demo/train.py --folder DIR [--device auto] [--scale 1]
    python demo/train.py --folder DIR --refine demo/trained        # only the last two stages, from checkpoints
    python demo/make_bundle.py --trained DIR -o BUNDLE
    python demo/evaluate.py --bundle BUNDLE --undistilled DIR

The folder then holds checkpoints in diffusers format. `--scale 0.01` runs all stages to check that they work.
"""

import argparse
import shutil
from pathlib import Path

import torch
from clips import Clips
from denoiser import Denoiser, load, save
from diffusers import AutoencoderKL
from networks import make_text_encoder
from refine import refine, words
from safetensors.torch import load_file, save_file
from train_denoiser import distill, train_denoiser
from train_vae import train_tiny, train_vae
from transformers import CLIPTokenizer

STEPS = {"vae": 3000, "tiny": 1000, "images": 800, "clips": 3000, "lcm": 500, "words": 500, "refine": 550}
CLIPS, BATCH = 6000, 4
PARTS = ("base", "motion_adapter", "scribble", "rgb", "tiny_decoder")
"""Folders of checkpoints that a training writes."""


def main() -> None:
    """Runs all stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of steps and clips")
    parser.add_argument("--batch", type=int, default=BATCH, help="clips in a batch")
    parser.add_argument("--refine", type=Path, help="the folder of a finished training, to repeat its last two stages")
    options = parser.parse_args()
    name = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    if options.refine:
        refine_only(options.folder, options.refine, torch.device(name), options.scale, options.batch)
    else:
        train(options.folder, torch.device(name), options.scale, options.batch)


def train(folder: Path, device: torch.device, scale: float = 1.0, batch: int = BATCH) -> None:
    """Trains all parts. The folder gets checkpoints, curves and the finished parts."""
    if (folder / "words.pt").exists() and not (folder / "vae.pt").exists():
        raise SystemExit(f"{folder}: holds the last stages of another training; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    steps = steps_of(scale)
    vae = train_vae(folder, device, steps["vae"])
    vae.save_pretrained(folder / "base" / "vae")
    make_text_encoder(folder / "base" / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "base" / "tokenizer")
    clips = make_clips(folder, vae, tokenizer, scale, batch)
    teacher = train_denoiser(folder, clips, device, images=steps["images"], steps=steps["clips"], batch=batch)
    student = distill(folder, clips, device, teacher, steps=steps["lcm"], batch=batch)
    save(last_stages(folder, clips, device, student, steps, batch), folder)
    train_tiny(folder, device, steps["tiny"], vae)
    halve(folder)


def refine_only(folder: Path, start: Path, device: torch.device, scale: float, batch: int) -> None:
    """Runs the last two stages again, from the checkpoints of a training; copies the parts that they do not change."""
    if (folder / "vae.pt").exists():
        raise SystemExit(f"{folder}: holds a training from scratch, with another autoencoder; name another folder")
    for part in PARTS:
        shutil.copytree(start / part, folder / part, dirs_exist_ok=True)
    vae = AutoencoderKL.from_pretrained(start / "base" / "vae", torch_dtype=torch.float32).to(device)
    tokenizer = CLIPTokenizer.from_pretrained(start / "base" / "tokenizer")
    clips = make_clips(folder, vae, tokenizer, scale, batch)
    save(last_stages(folder, clips, device, load(start, folder), steps_of(scale), batch), folder)
    halve(folder)


def last_stages(
    folder: Path, clips: Clips, device: torch.device, student: Denoiser, steps: dict[str, int], batch: int
) -> Denoiser:
    """Runs the stages after the distillation; returns the model on the CPU."""
    learnt = words(folder, clips, device, student, steps=steps["words"], batch=batch)
    return refine(folder, clips, device, learnt, student, steps=steps["refine"], batch=batch).cpu()


def steps_of(scale: float) -> dict[str, int]:
    """Returns the number of steps of each stage at a scale."""
    return {stage: max(1, round(count * scale)) for stage, count in STEPS.items()}


def halve(folder: Path) -> None:
    """Converts the finished parts to fp16, like published checkpoints."""
    for path in [path for part in PARTS for path in (folder / part).rglob("*.safetensors")]:
        weights = {
            name: weight.half() if weight.is_floating_point() else weight for name, weight in load_file(path).items()
        }
        save_file(weights, path, metadata={"format": "pt"})


def make_clips(folder: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, scale: float, batch: int) -> Clips:
    """Returns the clips of a training at a scale."""
    return Clips(folder, max(batch, round(CLIPS * scale)), vae, tokenizer)


if __name__ == "__main__":
    main()
