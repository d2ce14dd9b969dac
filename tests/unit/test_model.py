"""What the transformer promises besides its numbers (those are in tests/parity)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checking import AWKWARD, awkward, checking_backend
from support.goldens import relative_error
from support.models import TINY, TINY_AUDIO, TINY_HUMO, random_inputs, random_model, speaker_masks
from torch import nn
from wanvideo_infinitetalk.multitalk import multitalk
from wanvideo_infinitetalk.wanvideo.errors import BackendUnavailableError, InputError
from wanvideo_infinitetalk.wanvideo.kernels.layout import count_guards
from wanvideo_infinitetalk.wanvideo.modules import model as model_module
from wanvideo_infinitetalk.wanvideo.modules.model import AudioConfig, HuMoConfig, WanConfig, WanModel, timestep_sinusoid

KEYS = Path(__file__).parent.parent / "data" / "keys"
T2V = dataclasses.replace(TINY, model_type="t2v", in_dim=16, audio=None)
HUMO = dataclasses.replace(TINY, model_type="t2v", audio=None, humo=TINY_HUMO)

# ------------------------------------------------------------------------------------ shapes of public checkpoints

SIZES_14B: dict[str, Any] = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
SIZES_1_3B: dict[str, Any] = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}


@pytest.mark.parametrize(
    ("config", "lists"),
    [
        (WanConfig(), ["wan21_i2v_14B"]),
        (WanConfig(audio=AudioConfig()), ["wan21_i2v_14B", "infinitetalk_additions"]),
        (WanConfig(model_type="t2v", in_dim=16, **SIZES_14B), ["wan21_t2v_14B"]),
        (WanConfig(model_type="t2v", in_dim=16, **SIZES_1_3B), ["wan21_t2v_1_3B"]),
        (
            WanConfig(model_type="t2v", in_dim=16, humo=HuMoConfig(), **SIZES_1_3B),
            ["wan21_t2v_1_3B", "humo_1_7B_additions"],
        ),
        (
            WanConfig(model_type="t2v", in_dim=16, humo=HuMoConfig(), **SIZES_14B),
            ["wan21_t2v_14B", "humo_17B_additions"],
        ),
    ],
    ids=["i2v 14B", "InfiniteTalk 14B", "t2v 14B", "t2v 1.3B", "HuMo 1.7B", "HuMo 17B"],
)
def test_keys_and_shapes_of_public_checkpoints(config: WanConfig, lists: list[str]) -> None:
    expected: dict[str, list[int]] = {}
    parameters = 0
    for name in lists:
        listed = json.loads((KEYS / f"{name}.json").read_text())
        parameters += listed["total_params"]
        for key, shape in listed["keys"].items():
            for n in range(listed["blocks"]) if "blocks.N." in key else [0]:
                expected[key.replace("blocks.N.", f"blocks.{n}.")] = shape
    with torch.device("meta"):
        state = WanModel(config).state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == expected
    assert sum(tensor.numel() for tensor in state.values()) == parameters


# ----------------------------------------------------------------------------------------------- layout and dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("speakers", [1, 2, 3])
def test_a_forward_copies_nothing_for_layout(speakers: int, dtype: torch.dtype) -> None:
    model = random_model().to(dtype)
    inputs = random_inputs(speakers=speakers)
    with count_guards() as stats:
        model(**inputs)
    assert stats.calls > 30
    assert stats.copies == 0


@pytest.mark.parametrize("config", [T2V, HUMO], ids=["t2v", "humo"])
def test_other_models_copy_nothing_for_layout(config: WanConfig) -> None:
    with count_guards() as stats:
        random_model(config)(**random_inputs(config, batch=2))
    assert stats.calls > 10
    assert stats.copies == 0


@pytest.mark.parametrize("speakers", [1, 2])
def test_all_that_reaches_attention_meets_the_strict_contract_by_itself(speakers: int) -> None:
    model, inputs = random_model(), random_inputs(speakers=speakers)
    with checking_backend() as mode:
        out = model(**inputs, attention_mode=lambda block, role: mode)
    torch.testing.assert_close(out, model(**inputs))


@pytest.mark.parametrize("kind", AWKWARD)
def test_awkward_inputs_give_the_same_and_stay_as_they_are(kind: str) -> None:
    model, inputs = random_model(), random_inputs(speakers=2)
    laid_out = {name: awkward(x, kind) for name, x in inputs.items()}
    before = {name: x.clone() for name, x in laid_out.items()}
    torch.testing.assert_close(model(**laid_out), model(**inputs))
    for name, x in laid_out.items():
        assert torch.equal(x, before[name]), name


@pytest.mark.parametrize("speakers", [1, 2])
def test_bfloat16_stays_close_to_float32(speakers: int) -> None:
    """Same weights, relative L2 at most 0.02: 0.006 measured, two blocks with eight roundings each of 2^-9."""
    model = random_model().to(torch.bfloat16)
    inputs = random_inputs(speakers=speakers)
    low = model(**inputs)
    assert low.dtype == torch.float32, "the dtype of x"
    full = model.float()(**inputs)
    assert float((low - full).norm() / full.norm()) <= 0.02
    assert model(**inputs | {"x": inputs["x"].bfloat16()}).dtype == torch.bfloat16


def test_sinusoid_is_made_in_float64() -> None:
    t = torch.tensor([999.37])
    half = 128
    angles = t.double() * torch.pow(torch.tensor(10000.0).double(), -torch.arange(half).double() / half)
    expected = torch.cat((angles.cos(), angles.sin()))
    assert relative_error(timestep_sinusoid(t, 2 * half)[0], expected) <= 1e-7


# ----------------------------------------------------------------------------------------------- compiled, hooked


@pytest.mark.slow
def test_compiles_whole_as_one_graph() -> None:
    """One graph also means that nothing in a forward reads a tensor's value on the host: that would break it."""
    torch._dynamo.reset()
    model = random_model(dataclasses.replace(TINY, num_layers=1))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for speakers, grid in ((1, (3, 4, 6)), (2, (3, 4, 6)), (2, (3, 4, 8))):
        inputs = random_inputs(speakers=speakers, grid=grid)
        torch.testing.assert_close(compiled(**inputs), model(**inputs))


