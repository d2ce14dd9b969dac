"""Runs that are killed: what was announced is in the partial file; going on gives what an uninterrupted run gives."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file
from support import killed_run
from wanvideo_infinitetalk.cli import parser as cli
from wanvideo_infinitetalk.cli.tiny_models import TinySet
from wanvideo_infinitetalk.media import video
from wanvideo_infinitetalk.media.video import OutputFiles, Written
from wanvideo_infinitetalk.pipeline import journal, long_video, make_video
from wanvideo_infinitetalk.pipeline.journal import Journal, describe, digest_of_file
from wanvideo_infinitetalk.pipeline.long_video import RunState
from wanvideo_infinitetalk.wanvideo.errors import InfiniteTalkError, InputError
from wanvideo_infinitetalk.wanvideo.runtime import compilation
from wanvideo_infinitetalk.wanvideo.runtime.compilation import CompileSettings

WINDOWS, NEW = 10, 4
FRAMES = 5 + (WINDOWS - 1) * NEW
SIGNALED = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}


@dataclass(frozen=True)
class Run:
    code: int
    announced: int
    err: str


@dataclass(frozen=True)
class Case:
    """One video to make, whose runs may be killed; `latents` is where they leave those of each window."""

    folder: Path
    arguments: tuple[str, ...]

    @property
    def out(self) -> Path:
        return self.folder / "video.mp4"

    @property
    def partial(self) -> Path:
        return OutputFiles.of(self.out).partial

    def run(self, *more: str) -> Run:
        """In this process, to the end."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = killed_run.main("never", 0, self._latents(), [*self.arguments, "--out", str(self.out), *more])
        return Run(code, *_last_announced(out.getvalue()), err.getvalue())

    def kill(self, moment: str, number: int) -> Run:
        """In a process of its own, which gets the signal at that moment."""
        argv = [moment, str(int(number)), str(self._latents()), *self.arguments, "--out", str(self.out)]
        done = subprocess.run(
            [sys.executable, killed_run.__file__, *argv],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        return Run(done.returncode, *_last_announced(done.stdout), done.stderr)

    def _latents(self) -> Path:
        (self.folder / "latents").mkdir(exist_ok=True)
        return self.folder / "latents"

    def latents(self) -> list[torch.Tensor]:
        return [load_file(self.folder / "latents" / f"{i}.safetensors")["latents"] for i in range(WINDOWS)]


def _last_announced(out: str) -> tuple[int]:
    lines = [line for line in out.splitlines() if line.startswith("announced ")]
    return (int(lines[-1].split()[1]) if lines else 0,)


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def sound_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])


def arguments(tiny: TinySet, folder: Path) -> tuple[str, ...]:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / "image.png")
    t = np.arange(round(FRAMES / 25 * 16000)) / 16000
    soundfile.write(folder / "speech.wav", 0.3 * np.sin(2 * np.pi * (100 + 300 * t) * t), 16000)
    options = {
        "image": folder / "image.png",
        "audio": folder / "speech.wav",
        "model": tiny.model,
        "adapter": tiny.adapter,
        "vae": tiny.vae,
        "text-encoder": tiny.text_encoder,
        "clip-vision": tiny.clip_vision,
        "wav2vec": tiny.wav2vec,
        "width": 32,
        "height": 32,
        "frames": 5,
        "motion-frames": 1,
        "steps": 2,
        "cfg": 1,
        "audio-cfg": 2,
    }
    return ("generate", *(part for name, value in options.items() for part in (f"--{name}", str(value))))


