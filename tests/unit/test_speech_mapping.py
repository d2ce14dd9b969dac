"""MULTITALK_EMBEDS is a mapping that nodes of other packs read, make and change."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from support import tiny_comfy, workflows
from support.comfy_host import Host, NodeError, hosted
from support.tiny_comfy import node_of, shrink
from wanvideo_infinitetalk.wanvideo.errors import InputError

PUBLIC = ("audio_features", "audio_scale", "audio_cfg_scale", "ref_target_masks")
"""The entries that other packs know."""

NUMBERS = {"audio_scale": (-1, 101), "audio_cfg_scale": (-1, 101), "fps": (0, 61), "num_frames": (0, 10**8)}
"""Entry -> numbers beyond either bound."""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory):
    base = tmp_path_factory.mktemp("comfy")
    tiny_comfy.fill(base)
    with hosted(base) as host:
        yield host


@pytest.fixture
def prompt() -> dict[str, Any]:
    return shrink(workflows.load("infinitetalk_tiny"))


def rows(frames: int = 5, layers: int = 2, width: int = 8) -> torch.Tensor:
    return torch.randn(frames, layers, width, generator=torch.Generator().manual_seed(frames))


def mapping(**changes: Any) -> dict[str, Any]:
    """As another pack makes it."""
    given = {"audio_features": [rows()], "audio_scale": 1.0, "audio_cfg_scale": 1.0, "ref_target_masks": None}
    return {**given, **changes}


def read(given: dict[str, Any]) -> Any:
    from wanvideo_infinitetalk.comfy_nodes.types import SpeechEmbeds

    return SpeechEmbeds.of(given)


def through(host: Host, prompt: dict[str, Any], change: Any) -> dict[str, Any]:
    """The prompt, with a node of another pack between speech and sampler that returns `change(embeds)`."""
    host.core.OtherPack = lambda embeds: (change(embeds),)  # type: ignore[attr-defined]
    host.cache.pop("950", None)  # its inputs do not say which change it makes
    sampler = prompt[node_of(prompt, "InfiniteTalkSampler")]["inputs"]
    prompt["950"] = {"class_type": "OtherPack", "inputs": {"embeds": sampler["multitalk_embeds"]}}
    sampler["multitalk_embeds"] = ["950", 0]
    return prompt


def test_the_public_entries_alone_make_the_same_video(host: Host, prompt) -> None:
    sampler = node_of(prompt, "InfiniteTalkSampler")
    expected = host.run(prompt)[sampler][0]["video"]
    found = host.run(through(host, prompt, lambda embeds: {name: embeds[name] for name in PUBLIC}))[sampler][0]["video"]
    assert torch.equal(found, expected)


def test_what_another_pack_changes_is_honored(host: Host, prompt) -> None:
    sampler = node_of(prompt, "InfiniteTalkSampler")
    expected = host.run(prompt)[sampler][0]["video"]
    louder = host.run(through(host, prompt, lambda embeds: {**embeds, "audio_scale": 4.0}))[sampler][0]["video"]
    assert louder.shape == expected.shape
    assert not torch.equal(louder, expected)


def test_what_another_pack_spoils_is_answered_on_the_sampler(host: Host, prompt) -> None:
    with pytest.raises(NodeError, match="audio_features of multitalk_embeds is missing") as caught:
        host.run(through(host, prompt, lambda embeds: {"audio_scale": 1.0}))
    assert caught.value.class_type == "InfiniteTalkSampler"
    assert node_of(prompt, "InfiniteTalkModelLoader") not in host.executed


def test_both_ways_give_the_same(host: Host) -> None:
    from wanvideo_infinitetalk.comfy_nodes.types import SpeechEmbeds

    for embeds in (
        SpeechEmbeds((), 9),
        SpeechEmbeds((rows(), rows(7)), 6, 12.5, 0.5, 3.0, torch.ones(2, 8, 8)),
    ):
        found = read(embeds.mapping())
        assert found.mapping().keys() == embeds.mapping().keys() >= set(PUBLIC)
        assert [torch.equal(a, b) for a, b in zip(found.speakers, embeds.speakers, strict=True)] == [True] * len(
            embeds.speakers
        )
        assert (found.num_frames, found.fps, found.audio_scale) == (embeds.num_frames, embeds.fps, embeds.audio_scale)
        assert found.masks is embeds.masks


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "audio_features"])
@pytest.mark.parametrize("gone", [True, False], ids=["missing", "none"])
def test_entries_that_may_be_missing(host: Host, name: str, gone: bool) -> None:
    given = mapping()
    if gone:
        del given[name]
    else:
        given[name] = None
    found = read(given)
    assert (found.audio_scale, found.audio_cfg, found.masks, found.num_frames) == (1.0, 1.0, None, 5)


def test_the_video_is_as_long_as_the_longest_speech(host: Host) -> None:
    assert read(mapping(audio_features=[rows(5), rows(9)])).num_frames == 9


def test_features_are_taken_to_host_memory_in_float32(host: Host) -> None:
    (found,) = read(mapping(audio_features=(rows().half().requires_grad_(),))).speakers
    assert found.dtype == torch.float32
    assert not found.requires_grad


def wrong() -> list[Any]:
    """(entry, value) of every kind of wrong value."""
    nan, infinite = rows(), rows()
    nan[0, 0, 0], infinite[-1, -1, -1] = torch.nan, -torch.inf
    features = [None, rows(), [None], [rows(), "a"], {"a": rows()}, [rows()[0]], [rows()[None]], [rows().int()]]
    features += [[rows(0)], [nan], [rows(), infinite], [rows(5), rows(5, layers=3)], [rows(5), rows(9, width=4)], "abc"]
    found = [("audio_features", value) for value in features]
    for name, (low, high) in NUMBERS.items():
        found += [(name, value) for value in (low, high, torch.nan, "1", True, {}, torch.ones(2))]
    found += [("ref_target_masks", value) for value in ("mask", 1, torch.ones(8), torch.ones(1, 2, 8, 8), [], {})]
    found += [("ref_target_masks", torch.ones(0, 8, 8))]
    found += [("audio", value) for value in (1, {}, {"waveform": torch.ones(8), "sample_rate": 1})]
    return [pytest.param(name, value, id=f"{name}-{number}") for number, (name, value) in enumerate(found)]


@pytest.mark.parametrize(("name", "value"), wrong())
def test_a_wrong_entry_is_one_sentence(host: Host, name: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        read(mapping(**{name: value}))
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert len(sentence) < 250
    assert "\n" not in sentence
    assert name == "audio" or f"{name} " in sentence
    assert name == "audio" or "multitalk_embeds" in sentence


def test_silence_without_a_length(host: Host) -> None:
    with pytest.raises(InputError, match="num_frames None of multitalk_embeds"):
        read(mapping(audio_features=[]))


def test_entries_that_nothing_reads_are_named(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read(mapping())
        assert not caplog.records
        read(mapping(emotion="glad"))
    assert "emotion" in caplog.text
