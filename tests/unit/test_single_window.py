"""One window: schedules of guidance, condition channels, denoising."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from wanvideo_infinitetalk.pipeline.attention_policy import SAFER
from wanvideo_infinitetalk.pipeline.conditioning import Keyframes, WindowInputs, keyframe_condition
from wanvideo_infinitetalk.pipeline.guidance import Pass, cfg_schedule
from wanvideo_infinitetalk.pipeline.nonfinite import AttentionPolicy, FallbackModes
from wanvideo_infinitetalk.pipeline.plan import plan_schedule
from wanvideo_infinitetalk.pipeline.sampling import ModelInputs, Overwrite, denoise
from wanvideo_infinitetalk.wanvideo.errors import InfiniteTalkError, InputError

HEIGHT, WIDTH, FRAMES = 16, 32, 9


class LinearVae:
    """Latents are means of 8 x 8 pixels of every fourth frame, in all channels."""

    def encode(self, video: Tensor, *, tiled: bool = False) -> Tensor:
        self.seen = video
        frames = torch.cat([video[:, :, :1], video[:, :, 4::4]], dim=2)
        small = torch.nn.functional.avg_pool3d(frames.mean(1, keepdim=True), (1, 8, 8))
        return small.expand(-1, 16, -1, -1, -1)


# --- guidance schedules


def test_schedules_go_from_start_to_end() -> None:
    assert cfg_schedule(5, 5.0, 1.0, "linear") == [5.0, 4.0, 3.0, 2.0, 1.0]
    slow_first = cfg_schedule(5, 1.0, 5.0, "ease_in")
    slow_last = cfg_schedule(5, 1.0, 5.0, "ease_out")
    assert slow_first == [1.0, 1.25, 2.0, 3.25, 5.0]
    assert slow_last == [1.0, 2.75, 4.0, 4.75, 5.0]


def test_outside_of_its_part_there_is_no_guidance() -> None:
    assert cfg_schedule(10, 6.0, 4.0, "linear", 0.2, 0.5) == [1, 1, 6.0, 5.0, 4.0, 1, 1, 1, 1, 1]
    assert cfg_schedule(10, 6.0, 4.0, "linear", 0.99, 1.0) == [1.0] * 9 + [6.0]


@pytest.mark.parametrize(
    ("arguments", "words"), [(("cubic",), "choose one of linear"), (("linear", 0.6, 0.4), "start below end")]
)
def test_schedules_that_cannot_be(arguments: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        cfg_schedule(4, 5.0, 1.0, *arguments)


# --- condition channels


def image(value: float, count: int = 1) -> Tensor:
    return torch.full((count, 3, HEIGHT, WIDTH), value)


def test_a_start_image_marks_the_first_latent_frame() -> None:
    y = keyframe_condition(LinearVae(), Keyframes(start=image(0.5)), FRAMES, HEIGHT, WIDTH)
    assert y.shape == (1, 20, 3, HEIGHT // 8, WIDTH // 8)
    mask, latents = y[0, :4], y[0, 4:]
    assert (mask[:, 0] == 1).all()
    assert (mask[:, 1:] == 0).all()
    assert (latents[:, 0] == 0.5).all()
    assert (latents[:, 1:] == 0).all()


def test_an_end_image_marks_the_last_frame_of_its_group() -> None:
    keys = Keyframes(start=image(0.5), end=image(-1.0), end_strength=0.5)
    y = keyframe_condition(LinearVae(), keys, FRAMES, HEIGHT, WIDTH)
    mask = y[0, :4, :, 0, 0]  # [frame of the group, latent frame]
    assert mask.tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 1]]
    assert (y[0, 4:, 2] == -0.5).all()


def test_masks_of_ones_own_and_filled_frames() -> None:
    given = torch.full((FRAMES,), 0.4)
    given[5:] = 0.6
    vae = LinearVae()
    keys = Keyframes(start=image(0.25), empty=image(0.75, 2), given=given)
    y = keyframe_condition(vae, keys, FRAMES, HEIGHT, WIDTH)
    assert y[0, :4, :, 0, 0].tolist() == [[0, 0, 1]] * 4
    assert vae.seen[0, 0, :, 0, 0].tolist() == [0.25] + [0.75] * 8


def test_noise_where_it_is_asked_for() -> None:
    vae = LinearVae()
    start = image(0.0)
    keyframe_condition(vae, Keyframes(start=start, noise=0.1), FRAMES, HEIGHT, WIDTH)
    assert vae.seen[:, :, 0].std() == pytest.approx(0.1, rel=0.1)
    assert not vae.seen[:, :, 1:].any()
    keyframe_condition(vae, Keyframes(start=start, empty_noise=0.2), FRAMES, HEIGHT, WIDTH)
    assert vae.seen[:, :, 1:].std() == pytest.approx(0.2, rel=0.1)
    assert not start.any()


@pytest.mark.parametrize(
    ("keys", "frames", "words"),
    [
        (Keyframes(), 8, "set num_frames to 9"),
        (Keyframes(start=image(0, 5), end=image(0, 5)), 9, "do not fit into 9"),
        (Keyframes(given=torch.ones(4)), 9, "4 frame masks for 9 frames"),
    ],
)
def test_conditions_that_cannot_be(keys: Keyframes, frames: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        keyframe_condition(LinearVae(), keys, frames, HEIGHT, WIDTH)


# --- denoising


class Model:
    """v = 0.1 x, plus what each pass is given."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self, x: Tensor, t: Tensor, context: Tensor, clip: Any, y: Any, audio: Any, masks: Any, **k: Any
    ) -> Tensor:
        self.calls.append({"context": context, "clip": clip, "audio": audio, "t": float(t), **k})
        return (0.1 * x + context.mean() + (0 if audio is None else audio.mean())).unsqueeze(0)