@pytest.fixture(scope="module")
def whole(tiny_set: TinySet, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    case = Case(folder, arguments(tiny_set, folder))
    ran = case.run()
    assert (ran.code, ran.announced) == (0, WINDOWS), ran.err
    return case


def check_killed_and_resumed(whole: Case, folder: Path, moment: str, number: int) -> None:
    folder.mkdir(exist_ok=True)
    case = Case(folder, whole.arguments)
    killed = case.kill(moment, number)
    assert killed.code == SIGNALED[signal.Signals(number)], (moment, killed.err)
    assert not case.out.exists()
    if killed.announced:
        assert len(frames_of(case.partial)) >= 5 + (killed.announced - 1) * NEW, moment
    if number != signal.SIGKILL:
        last = killed.err.rstrip().splitlines()[-1]
        assert last.startswith("infinitetalk: " + ("Interrupted" if number == signal.SIGINT else "Terminated"))
        assert str(case.partial) in last or not killed.announced
        assert not list(folder.glob("*.lock")) + list(folder.glob("*.tmp"))
    resumed = case.run("--resume")
    assert resumed.code == 0, (moment, resumed.err)
    assert {p.name for p in folder.iterdir()} == {"video.mp4", "latents"}
    for index, (ours, expected) in enumerate(zip(case.latents(), whole.latents(), strict=True)):
        assert torch.equal(ours, expected), (moment, index)
    assert np.array_equal(frames_of(case.out), frames_of(whole.out)), moment
    assert np.array_equal(sound_of(case.out), sound_of(whole.out)), moment


@pytest.mark.parametrize(
    ("moment", "number"),
    [("3:announced", signal.SIGKILL), ("6:announced:20", signal.SIGTERM)],
)
def test_a_killed_run_keeps_what_it_announced_and_is_gone_on_with(whole, tmp_path, moment, number) -> None:
    check_killed_and_resumed(whole, tmp_path / "killed", moment, number)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_50_killed_runs(whole, tmp_path, part) -> None:
    """20 SIGKILL, 15 SIGTERM, 15 SIGINT; half of them within 100 ms after a window was announced."""
    numbers = [signal.SIGKILL] * 20 + [signal.SIGTERM] * 15 + [signal.SIGINT] * 15
    rng = random.Random(12)
    rng.shuffle(numbers)
    moments = []
    for index in range(len(numbers)):
        window = rng.randint(1, WINDOWS - 4)  # so that it is not over when the delay is
        place = "announced" if index % 2 else rng.choice(killed_run.PLACES[:-1])
        delay = f":{rng.randint(0, 100)}" if rng.random() < 0.7 else ""
        moments.append(f"{window}:{place}{delay}")
    for index in range(5 * part, 5 * part + 5):
        check_killed_and_resumed(whole, tmp_path / str(index), moments[index], numbers[index])


@pytest.fixture
def case(whole: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    """A run that an error has ended in its fourth window."""
    case = Case(tmp_path, whole.arguments)
    decode = long_video._decode

    def fail(*given: object) -> torch.Tensor:
        if given[3].index == 3:
            raise InfiniteTalkError("No more.")
        return decode(*given)

    with monkeypatch.context() as patch:
        patch.setattr(long_video, "_decode", fail)
        assert case.run().code == 2
    assert journal.finished_windows(OutputFiles.of(case.out)) == 3
    return case


def assert_as_the_whole(case: Case, whole: Case) -> None:
    assert [torch.equal(a, b) for a, b in zip(case.latents(), whole.latents(), strict=True)] == [True] * WINDOWS
    assert np.array_equal(frames_of(case.out), frames_of(whole.out))
    assert np.array_equal(sound_of(case.out), sound_of(whole.out))


def test_a_run_that_failed_is_gone_on_with_and_cleans_up(case, whole) -> None:
    ran = case.run("--resume")
    assert ran.code == 0, ran.err
    assert "Going on after window 3, at frame 13." in ran.err
    assert "bits may differ" not in ran.err
    assert_as_the_whole(case, whole)
    assert {p.name for p in case.folder.iterdir()} == {"video.mp4", "latents"}


def test_what_is_made_must_be_the_same(case, whole, tmp_path_factory) -> None:
    other = tmp_path_factory.mktemp("other")
    arguments(TinySet.in_folder(Path(whole.arguments[whole.arguments.index("--vae") + 1]).parent), other)
    Image.new("RGB", (40, 40)).save(other / "image.png")
    before = {p.name: p.read_bytes() for p in case.folder.iterdir() if p.is_file()}
    for more, words in (
        (("--seed", "43"), "seed 43, was 42"),
        (("--prompt", "A dog"), "prompt"),
        (("--image", str(other / "image.png")), "another image"),
        (("--steps", "3"), "steps 3, was 2"),
        (("--max-frames", "20"), "max frames 20, was None"),
        (("--attention-mode", "eager"), "attention mode eager, was auto"),
        (("--quantization", "fp8_e4m3fn"), "quantization fp8_e4m3fn, was disabled"),
        (("--text-encoder-quantization", "fp8_e4m3fn"), "text encoder quantization fp8_e4m3fn, was disabled"),
    ):
        ran = case.run("--resume", *more)
        assert ran.code == 2, more
        assert words in ran.err.splitlines()[-1]
        assert "Traceback" not in ran.err
    assert {p.name: p.read_bytes() for p in case.folder.iterdir() if p.is_file()} == before


def test_how_it_is_made_may_change_and_is_said(case) -> None:
    ran = case.run("--resume", "--blocks-to-swap", "1", "--tiled-vae")
    assert ran.code == 0, ran.err
    assert "swapped blocks is 1, and was 0 for the windows before: bits may differ" in ran.err
    assert "Tiling of the vae is True" in ran.err
    assert len(frames_of(case.out)) == FRAMES


def test_compiling_later_windows_is_said(case, monkeypatch) -> None:
    monkeypatch.setattr(compilation, "CompileSettings", lambda mode: CompileSettings(backend="eager", mode=mode))
    ran = case.run("--resume", "--compile")
    assert ran.code == 0, ran.err
    assert "Compilation is by eager, mode default, and was none for the windows before: bits may differ" in ran.err


def test_copies_of_the_inputs_do_as_well(case, whole, tmp_path_factory, tiny_set) -> None:
    moved = Case(case.folder, arguments(tiny_set, tmp_path_factory.mktemp("moved")))
    assert moved.run("--resume").code == 0
    assert_as_the_whole(case, whole)


def test_kernels_that_were_not_used_before_are_said(case, monkeypatch) -> None:
    entry = journal._read(OutputFiles.of(case.out))
    assert entry is not None
    recorder = make_video.Recorder
    monkeypatch.setattr(
        make_video, "Recorder", lambda writer, entries, kernels, *more: recorder(writer, entries, ["another"], *more)
    )
    ran = case.run("--resume")
    assert ran.err.count("Attention is computed by another, which the windows before did not use") == 1


def test_files_that_do_not_go_together_are_rejected(case) -> None:
    files = OutputFiles.of(case.out)
    whole, kept = files.partial.read_bytes(), files.journal.read_bytes()
    for damage, words in (
        (lambda: files.partial.write_bytes(whole[:-1]), "missing or has been cut"),
        (files.partial.unlink, "missing or has been cut"),
        (lambda: files.journal.write_bytes(kept[:100]), "is damaged"),
        (lambda: files.journal.write_bytes(b""), "is damaged"),
    ):
        damage()
        ran = case.run("--resume")
        assert ran.code == 2
        assert words in ran.err.splitlines()[-1]
        files.partial.write_bytes(whole)
        files.journal.write_bytes(kept)


def test_any_change_of_the_journal_is_damage(case) -> None:
    """Of its tensors too, from which the next window would be made."""
    files = OutputFiles.of(case.out)
    kept = files.journal.read_bytes()
    rng = random.Random(0)
    for at in [*range(0, len(kept), 101), *rng.sample(range(len(kept)), 50)]:
        files.journal.write_bytes(kept[:at] + bytes([kept[at] ^ 1 << rng.randrange(8)]) + kept[at + 1 :])
        with pytest.raises(InputError, match="is damaged"):
            Journal(files, {}, {}).start(resume=True)
    files.journal.unlink()
    os.mkfifo(files.journal)
    with pytest.raises(InputError, match="is damaged"):
        Journal(files, {}, {}).start(resume=True)


def test_another_encoder_does_not_go_on(case) -> None:
    """The header of the partial file holds for all frames: those of another encoder would not be readable."""
    files = OutputFiles.of(case.out)
    data = files.partial.read_bytes()
    at = data.index(b"avcC") + 4
    files.partial.write_bytes(data[: at + 1] + bytes([data[at + 1] ^ 8]) + data[at + 2 :])
    ran = case.run("--resume")
    assert ran.code == 2
    assert "another version of PyAV" in ran.err
    assert len(files.partial.read_bytes()) == len(data)


def test_beginning_anew_replaces_what_was_finished_only_when_it_has_something(case, whole, monkeypatch) -> None:
    files = OutputFiles.of(case.out)
    kept = files.partial.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(long_video, "_decode", lambda *given: (_ for _ in ()).throw(InfiniteTalkError("No.")))
        ran = case.run("--seed", "1")
    assert f"finished is in {files.partial}, and is replaced by the first window" in ran.err
    assert files.partial.read_bytes() == kept
    assert journal.finished_windows(files) == 3
    assert case.run().code == 0
    assert_as_the_whole(case, whole)


def test_nothing_to_go_on_with_starts_from_the_first_window(whole, tmp_path) -> None:
    case = Case(tmp_path, whole.arguments)
    ran = case.run("--resume")
    assert ran.code == 0
    assert "nothing to go on with" in ran.err
    assert_as_the_whole(case, whole)


def test_a_run_that_ended_while_the_video_was_put_in_place(whole, tmp_path, monkeypatch) -> None:
    case = Case(tmp_path, whole.arguments)

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(video.VideoWriter, "_copy_to", full)
        ran = case.run()
    assert ran.code == 2
    assert f"finished is in {case.partial}" in ran.err
    monkeypatch.setattr(make_video, "load_dit", lambda *given, **options: pytest.fail("nothing is left to be made"))
    assert case.run("--resume").code == 0
    assert_as_the_whole(case, whole)


@pytest.mark.parametrize(("where", "name"), [(video, "_add_whole"), (journal, "replace_file")])
def test_a_disk_that_is_full_after_finished_windows(whole, tmp_path, monkeypatch, where, name) -> None:
    """While frames are appended, or their entry is written; with space again, the video becomes the whole one."""
    case = Case(tmp_path, whole.arguments)
    case.out.write_bytes(b"earlier work")
    write, written = getattr(where, name), []

    def full(*given: object) -> None:
        written.append(given)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*given)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, full)
        ran = case.run()
        again = case.run("--resume")
    for stopped in (ran, again):
        assert stopped.code == 2
        last = stopped.err.rstrip().splitlines()[-1]
        assert "there is no space left for it" in last
        assert f"finished is in {case.partial}, which plays" in last
    assert case.out.read_bytes() == b"earlier work"
    assert len(frames_of(case.partial)) >= 5 + (ran.announced - 1) * NEW > 5
    assert journal.finished_windows(OutputFiles.of(case.out)) == ran.announced
    resumed = case.run("--resume")
    assert resumed.code == 0, resumed.err
    assert_as_the_whole(case, whole)


