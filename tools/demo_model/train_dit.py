"""Train the demo's transformer and its audio layers: flow matching on clips of drawn, speaking faces.

`python -m wanvideo_infinitetalk.tools.demo_model.train_dit OUT_FOLDER --vae VAE_FOLDER --sounds SOUNDS.npz`

The conditions are those of the generation loop: the image's latents and their mask, the clean latents of the motion
frames at the front (with a little noise, as the loop's own are not perfect), speech that is left out one time in ten,
two people with masks in every third batch. The loss is the squared error of the velocity, heavier on mouths.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from ...benchmarks.lipsync import correlation, openings
from ...cli import tiny_models as tiny
from ...pipeline.schedulers import make_scheduler
from ...wanvideo.encoders.clip import ClipVision
from ...wanvideo.encoders.vae import WanVAE
from ...wanvideo.modules.model import WanModel
from .bank import Bank, Clips, Sounds, join, renew
from .dit import CONFIG, new_model, velocity
from .train_vae import load_whitened
from .training import Schedule, Trainer, training_parser

logger = logging.getLogger(__name__)

SHIFT = 3.0
"""Of the noise levels, in training and in the demo's sampling."""

BUCKETS = ((1, 21), (2, 21), (1, 21), (1, 9), (2, 21), (1, 21))
"""(people, latent frames) of one batch after the other."""


class Loss(nn.Module):
    """One batch -> the weighted squared error of the velocity."""

    def __init__(self, model: WanModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        image: Tensor,
        audio: Tensor,
        front: Tensor,
        weight: Tensor,
        masks: Tensor,
        text: Tensor,
    ) -> Tensor:
        batch, _, frames = x.shape[:3]
        noise = torch.randn_like(x)
        normal = torch.randn(batch, device=x.device)
        level = torch.sigmoid(normal)  # logit-normal (arXiv 2403.03206, section 3.1)
        sigma = (SHIFT * level / (1 + (SHIFT - 1) * level)).view(-1, 1, 1, 1, 1)
        given = (torch.arange(frames, device=x.device) < front[:, None])[:, None, :, None, None]  # [B, 1, T, 1, 1]
        blemish = 0.12 * torch.rand(batch, 1, 1, 1, 1, device=x.device) * (front > 1).view(-1, 1, 1, 1, 1)
        seen = torch.where(given, x + blemish * torch.randn_like(x), (1 - sigma) * x + sigma * noise)
        mask = torch.zeros(batch, 4, *x.shape[2:], device=x.device)
        mask[:, :, 0] = 1
        drop = torch.rand(batch, 1, 1, 1, 1, 1, device=x.device) < 0.1
        audio = audio.masked_fill(drop, 0)
        routed = masks if audio.shape[1] > 1 else None
        v = velocity(self.model, seen, 1000 * sigma.flatten(), text, image, torch.cat([mask, y], 1), audio, routed)
        error = (v.float() - (noise - x)).square() * weight[:, None, None] * ~given
        return error.sum() / ((weight[:, None, None] * ~given).sum() * x.shape[1])


def load_clip(device: torch.device | str) -> ClipVision:
    """The demo's CLIP: random, narrow, frozen."""
    return ClipVision.from_state_dict(tiny.clip_weights(CONFIG.clip_dim), device=device)