def test_run_block_is_the_place_to_step_in() -> None:
    class Watched(WanModel):
        def run_block(self, index: int, block: nn.Module, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
            assert block is self.blocks[index]
            visited.append(index)
            return super().run_block(index, block, tokens, *rest)

    visited: list[int] = []
    plain = random_model()
    watched = Watched(TINY)
    watched.load_state_dict(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(watched(**random_inputs()), plain(**random_inputs()))
    assert visited == [0, 1]


def test_weights_can_be_assigned_to_a_model_without_memory() -> None:
    plain = random_model()
    with torch.device("meta"):
        empty = WanModel(TINY)
    empty.load_state_dict(plain.state_dict(), assign=True)
    torch.testing.assert_close(empty(**random_inputs()), plain(**random_inputs()))


def test_rotation_tables_are_kept_per_grid_and_few() -> None:
    model = random_model(T2V)
    device = torch.device("cpu")
    first = model._rotations.get((2, 3, 4), device)
    assert model._rotations.get((2, 3, 4), device) is first
    assert first.cos.shape == (24, 1, 16)
    for frames in range(3, 9):
        model._rotations.get((frames, 3, 4), device)
    assert len(model._rotations._tables) == 2


# ----------------------------------------------------------------------------------------------- attention modes


def _spy_on_attention(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    modes: list[str] = []

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention_mode: str) -> torch.Tensor:
        modes.append(attention_mode)
        return torch.zeros(q.shape)

    for module in (model_module, multitalk):
        monkeypatch.setattr(module, "attention", spy)
    return modes


def test_low_precision_serves_self_attention_only(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = _spy_on_attention(monkeypatch)
    random_model(attention_mode="sageattn_3_fp4")(**random_inputs())
    assert modes == ["sageattn_3_fp4", "sdpa", "sdpa", "sdpa"] * 2


def test_a_mode_given_to_forward_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = _spy_on_attention(monkeypatch)
    random_model(attention_mode="sdpa")(**random_inputs(), attention_mode="eager")
    assert modes == ["eager"] * 8


def test_a_policy_is_asked_for_every_block_and_role(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = _spy_on_attention(monkeypatch)

    def policy(block: int, role: str) -> str:
        return "eager" if (block, role) in {(0, "audio"), (1, "self"), (1, "image")} else "sdpa"

    random_model(attention_mode=policy)(**random_inputs())
    assert modes == ["sdpa", "sdpa", "sdpa", "eager", "eager", "sdpa", "eager", "sdpa"]


def test_an_unknown_mode_is_rejected() -> None:
    with pytest.raises(BackendUnavailableError):
        random_model(T2V, attention_mode="no_such_mode")(**random_inputs(T2V))


# ----------------------------------------------------------------------------------------------- inputs


def test_a_batch_is_its_videos() -> None:
    model = random_model(T2V)
    inputs = random_inputs(T2V, batch=2)
    prompts = [torch.randn(3, 16), torch.randn(8, 16)]
    times = torch.tensor([900.0, 100.0])
    together = model(inputs["x"], times, prompts)
    for i in range(2):
        torch.testing.assert_close(together[i : i + 1], model(inputs["x"][i], times[i], prompts[i]))


def test_text_may_come_as_one_tensor_or_a_list() -> None:
    model, inputs = random_model(T2V), random_inputs(T2V)
    x, t, text = inputs["x"], inputs["t"], inputs["context"]
    expected = model(x, t, text)
    assert torch.equal(model(x, t, [text]), expected)
    assert torch.equal(model(x, t, text.unsqueeze(0)), expected)
    padded = torch.cat((text, torch.zeros(3, 16)))
    assert torch.equal(model(x, t, padded), expected)


def test_audio_scale_weighs_the_audio_layers() -> None:
    model, inputs = random_model(), random_inputs()
    without = model(**{name: x for name, x in inputs.items() if name != "audio"})
    torch.testing.assert_close(model(**inputs, audio_scale=0.0), without)
    assert relative_error(model(**inputs), without) > 0.1
    assert relative_error(model(**inputs, audio_scale=0.5), model(**inputs)) > 0.05
    silent = inputs | {"audio": torch.zeros_like(inputs["audio"])}
    assert relative_error(model(**silent), without) > 0.01, "zeros change the result through the biases"


def test_masks_of_any_size_mark_the_same_areas() -> None:
    model, inputs = random_model(), random_inputs(speakers=2)
    large = inputs["ref_target_masks"].repeat_interleave(8, 1).repeat_interleave(8, 2)
    torch.testing.assert_close(model(**inputs | {"ref_target_masks": large}), model(**inputs))
    assert relative_error(model(**inputs | {"ref_target_masks": None}), model(**inputs)) > 1e-3
    swapped = inputs["ref_target_masks"][[1, 0, 2]]
    assert relative_error(model(**inputs | {"ref_target_masks": swapped}), model(**inputs)) > 1e-3


@pytest.mark.parametrize("speakers", [1, 2, 3, 4])
def test_one_frame_more_than_audio(speakers: int) -> None:
    model, inputs = random_model(), random_inputs(speakers=speakers)
    shorter = model(**inputs | {"audio": inputs["audio"][:, :-4]})
    assert shorter.isfinite().all()
    assert relative_error(shorter, model(**inputs)) > 1e-3


def test_humo_works_on_clips_of_any_length_and_in_batches() -> None:
    model = random_model(HUMO)
    for frames in (1, 3, 6):
        inputs = random_inputs(HUMO, grid=(frames, 2, 4), batch=2)
        both = model(**inputs)
        one = model(**inputs | {"x": inputs["x"][1], "y": inputs["y"][1]})
        torch.testing.assert_close(both[1:], one)
        assert relative_error(model(**inputs, humo_audio_scale=0.0), both) > 0.01


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "odd sides": ({"x": torch.zeros(16, 3, 7, 12), "y": torch.zeros(1, 20, 3, 7, 12)}, "multiples of the patch"),
    "no condition": ({"y": None}, "36 channels"),
    "condition of another size": ({"y": torch.zeros(1, 20, 3, 8, 14)}, "do not fit together"),
    "two times": ({"t": torch.zeros(2)}, "2 timesteps"),
    "long prompt": ({"context": torch.zeros(9, 16)}, "9 tokens"),
    "three prompts": ({"context": [torch.zeros(2, 16)] * 3}, "3 prompts"),
    "cut audio": ({"audio": torch.zeros(1, 8, 5, 2, 8)}, "8 frames"),
    "short audio": ({"audio": torch.zeros(1, 1, 5, 2, 8)}, "audio for 1 frames"),
    "other features": ({"audio": torch.zeros(1, 9, 5, 3, 8)}, "give \\[speakers"),
    "too few masks": ({"audio": torch.zeros(2, 9, 5, 2, 8), "ref_target_masks": torch.ones(2, 8, 12)}, "give 3"),
    "too many speakers": (
        {"audio": torch.zeros(5, 9, 5, 2, 8), "ref_target_masks": speaker_masks(5, 8, 12)},
        "1 to 4 speakers",
    ),
    "humo features": ({"humo_audio": torch.zeros(3, 8, 2, 8)}, "without HuMo"),
}


@pytest.mark.parametrize("case", BAD)
def test_inputs_that_do_not_fit_are_rejected(case: str) -> None:
    given, message = BAD[case]
    with pytest.raises(InputError, match=message):
        random_model()(**random_inputs() | given)


def test_conditions_of_other_models_are_rejected() -> None:
    model, inputs = random_model(T2V), random_inputs(T2V)
    with pytest.raises(InputError, match="clip_fea"):
        model(**inputs, clip_fea=torch.zeros(1, 7, 32))
    with pytest.raises(InputError, match="adapter"):
        model(**inputs, audio=torch.zeros(1, 9, 5, 2, 8))
    with pytest.raises(InputError, match="humo_audio"):
        random_model(HUMO)(**random_inputs(HUMO) | {"humo_audio": torch.zeros(2, 8, 2, 8)})


def test_configuration_from_public_names() -> None:
    fields = {"dim": 64, "num_heads": 2, "patch_size": [1, 2, 2], "qk_norm": True, "window_size": [-1, -1]}
    assert WanConfig.from_public(fields) == WanConfig(dim=64, num_heads=2)
    with_audio = WanConfig.from_public(fields | {"audio_window": 5, "blocks": 2, "channels": 8})
    assert with_audio.audio == AudioConfig(blocks=2, channels=8)
    assert WanModel(**dataclasses.asdict(T2V)).config == T2V
    for wrong in ({"qk_norm": False}, {"window_size": (4, 4)}, {"color": 1}, {"model_type": "s2v"}, {"num_heads": 3}):
        with pytest.raises(InputError):
            WanConfig.from_public(fields | wrong)
    with pytest.raises(InputError, match="not both"):
        WanConfig(audio=TINY_AUDIO, humo=TINY_HUMO)
    with pytest.raises(InputError, match="not both"):
        WanModel(TINY, dim=64)