# --- descriptions


def test_a_file_is_known_by_its_content_and_a_large_one_by_its_head_size_and_time(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(journal, "WHOLE", 100)
    one, other = tmp_path / "one", tmp_path / "other"
    for size, head in ((100, False), (101, True)):
        for path in (one, other):
            path.write_bytes(bytes(size))
            os.utime(path, (1, 1))
        assert digest_of_file(one) == digest_of_file(other)
        os.utime(other, (2, 2))
        assert (digest_of_file(one) == digest_of_file(other)) == (not head)
        other.write_bytes(bytes(size - 1) + b"1")
        os.utime(other, (1, 1))
        assert digest_of_file(one) != digest_of_file(other) or head
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_bytes(b"a")
    before = digest_of_file(tmp_path / "folder")
    (tmp_path / "folder" / "a").write_bytes(b"b")
    assert digest_of_file(tmp_path / "folder") != before
    assert digest_of_file(tmp_path / "none") == str(tmp_path / "none")


def test_every_field_of_a_job_decides_unless_it_is_known_not_to(tiny_set) -> None:
    """A field that is added later decides, until somebody says that it does not."""
    known = {
        "files",
        "audio",
        "image",
        "video",
        "masks",
        "references",
        "loras",
    }  # none of their files is named without one
    job = make_video.Job(make_video.ModelFiles("m", "v", "t", "w", "c"), ("a",), "o")
    named = set(make_video._what(job))
    for name in set(vars(job)) - known - set(make_video.NOT_WHAT):
        assert name.replace("_", " ") in named, name
    assert {"model", "vae", "decoder", "audio", "image", "seed", "cfg", "scheduler"} <= named


def test_the_name_of_a_small_decoder_decides_as_it_says_what_latents_it_takes() -> None:
    files = make_video.ModelFiles("m", "v", "t", "w", "c")
    named = [
        make_video._what(make_video.Job(replace(files, decoder=name), ("a",), "o"))["scale of the decoder's latents"]
        for name in ("folder/taew2_1.pth", "folder/LightTAEW2_1.safetensors", "light/taew2_1.safetensors")
    ]
    assert named == ["normalized", "raw", "normalized"]


def test_tensors_are_described_by_their_content() -> None:
    one = torch.arange(6.0).reshape(2, 3)
    same = describe("x", one) == describe("x", one.t().contiguous().t())
    assert same
    assert describe("x", one) != describe("x", one.reshape(3, 2))
    assert describe("x", one) != describe("x", one.bfloat16())
    assert describe("x", [one, one + 1]).keys() == {"x 1", "x 2"}


def test_an_entry_comes_back_bit_for_bit(tmp_path) -> None:
    files = OutputFiles.of(tmp_path / "out.mp4")
    files.partial.write_bytes(bytes(10))
    generator = torch.Generator().manual_seed(1)
    carried = torch.randn(3, 9, 8, 8)[:, 4:]
    state = RunState(2, generator.get_state(), carried, "sdpa", torch.randn(16, 2, 1, 1).bfloat16())
    Journal(files, {"seed": "1"}, {"the device": "cpu"}).save(state, Written(8, 10, 2), {"sdpa": 3})
    entry = Journal(files, {"seed": "1"}, {"the device": "cpu"}).start(resume=True)
    assert entry is not None
    assert torch.equal(entry.state.carried, carried)
    assert torch.equal(entry.state.latents, state.latents)
    assert torch.equal(entry.state.generator, state.generator)
    assert (entry.state.windows, entry.state.floor, entry.written) == (2, "sdpa", Written(8, 10, 2))
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["out.partial.mp4", "out.partial.safetensors"]
    with pytest.raises(InputError, match="seed 2, was 1"):
        Journal(files, {"seed": "2"}, {}).start(resume=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_the_command_like_ctrl_c(monkeypatch, capsys, number) -> None:
    def run(args: object) -> None:
        os.kill(os.getpid(), number)
        raise AssertionError("the signal came to nothing")

    monkeypatch.setattr(cli, "COMMANDS", (cli.Command("wait", "", lambda parser: None, run),))
    before = signal.signal(number, signal.SIG_DFL)  # nohup, under which the tests may run, has SIGHUP ignored
    try:
        assert cli.main(["wait"]) == 128 + number
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err == "infinitetalk: Terminated.\n"
