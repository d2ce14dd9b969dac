"""What the talking models were made with: the mouth's rule, the drawn faces, and the trainings."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from wanvideo_infinitetalk.cli import tiny_models as tiny
from wanvideo_infinitetalk.tools.demo_model import bank, train_vae
from wanvideo_infinitetalk.tools.demo_model.bank import Bank, Sounds
from wanvideo_infinitetalk.tools.demo_model.dit import CONFIG, new_model, split_state, velocity
from wanvideo_infinitetalk.tools.demo_model.export import export
from wanvideo_infinitetalk.tools.demo_model.faces import draw, mouth_boxes, random_faces, rest
from wanvideo_infinitetalk.tools.demo_model.rule import SAMPLE_RATE, mouth_of
from wanvideo_infinitetalk.tools.demo_model.train_dit import Data, Loss, load_clip, sample
from wanvideo_infinitetalk.tools.demo_model.train_ears import pieces_of, train
from wanvideo_infinitetalk.tools.demo_model.training import SHARD_BYTES, Schedule, Trainer, load_shards, save_shards
from wanvideo_infinitetalk.tools.demo_model.whole_clip import decode, encode

# ------------------------------------------------------------------------------------------------------------ the rule


def tone(frequencies: tuple[int, ...], seconds: float = 2.0, level: float = 0.1) -> np.ndarray:
    t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (level * sum(np.sin(2 * np.pi * f * t) for f in frequencies)).astype(np.float32)


def test_silence_closes_the_mouth_and_speech_opens_it() -> None:
    speech = np.concatenate([np.zeros(SAMPLE_RATE, np.float32), tone((400, 900))])
    opening = mouth_of(speech).opening
    assert len(opening) == 75
    assert opening[:23].max() == 0
    assert opening[30:70].min() > 0.8
    assert mouth_of(np.zeros(SAMPLE_RATE, np.float32)).opening.max() == 0


def test_louder_is_wider_open() -> None:
    pieces = [tone((400, 900), 1.0, level) for level in (0.008, 0.02, 0.05)]
    opening = mouth_of(np.concatenate([np.zeros(SAMPLE_RATE, np.float32), *pieces])).opening
    steps = [opening[start + 10] for start in (25, 50, 75)]
    assert 0 < steps[0] < steps[1] < steps[2]


def test_a_steady_hum_does_not_open_the_mouth() -> None:
    hum = 0.02 * np.random.default_rng(0).standard_normal(4 * SAMPLE_RATE).astype(np.float32)
    assert mouth_of(hum).opening.max() < 0.2


def test_ee_is_wide_and_oo_is_round() -> None:
    def width(*frequencies: int) -> float:
        return float(mouth_of(np.concatenate([np.zeros(8000, np.float32), tone(frequencies)])).width[30])

    assert width(300, 2300, 3000) > 0.7 > 0.4 > width(300, 700)
    assert width(2300) <= 1
    assert float(mouth_of(np.zeros(16000, np.float32)).width[10]) == 0.5


# ----------------------------------------------------------------------------------------------------------- the faces


def test_faces_are_drawn_alike_from_the_same_seed_and_differ_otherwise() -> None:
    def picture(seed: int) -> torch.Tensor:
        return draw([random_faces(2, torch.Generator().manual_seed(seed))], [rest(2)], 64, 64)

    assert torch.equal(picture(1), picture(1))
    assert float((picture(1) - picture(2)).abs().mean()) > 0.05
    assert picture(1).shape == (2, 3, 1, 64, 64)
    assert float(picture(1).abs().max()) <= 1


def test_an_open_mouth_is_darker_inside_its_box_and_nowhere_else() -> None:
    face = random_faces(4, torch.Generator().manual_seed(3))
    closed, wide = (draw([face], [rest(4, opening)], 96, 96)[:, :, 0].mean(1) for opening in (0.0, 1.0))
    for number, (left, top, right, bottom) in enumerate(mouth_boxes(face, 96, 96).round().int().tolist()):
        darker = closed[number] - wide[number]
        inside = darker[top:bottom, left:right]
        assert float(inside.max()) > 0.3
        darker[top - 2 : bottom + 2, left - 2 : right + 2] = 0
        assert float(darker.abs().max()) < 0.15  # the chin moves a little


# -------------------------------------------------------------------------------------------------------- the trainings


@pytest.mark.parametrize("frames", [1, 5, 21])
def test_a_whole_clip_is_coded_as_by_the_streaming_vae(frames: int) -> None:
    vae = train_vae.new_vae(8, "cpu")
    with torch.no_grad():
        video = torch.rand(2, 3, frames, 16, 24) * 2 - 1
        latents = vae.encode(video)
        assert torch.allclose(encode(vae, video), latents, atol=1e-5)
        assert torch.allclose(decode(vae, latents).clamp(-1, 1), vae.decode(latents), atol=1e-5)


def test_whitened_latents_decode_to_the_same_and_have_unit_variance() -> None:
    vae = train_vae.new_vae(8, "cpu")
    state = train_vae.public_state(vae, dict(vae.model.named_parameters()))
    with torch.no_grad():
        video = torch.rand(2, 3, 9, 32, 32) * 2 - 1
        latents = vae.encode(video)
        mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
        white = train_vae.WanVAE.from_state_dict(train_vae.whiten(state, mean, std))
        seen = white.encode(video)
        assert torch.allclose(seen.mean((0, 2, 3, 4)), torch.zeros(16), atol=1e-3)
        assert torch.allclose(seen.std((0, 2, 3, 4)), torch.ones(16), atol=1e-3)
        assert torch.allclose(white.decode(seen), vae.decode(latents), atol=1e-3)


@pytest.mark.parametrize("speakers", [1, 2])
def test_a_batch_has_the_velocities_of_its_videos(speakers: int) -> None:
    torch.manual_seed(0)
    model = new_model(replace(CONFIG, num_layers=2)).requires_grad_(False)
    nn.init.normal_(model.head.head.weight, std=0.1)
    frames, height, width = 3, 4, 4 * speakers
    x, y = torch.randn(2, 16, frames, height, width), torch.randn(2, 20, frames, height, width)
    t, text = torch.tensor([700.0, 200.0]), torch.randn(5, CONFIG.text_dim)
    clip = torch.randn(2, 257, CONFIG.clip_dim)
    audio = torch.randn(2, speakers, 9, 5, tiny.AUDIO_LAYERS, tiny.AUDIO_DIM)
    masks = torch.zeros(2, speakers + 1, height // 2 * width // 2)
    half = torch.arange(masks.shape[-1]) % (width // 2) < width // 4
    masks[:, 0, half], masks[:, 1, ~half] = 1, 1
    both = velocity(model, x, t, text, clip, y, audio, masks if speakers > 1 else None)
    for n in range(2):
        told = {"ref_target_masks": masks[n].unflatten(-1, (height // 2, width // 2))} if speakers > 1 else {}
        alone = model(x[n], t[n : n + 1], [text], clip[n : n + 1], y[n], audio[n], **told)
        assert torch.allclose(both[n], alone[0], atol=2e-5)


def test_the_parts_of_the_model_go_into_the_files_that_the_public_ones_have() -> None:
    model, adapter = split_state(dict(new_model(replace(CONFIG, num_layers=1)).state_dict()))
    assert set(adapter) == set(tiny.adapter_weights(layers=1))
    assert set(model) == {n for n in tiny.dit_weights() if not n.startswith("blocks.1.")}


class Line(nn.Module):
    """loss = |weight * x - y|²"""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.weight * x - y).square().mean()


def test_a_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    batches = [(torch.full((3,), 1.0 + n), torch.full((3,), 3.0)) for n in range(6)]
    line = Line()
    trainer = Trainer(line, line, average=0.5)
    for batch in batches[:4]:
        trainer.step(0.1, *batch)
    trainer.save(tmp_path)
    other = Line()
    resumed = Trainer(other, other, average=0.5)
    resumed.load(tmp_path)
    assert torch.equal(other.weight, line.weight)
    assert torch.equal(resumed.averaged()["weight"], trainer.averaged()["weight"])
    before = [line(*batch).item() for batch in batches]
    for batch in batches:
        resumed.step(0.05, *batch)
    assert sum(other(*batch).item() for batch in batches) < sum(before)


def test_checkpoints_come_in_small_files(tmp_path: Path) -> None:
    state = {f"part{n}": torch.full((2**20,), float(n)) for n in range(9)}
    save_shards(tmp_path, state)
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(sizes) == 3
    assert max(sizes) < 2**24
    assert SHARD_BYTES < 2**24
    loaded = load_shards(tmp_path)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_shards(tmp_path / "nothing")


def test_the_learning_rate_warms_up_holds_and_falls() -> None:
    plan = Schedule(1.0, 1000, 1e9, finish=True, warmup=10)
    assert plan.rate(0, 0.0) == pytest.approx(0.1)
    assert plan.rate(400, 0.4) == 1
    assert plan.rate(999, 0.999) < 1e-3


def test_a_vae_step_makes_the_loss_smaller() -> None:
    torch.manual_seed(0)
    vae = train_vae.new_vae(8, "cpu")
    loss = train_vae.make_loss(vae)
    trainer = Trainer(vae.model, loss)
    batch = train_vae.scenes(1, 5, 32, torch.Generator().manual_seed(0), "cpu")
    losses = [float(trainer.step(2e-3, *batch)) for _ in range(6)]
    assert losses[-1] < losses[0]


def test_ears_learn_to_hear_the_opening() -> None:
    rng = np.random.default_rng(0)
    recordings = []
    for _ in range(2):
        loud = np.repeat(rng.uniform(-50, 0, 150), 1600)[: 14 * SAMPLE_RATE]
        recordings.append((rng.standard_normal(len(loud)) * 10 ** (loud / 20) * 0.2).astype(np.float32))
    speech, target = pieces_of(recordings, 3, 0)
    assert speech.shape == (3, 12 * SAMPLE_RATE)
    assert target.shape == (3, 300, 6)
    state = train(recordings, steps=2, pieces=3)
    assert set(state) == set(tiny.wav2vec_weights()) - {"masked_spec_embed"}  # of wav2vec2's own training
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}


@pytest.mark.parametrize("people", [1, 2])
def test_clips_fit_the_loss_and_the_sampler(people: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank, "SIZE", 32)
    rng = np.random.default_rng(0)
    rows = 200
    sounds = Sounds(
        torch.randn(rows, tiny.AUDIO_LAYERS, tiny.AUDIO_DIM).half(),
        torch.from_numpy(rng.random((rows, 2)).astype(np.float32)),
        torch.tensor([100, 200]),
    )
    vae = train_vae.new_vae(8, "cpu")
    vae.model.requires_grad_(False)
    data = Data(Bank(vae, load_clip("cpu"), sounds, people, 0), sounds, 1, 1)
    model = new_model(replace(CONFIG, num_layers=1))
    batch = data.batch(1, 3)
    text = torch.randn(4, CONFIG.text_dim)
    loss = Loss(model)(*batch, text)
    loss.backward()
    assert 0.1 < loss.item() < 10
    assert sample(model.requires_grad_(False), batch, text, steps=1).shape == (1, 16, 3, 4, 4 * people)


def test_an_export_is_what_make_tiny_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_vae, "SIZE", 16)
    vae = train_vae.new_vae(8, "cpu")
    Trainer(vae.model, train_vae.make_loss(vae)).save(tmp_path / "vae")
    model = new_model()
    Trainer(model, Loss(model)).save(tmp_path / "dit")
    ears = tiny.wav2vec_weights(torch.float16)
    del ears["masked_spec_embed"]
    save_file(ears, tmp_path / "ears.safetensors")
    total = export(tmp_path / "vae", 8, tmp_path / "dit", tmp_path / "ears.safetensors", tmp_path / "out")
    assert total <= tiny.TALKING_BYTES
    for name in tiny.TALKING_PARTS:
        made, shipped = (
            {key: (value.shape, value.dtype) for key, value in load_file(folder / f"{name}.safetensors").items()}
            for folder in (tmp_path / "out", Path(tiny.__file__).parents[1] / "assets/talking")
        )
        assert made == shipped


def test_without_a_synthesiser_there_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wanvideo_infinitetalk.tools.demo_model import recordings

    monkeypatch.setattr("sys.argv", ["recordings", str(tmp_path / "new" / "out.npz")])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        recordings.main()
    assert ended.value.code == 2
    assert "espeak-ng, which speaks the sentences, is not on the PATH" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng, which speaks the training data, is not here")
def test_recordings_are_spoken_alike_from_the_same_seed(tmp_path: Path) -> None:
    from wanvideo_infinitetalk.tools.demo_model.recordings import make_recordings, read_recordings

    assert make_recordings(tmp_path / "a.npz", 1.2, seed=5) == 2
    make_recordings(tmp_path / "b.npz", 1.2, seed=5)
    first, again = (read_recordings(tmp_path / f"{name}.npz") for name in "ab")
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert [len(wave) for wave in first] == [36 * SAMPLE_RATE] * 2
    assert max(float(mouth_of(wave).opening.max()) for wave in first) > 0.5
