"""Trains the demo model from nothing: autoencoder, denoiser, distillation; each stage goes on where it was left.

    python demo/train.py --folder DIR [--device auto] [--scale 1]
    python demo/make_bundle.py --trained DIR -o BUNDLE
    python demo/evaluate.py --bundle BUNDLE --undistilled DIR

The folder then holds checkpoints in the format of diffusers. `--scale 0.01` runs all stages to see that they work.
"""

import argparse
from pathlib import Path

import torch
from clips import Clips
from denoiser import save
from networks import make_text_encoder
from train_denoiser import distill, train_denoiser
from train_vae import train_tiny, train_vae
from transformers import CLIPTokenizer

STEPS = {"vae": 3000, "tiny": 1000, "images": 800, "clips": 3000, "lcm": 500}
CLIPS, BATCH = 4000, 4


def main() -> None:
    """Runs all stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps and clips")
    parser.add_argument("--batch", type=int, default=BATCH, help="clips in a batch")
    options = parser.parse_args()
    name = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    train(options.folder, torch.device(name), options.scale, options.batch)


def train(folder: Path, device: torch.device, scale: float = 1.0, batch: int = BATCH) -> None:
    """Trains all parts; the folder keeps checkpoints, curves and the finished parts."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = {stage: max(1, round(count * scale)) for stage, count in STEPS.items()}
    vae = train_vae(folder, device, steps["vae"])
    vae.save_pretrained(folder / "base" / "vae")
    make_text_encoder(folder / "base" / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "base" / "tokenizer")
    clips = Clips(folder, max(batch, round(CLIPS * scale)), vae, tokenizer)
    teacher = train_denoiser(folder, clips, device, images=steps["images"], steps=steps["clips"], batch=batch)
    student = distill(folder, clips, device, teacher, steps=steps["lcm"], batch=batch)
    save(student.cpu(), folder)
    train_tiny(folder, device, steps["tiny"], vae)


if __name__ == "__main__":
    main()
