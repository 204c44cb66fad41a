"""Trains the small Wan and the small teacher that the demo ships, on scenes of known motion.

    python tests/benchmarks/pretrain.py --work DIR
    torchrun --nproc-per-node 3 tests/benchmarks/pretrain.py --work DIR --compile

A part that is complete in the folder is not trained again, and one that was interrupted goes on. Equal commands give
equal weights on one machine. The shipped weights took about an hour of processor time: the teacher and the decoder were
trained by one process, the whole autoencoder by two (its first 130 and last 80 steps by one), the transformer by three.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import UniPCMultistepScheduler, WanPipeline
from small_video import transformer as flow
from small_video import vae as video
from small_video.loop import rank
from small_video.teacher import train_teacher
from small_video.text import new_tokenizer

from crepa_cli.demo.scenes import all_scenes

WEIGHTS = Path(__file__).parents[2] / "crepa_cli/demo/weights"


@dataclass(frozen=True)
class Lengths:
    """Steps of the parts, and the clips that the transformer learns from."""

    teacher: int = 1200
    vae: int = 540
    decoder: int = 500
    transformer: int = 6000
    scenes: int = len(all_scenes()) - flow.HELD_OUT
    clips_of_each: int = 6


QUICK = Lengths(teacher=2, vae=2, decoder=2, transformer=2, scenes=2, clips_of_each=2)


def pretrain(work: Path, output: Path, lengths: Lengths, *, compiled: bool) -> None:
    """Train all parts and write them in the published layouts, as `wan` and `dinov2` in a folder.

    Args:
        work: where the states of the trainings are kept.
        output: for the weights.
        lengths: of the trainings.
        compiled: compile the models, which pays off in long trainings.
    """
    work.mkdir(parents=True, exist_ok=True)
    teacher = train_teacher(work, steps=lengths.teacher)
    vae = video.train_vae(work, steps=lengths.vae, decoder_steps=lengths.decoder, compiled=compiled)
    print(f"vae: {video.decibels(vae, video.batch_of(-5, 8)[0]):.1f} dB on new clips", flush=True)
    scenes = all_scenes()[flow.HELD_OUT :][: lengths.scenes]
    transformer, text_encoder = flow.train_transformer(
        vae, work, scenes, steps=lengths.transformer, seeds=lengths.clips_of_each, compiled=compiled
    )
    if rank() == 0:
        # The shift is that of the published Wan 2.1 at 480p, and of the training.
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow.SHIFT
        )
        tokenizer = new_tokenizer()
        # The text encoder stays in float32: a pipeline that names no dtype runs it in the one that is stored.
        WanPipeline(tokenizer, text_encoder, vae.half(), scheduler, transformer.half()).save_pretrained(output / "wan")
        teacher.half().save_pretrained(output / "dinov2")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the states of the trainings")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="folder for the weights")
    parser.add_argument("--quick", action="store_true", help="take two steps of everything; the weights are no good")
    parser.add_argument("--compile", action="store_true", help="compile the models first, which takes minutes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    lengths = QUICK if arguments.quick else Lengths()
    pretrain(arguments.work, arguments.output, lengths, compiled=arguments.compile)


if __name__ == "__main__":
    main()
