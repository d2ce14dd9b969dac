"""Keys and values of prompts and images are computed once for each, and change nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from PIL import Image
from support.models import TINY, random_inputs, random_model
from wanvideo_infinitetalk.pipeline import long_video
from wanvideo_infinitetalk.pipeline.conditioning import Conditioning
from wanvideo_infinitetalk.pipeline.kept_keys import MOST, KeptKeys
from wanvideo_infinitetalk.pipeline.long_video import generate
from wanvideo_infinitetalk.pipeline.plan import GenerateConfig, plan_video
from wanvideo_infinitetalk.wanvideo.modules.model import KeysValues, WanModel
from wanvideo_infinitetalk.wanvideo.runtime.compilation import CompileSettings, compile_model

CPU = torch.device("cpu")
CONFIG = GenerateConfig(width=16, height=16, frames=5, motion_frames=1, steps=3, cfg=4.0, audio_cfg=3.0)
WINDOWS = 3


def counted(model: WanModel) -> Counter[str]:
    """How often the first block's keys are computed, and the prompt embedded."""
    calls: Counter[str] = Counter()
    for name in ("text_embedding", "blocks.0.cross_attn.k", "blocks.0.cross_attn.k_img"):
        last = name.rpartition(".")[2]
        model.get_submodule(name).register_forward_hook(lambda *given, last=last: calls.update([last]))
    return calls


def test_a_forward_with_kept_keys_is_the_same_and_computes_none() -> None:
    model, given = random_model(), random_inputs()
    plain = model(**given)
    kept = {"text_keys": KeysValues(), "image_keys": KeysValues()}
    assert torch.equal(model(**given, **kept), plain)
    calls = counted(model)
    assert torch.equal(model(**given, **kept), plain)
    assert not calls
    assert torch.equal(model(**given, text_keys=kept["text_keys"]), plain)
    assert calls == {"k_img": 1}


def latents(model: WanModel, pieces: int = 1, source: int = 1, fallback: dict[str, str] | None = None) -> torch.Tensor:
    """Of a video of three windows with `pieces` prompts and a source of so many frames."""
    rng = torch.Generator().manual_seed(4)
    total = 5 + 4 * (WINDOWS - 1)
    audio = TINY.audio
    assert audio is not None

    class Vae:
        def encode(self, video: torch.Tensor, *, tiled: bool = False) -> torch.Tensor:
            small = video[:, :1, ::4, ::8, ::8]
            return small.expand(-1, 16, -1, -1, -1) * torch.linspace(0.5, 1.5, 16)[:, None, None, None]

        def decode(self, latents: torch.Tensor, *, tiled: bool = False) -> torch.Tensor:
            frames = torch.cat([latents[:, :3, :1], latents[:, :3, 1:].repeat_interleave(4, 2)], 2).clamp(-1, 1)
            return frames.repeat_interleave(8, 3).repeat_interleave(8, 4)

    class Clip:
        def encode(self, image: torch.Tensor) -> torch.Tensor:
            return image.mean() + torch.linspace(-1, 1, 7 * TINY.clip_dim).reshape(1, 7, TINY.clip_dim)

    context = torch.randn(pieces + 1, 5, TINY.text_dim, generator=rng)
    speech = torch.randn(total, audio.blocks, audio.channels, generator=rng)
    frames = [Image.new("RGB", (16, 16), (9 * i, 100, 200 - 9 * i)) for i in range(source)]
    plan = plan_video(CONFIG, (16, 16), [total])
    given = Conditioning(list(context[1:]), context[0], [speech], frames)
    return torch.stack([w.latents for w in generate(model, Vae(), Clip(), given, plan, fallback=fallback or {})])


@pytest.mark.parametrize(
    ("pieces", "source", "expected"),
    [
        # A prompt and its negative: each is computed in its first forward, and in its second, which keeps it.
        (1, 1, {"text_embedding": 4, "k": 4, "k_img": 2}),
        (WINDOWS, 1, {"text_embedding": 2 * (WINDOWS + 1), "k": 2 * (WINDOWS + 1), "k_img": 2}),
        (1, 9, {"text_embedding": 4, "k": 4, "k_img": 2 * WINDOWS}),
    ],
    ids=["one prompt and image", "a prompt per window", "a source frame per window"],
)
def test_keys_are_computed_anew_where_a_prompt_or_an_image_changes(pieces, source, expected, monkeypatch) -> None:
    model = random_model()
    calls = counted(model)
    ours = latents(model, pieces, source)
    assert calls == expected
    monkeypatch.setattr(long_video, "KeptKeys", lambda model, device: KeptKeys(None, device))
    assert torch.equal(ours, latents(random_model(), pieces, source))


def test_what_is_kept_is_known_by_its_content_and_few_are_kept() -> None:
    kept = KeptKeys(random_model(), CPU)
    context = torch.randn(5, TINY.text_dim)
    assert kept.of_forward(context, None) == {}
    keys = kept.of_forward(context.clone(), None)["text_keys"]
    assert kept.of_forward(context.clone(), None)["text_keys"] is keys
    for _ in range(MOST):
        assert kept.of_forward(torch.randn(5, TINY.text_dim), None) == {}
    assert len(kept._kept) == MOST
    assert kept.of_forward(context, None) == {}  # it made room for the others


@pytest.mark.parametrize(("free", "allowed"), [(0, False), (2**40, True)])
def test_keys_are_kept_where_memory_is_left(free: int, allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**40))
    for name in ("memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 2**30)
    kept = KeptKeys(random_model(), torch.device("cuda"))
    context = torch.randn(5, TINY.text_dim)
    assert kept.of_forward(context, None) == {}
    assert bool(kept.of_forward(context, None)) == allowed


def test_compiled_models_and_others_keep_none() -> None:
    model: Any = random_model()
    compile_model(model, CompileSettings(backend="eager"))
    for given in (model, object()):
        kept = KeptKeys(given, CPU)
        assert [kept.of_forward(torch.zeros(5, TINY.text_dim), None) for _ in range(3)] == [{}] * 3


def test_a_window_that_starts_over_computes_them_anew() -> None:
    """What was not finite may be among them."""
    model = random_model()
    broken = iter([False, False, True])  # the negative prompt's, when they are kept
    model.get_submodule("blocks.0.cross_attn.k").register_forward_hook(
        lambda module, given, out: out * torch.nan if next(broken, False) else None
    )
    assert bool(torch.isfinite(latents(model, fallback={"sdpa": "eager"})).all())