def run(
    model: Any,
    inputs: Callable[[Pass], ModelInputs],
    cfg: float = 1.0,
    audio_cfg: float = 1.0,
    scheduler: str = "euler",
    x: Tensor | None = None,
    attention_policy: AttentionPolicy | None = None,
    apg: tuple[float, float] | None = None,
    steps: tuple[int, int] = (0, 4),
    generator: torch.Generator | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 1, 2, 2, generator=torch.Generator().manual_seed(3)) if x is None else x
    schedule = plan_schedule(
        scheduler, 4, 5.0, start_step=steps[0], end_step=steps[1], cfg=cfg, audio_cfg=audio_cfg, apg=apg
    )
    modes = FallbackModes(model, attention_policy, SAFER, 4, x.device)
    generator = generator or torch.Generator().manual_seed(0)
    return denoise(model, schedule, x, inputs, generator=generator, modes=modes, **options)


def inputs_of(**changes: Any) -> WindowInputs:
    return WindowInputs(**{"context": torch.ones(2, 3), "negative": torch.zeros(2, 3), **changes})


def test_without_guidance_there_is_one_pass_per_step() -> None:
    model = Model()
    run(model, inputs_of())
    assert len(model.calls) == 4
    assert all(call["context"].mean() == 1 for call in model.calls)


def test_guidance_takes_the_negative_prompt_and_image() -> None:
    model = Model()
    clip, away = torch.ones(1, 2, 2), torch.zeros(1, 2, 2)
    run(model, inputs_of(clip=clip, negative_clip=away), cfg=3.0)
    assert len(model.calls) == 8
    for call in model.calls:
        assert call["clip"] is (clip if call["context"].mean() == 1 else away)


def test_speech_is_guided_against_silence_of_one_speaker() -> None:
    model = Model()
    run(model, inputs_of(audio=torch.ones(2, 5, 5, 1, 1), audio_scale=0.7), cfg=3.0, audio_cfg=2.0)
    assert len(model.calls) == 12
    assert {len(call["audio"]) for call in model.calls} == {1, 2}
    assert {call["audio_scale"] for call in model.calls} == {0.7}


def test_steps_can_be_shared_and_are_reported() -> None:
    reports: list[tuple[int, Tensor]] = []
    whole, _ = run(Model(), inputs_of(), report=lambda *given: reports.append(given))
    assert [step for step, _ in reports] == [0, 1, 2, 3]
    first, guess = run(Model(), inputs_of(), steps=(0, 2))
    torch.testing.assert_close(guess, reports[1][1])
    second, _ = run(Model(), inputs_of(), x=first, steps=(2, 4))
    torch.testing.assert_close(second, whole)