class Data:
    """Batches of one number of people from clips that are renewed one after the other."""

    def __init__(self, bank: Bank, sounds: Sounds, count: int, chunk: int) -> None:
        self.bank, self.chunk = bank, chunk
        self.features = sounds.features.to(bank.device)
        self.clips = join([bank.make(chunk) for _ in range(count // chunk)])
        self.at = 0

    def renew(self) -> None:
        renew(self.clips, self.bank.make(self.chunk), self.at)
        self.at = (self.at + self.chunk) % (len(self.clips.x) // self.chunk * self.chunk)

    def batch(self, size: int, frames: int) -> list[Tensor]:
        """The inputs of random clips."""
        pick = torch.randint(len(self.clips.x), (size,), device=self.clips.x.device)
        return self.inputs(Clips(*(tensor[pick] for tensor in self.clips.fields())), frames)

    def inputs(self, clips: Clips, frames: int) -> list[Tensor]:
        """x, y, image, audio, front, weight, masks, as `Loss` takes them, of the first `frames` latent frames."""
        audio = self.features[clips.rows[:, :, : 4 * frames - 3]].float()  # [B, people, rows, 5, layers, channels]
        front = clips.front.clamp(max=3) if frames < 12 else clips.front
        x, y = (tensor[:, :, :frames].float() for tensor in (clips.x, clips.y))
        return [x, y, clips.image.float(), audio, front, clips.weight, clips.masks]


@torch.no_grad()
def sample(model: WanModel, given: list[Tensor], text: Tensor, steps: int = 8, audio_scale: float = 1.0) -> Tensor:
    """Clean latents of a batch, by Euler steps."""
    x, y, image, audio, front, _, masks = given
    plan = make_scheduler("euler", steps, SHIFT)
    mask = torch.zeros(x.shape[0], 4, *x.shape[2:], device=x.device)
    mask[:, :, 0] = 1
    known = (torch.arange(x.shape[2], device=x.device) < front[:, None])[:, None, :, None, None]
    z = torch.randn_like(x)
    routed = masks if audio.shape[1] > 1 else None
    for step in range(steps):
        z = torch.where(known, x, z)
        t = plan.timesteps[step].to(x.device).expand(x.shape[0])
        condition = torch.cat([mask, y], 1)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            v = velocity(model, z, t, text, image, condition, audio, routed).float()
            if audio_scale != 1:
                silent = velocity(model, z, t, text, image, condition, torch.zeros_like(audio), routed).float()
                v = silent + audio_scale * (v - silent)
        z = plan.step(v, step, z)
    return torch.where(known, x, z)


@torch.no_grad()
def check(model: WanModel, vae: WanVAE, data: Data, text: Tensor, size: int = 16) -> str:
    """Sample from fresh clips and read the mouths."""
    torch.manual_seed(1)
    clips = data.bank.make(size)
    given = data.inputs(clips, 21)
    target = clips.mouth
    parts = []
    for scale in (1.0, 2.0):
        z = sample(model, given, text, audio_scale=scale)
        video = torch.cat([vae.decode(part) for part in z.split(4)])
        read = openings(video, clips.boxes)
        start = 13
        own = correlation(read[..., start:], target[..., start:])
        moving = target[..., start:].std(-1) > 0.1
        parts.append(f"audio x{scale:g}: correlation {own[moving].mean():.3f} (least {own[moving].min():.2f})")
        if read.shape[1] == 2:
            other = correlation(read[..., start:], target.flip(1)[..., start:])
            parts.append(f"with the other's {other[moving].mean():.3f}")
        if scale == 1:
            real = torch.cat([vae.decode(part) for part in clips.x.float().split(4)])
            bound = correlation(openings(real, clips.boxes)[..., start:], target[..., start:])
            mse = (video[:, :, start:] - real[:, :, start:]).square().mean() / 4
            parts.append(f"decoded truth {bound[moving].mean():.3f}, PSNR to it {-10 * torch.log10(mse):.1f} dB")
    return "; ".join(parts)


def main() -> None:
    parser = training_parser(__doc__, lr=1e-3)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--vae-dim", type=int, default=8)
    parser.add_argument("--sounds", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--clips", type=int, default=3072)
    parser.add_argument("--average", type=float, default=0.999)
    parser.add_argument("--resume", type=Path, default=None, help="folder of a checkpoint")
    parser.add_argument("--check-every", type=int, default=2000)
    parser.add_argument("--renew-every", type=int, default=24)
    train(parser.parse_args())


def prompts(device: torch.device | str) -> list[Tensor]:
    """Random embeddings like those of the random text encoder: the prompt is not to matter."""
    from ...wanvideo.encoders.text import TextEncoder

    encoder = TextEncoder.from_state_dict(tiny.text_encoder_weights())
    texts = [
        "",
        "a person speaks",
        "A woman speaks to the camera in the evening light.",
        "Two people talk.",
        "bad, blurry",
    ]
    found = [part.float() for text in texts for part in encoder.encode([text])]
    padded = [torch.cat([part, part.new_zeros(CONFIG.text_len - len(part), part.shape[1])]) for part in found]
    return [part.to(device) for part in padded]


def train(given: argparse.Namespace) -> None:
    began = time.monotonic()
    torch.manual_seed(given.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    device = torch.device(given.device)
    vae = load_whitened(given.vae, given.vae_dim, device)
    clip = load_clip(device)
    sounds = Sounds.load(given.sounds)
    held = max(1, len(sounds.ends) // 12)
    known = sounds.part(0, len(sounds.ends) - held)
    unknown = sounds.part(len(sounds.ends) - held, len(sounds.ends))
    texts = prompts(device)

    model = new_model().to(device)
    model._rotations.keep = 8  # captured steps read the tables again: none may go
    trainer = Trainer(model, Loss(model), average=given.average, capture=not given.no_capture)
    if given.resume is not None:
        trainer.load(given.resume)
    chunk = 32 if given.clips >= 64 else max(2, given.clips // 4)
    data = {
        people: Data(
            Bank(vae, clip, known, people, 1000 * given.seed + people), known, given.clips // people, chunk // people
        )
        for people in (1, 2)
    }
    logger.info("%.1f min: %d clips", (time.monotonic() - began) / 60, sum(len(d.clips.x) for d in data.values()))
    fresh = {people: Data(Bank(vae, clip, unknown, people, 77 + people), unknown, 4, 4) for people in (1, 2)}
    judged = new_model().to(device).requires_grad_(False)
    plan = Schedule(given.lr, given.steps, given.minutes, given.finish)
    step, total = 0, 0.0
    losses = torch.zeros((), device=device)
    while (progress := plan.progress(step, began)) < 1:
        people, frames = BUCKETS[step % len(BUCKETS)]
        size = given.batch if people == 1 else max(1, given.batch * 3 // 8)
        batch = data[people].batch(size, frames)
        text = texts[step % len(texts)]
        losses += trainer.step(plan.rate(step, progress), *batch, text)
        step += 1
        if step % given.renew_every == 0:
            data[1 + (step // given.renew_every) % 2].renew()
        if step % given.check_every == 0:
            total = float(losses) / given.check_every
            losses.zero_()
            judged.load_state_dict(trainer.averaged())
            logger.info("%.1f min, step %d: loss %.4f", (time.monotonic() - began) / 60, step, total)
            for people in (1, 2):
                logger.info("  %d: %s", people, check(judged, vae, fresh[people], texts[0]))
    judged.load_state_dict(trainer.averaged())
    for people in (1, 2):
        logger.info("at the end, %d: %s", people, check(judged, vae, fresh[people], texts[0], 32))
    trainer.save(given.out)
    logger.info("%d steps, %.1f min", step, (time.monotonic() - began) / 60)


if __name__ == "__main__":
    main()