def test_a_pass_can_see_frames_of_its_own() -> None:
    """References at the end of x, in one pass of two: the steps go on without them."""
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor, *given: Any, **k: Any) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x).unsqueeze(0)

    own = Overwrite(torch.full((16, 1, 2, 2), 7.0), at_end=True)

    def inputs(which: Pass) -> ModelInputs:
        return ModelInputs(torch.zeros(2, 3), overwrite=own if which.prompt else None)

    x = torch.randn(16, 3, 2, 2)
    result, _ = run(model, inputs, cfg=3.0, x=x)
    with_references, without = seen[::2], seen[1::2]
    assert all(torch.equal(given[:, :2], x[:, :2]) and given[:, 2].eq(7).all() for given in with_references)
    assert all(torch.equal(given, x) for given in [*without, result])


@pytest.mark.parametrize(("scheduler", "draws"), [("euler", 0), ("lcm", 4), ("dpm++_sde", 4)])
@pytest.mark.parametrize(("front", "fronts"), [({}, 0), ({"draws": True}, 5), ({"draws": True, "noised": True}, 5)])
def test_random_numbers_after_every_step_the_last_one_too(scheduler, draws, front, fronts) -> None:
    shape, motion = (16, 3, 2, 2), torch.ones(16, 1, 2, 2)
    generator, expected = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor, *given: Any, **k: Any) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x).unsqueeze(0)

    overwrite = Overwrite(motion, **front)
    run(model, inputs_of(), x=torch.randn(shape), scheduler=scheduler, overwrite=overwrite, generator=generator)
    first = torch.randn(motion.shape, generator=expected) if fronts else None
    for _ in range(4):
        if draws:
            torch.randn(shape, generator=expected)
        if fronts:
            torch.randn(motion.shape, generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())
    stands = first if front.get("noised") else motion  # sigma is about 1 at first
    assert torch.allclose(seen[0][:, :1], stands, atol=2e-3)


def test_the_attention_policy_is_asked_step_by_step() -> None:
    model = Model()
    run(model, inputs_of(), attention_policy=lambda step, steps: f"mode {step} of {steps}")
    assert [call["attention_mode"] for call in model.calls] == [f"mode {i} of 4" for i in range(4)]


class BreakingModel(Model):
    """NaN from the third evaluation on, unless the mode is sdpa."""

    def __call__(self, x: Tensor, *given: Any, **k: Any) -> Tensor:
        velocity = super().__call__(x, *given, **k)
        return velocity if len(self.calls) < 3 or k["attention_mode"] == "sdpa" else velocity * torch.nan


@pytest.mark.parametrize("scheduler", ["euler", "dpm++_sde"])
def test_non_finite_values_start_the_window_over_in_the_safer_mode(
    caplog: pytest.LogCaptureFixture, scheduler: str
) -> None:
    model = BreakingModel()
    got, _ = run(model, inputs_of(), attention_policy="sageattn_3_fp8", scheduler=scheduler)
    safe, _ = run(Model(), inputs_of(), attention_policy="sdpa", scheduler=scheduler)
    assert torch.equal(got, safe)  # the same random numbers once more
    assert [call["attention_mode"] for call in model.calls] == ["sageattn_3_fp8"] * 3 + ["sdpa"] * 4
    assert "In step 3 of 4: the model gave non-finite values with attention mode sageattn_3_fp8" in caplog.text
    assert "starts over with sdpa" in caplog.text


def test_guidance_with_momentum_starts_over_too() -> None:
    def momentum(model: Any) -> Tensor:
        return run(model, inputs_of(), cfg=3.0, attention_policy="sageattn_3_fp8", apg=(-0.75, 55.0))[0]

    assert torch.equal(momentum(BreakingModel()), momentum(Model()))


def test_without_a_safer_mode_there_is_one_sentence() -> None:
    broken = Model()

    def model(x: Tensor, *given: Any, **k: Any) -> Tensor:
        return broken(x, *given, **k) * torch.nan

    with pytest.raises(InfiniteTalkError, match=r"In step 1 of 4.*eager.*no safer mode left"):
        run(model, inputs_of(), attention_policy=lambda step, steps: "sdpa")
    assert [call["attention_mode"] for call in broken.calls] == ["sdpa", "eager"]  # each mode once
