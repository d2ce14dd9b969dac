"""Writing videos window by window, and reading them again."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from wanvideo_infinitetalk.media.video import OutputFiles, VideoFrames, VideoWriter, check_output
from wanvideo_infinitetalk.wanvideo.errors import InfiniteTalkError, InputError

FPS = 25


def _frames(count: int, height: int = 48, width: int = 64, start: int = 0) -> torch.Tensor:
    """Gray frames that show their index: (index * 8) % 240."""
    levels = (torch.arange(start, start + count) * 8 % 240).to(torch.uint8)
    return levels[:, None, None, None].expand(count, height, width, 3)


def _tone(seconds: float, rate: int) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def _decode(path: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Frames [n, H, W, 3], sound [samples] and its rate."""
    with av.open(str(path)) as container:
        images = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return images, np.zeros(0), 0
        pieces = [f.to_ndarray().mean(0) for f in container.decode(audio=0)]
        rate = container.streams.audio[0].rate
    return images, np.concatenate(pieces), rate


def _durations(path: Path) -> dict[str, float]:
    with av.open(str(path)) as container:
        return {s.type: float(s.duration * s.time_base) for s in container.streams if s.duration is not None}


def _write(path: Path, seconds: float, rate: int, windows: int = 3) -> int:
    total = round(seconds * FPS)
    sizes = [len(part) for part in np.array_split(np.arange(total), windows)]
    with VideoWriter(path, FPS, _tone(seconds, rate), rate) as writer:
        for index, size in enumerate(sizes):
            writer.append(_frames(size, start=sum(sizes[:index])))
    return total


@pytest.mark.parametrize(
    ("rate", "seconds"),
    [(8000, 0.2), (16000, 0.04), (16000, 2.013), (22050, 1.0), (44100, 1.5), (48000, 2.5), (96000, 1)],
)
def test_image_and_sound_last_as_long_as_the_recording(tmp_path, rate, seconds) -> None:
    path = tmp_path / "out.mp4"
    total = _write(path, seconds, rate)
    durations = _durations(path)
    assert abs(durations["video"] - seconds) <= 1 / FPS + 1e-6
    assert abs(durations["audio"] - seconds) <= 1 / FPS + 1e-6
    images, sound, out_rate = _decode(path)
    assert len(images) == total
    assert abs(len(sound) / out_rate - seconds) <= 0.05  # whole AAC packets


def test_frames_and_sound_come_back_in_order(tmp_path) -> None:
    path = tmp_path / "out.mp4"
    total = _write(path, 3.0, 16000)
    images, sound, rate = _decode(path)
    levels = images.mean(axis=(1, 2, 3))
    assert np.abs(levels - np.arange(total) * 8 % 240).max() < 6
    loud = sound[rate // 2 : rate * 2]
    spectrum = np.abs(np.fft.rfft(loud))
    assert abs(np.argmax(spectrum) / len(loud) * rate - 440) < 3
    assert 0.15 < np.sqrt((loud**2).mean()) < 0.25


def test_frames_of_short_windows_are_shown_at_their_times(tmp_path) -> None:
    """An encoder reorders none of one or two frames, and those of the first window."""
    sizes = (8, 2, 4, 1, 3)
    with VideoWriter(tmp_path / "v.mp4", FPS) as writer:
        for index, size in enumerate(sizes):
            writer.append(_frames(size, start=sum(sizes[:index])))
        times = [_times(writer.files.partial)]
    times.append(_times(tmp_path / "v.mp4"))
    assert times == [list(range(sum(sizes)))] * 2
    assert len(VideoFrames(tmp_path / "v.mp4")) == sum(sizes)


def _times(path: Path) -> list[float]:
    """When each frame is shown, in frames."""
    with av.open(str(path)) as container:
        return [float(frame.pts * frame.time_base * FPS) for frame in container.decode(video=0)]


def test_the_finished_file_is_an_ordinary_mp4_alone_in_its_folder(tmp_path) -> None:
    path = tmp_path / "new" / "folder" / "out.mp4"
    _write(path, 1.0, 16000)
    assert [p.name for p in path.parent.iterdir()] == ["out.mp4"]
    data = path.read_bytes()
    assert b"moof" not in data
    assert data.index(b"moov") < data.index(b"mdat")


def test_colors_survive(tmp_path) -> None:
    path = tmp_path / "out.mp4"
    colors = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.2, 0.5, 0.8]])
    with VideoWriter(path) as writer:
        for color in colors:
            writer.append(color.expand(6, 64, 64, 3))
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.colorspace == 1
        frames = [f.to_ndarray() for f in container.decode(video=0)]  # [96, 64]: luma above, chroma below
    for index, (red, green, blue) in enumerate(colors.tolist()):
        luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # ITU-R BT.709-6, items 3.2 and 3.3
        expected = [16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748]
        planes = frames[6 * index + 3]
        assert np.abs([planes[:64].mean(), planes[64:80].mean(), planes[80:].mean()] - np.array(expected)).max() < 3


def test_floats_are_rounded_and_clipped(tmp_path) -> None:
    path = tmp_path / "out.mp4"
    with VideoWriter(path, crf=0) as writer:
        writer.append(torch.stack([torch.full((32, 32, 3), v) for v in (-0.5, 0.5, 1.5)]))
    levels = _decode(path)[0].mean((1, 2, 3))
    assert np.abs(levels - [0, 128, 255]).max() < 2


@pytest.mark.parametrize(("height", "width"), [(49, 64), (48, 65), (1, 1), (33, 35)])
def test_odd_sizes_get_one_more_row_or_column(tmp_path, height, width) -> None:
    path = tmp_path / "out.mp4"
    with VideoWriter(path) as writer:
        writer.append(_frames(5, height, width))
    assert _decode(path)[0].shape == (5, height + height % 2, width + width % 2, 3)


def test_sound_is_cut_with_the_image(tmp_path) -> None:
    path = tmp_path / "out.mp4"
    with VideoWriter(path, FPS, _tone(10, 48000), 48000) as writer:
        writer.append(_frames(25))
    assert abs(_durations(path)["audio"] - 1.0) <= 1 / FPS + 1e-6


def test_stereo_and_other_rates_of_frames(tmp_path) -> None:
    path = tmp_path / "out.mp4"
    with VideoWriter(path, 29.97, np.stack([_tone(1, 44100)] * 2), 44100) as writer:
        writer.append(_frames(30))
    with av.open(str(path)) as container:
        assert container.streams.audio[0].channels == 2
        assert abs(float(container.streams.video[0].average_rate) - 29.97) < 1e-3


def test_an_error_outside_leaves_what_was_appended(tmp_path) -> None:
    path = tmp_path / "out.mp4"

    def run() -> None:
        with VideoWriter(path, FPS, _tone(10, 16000), 16000) as writer:
            writer.append(_frames(40))
            raise KeyboardInterrupt

    path.write_bytes(b"earlier work")
    with pytest.raises(KeyboardInterrupt):
        run()
    images, sound, rate = _decode(tmp_path / "out.partial.mp4")
    assert len(images) == 40
    assert abs(len(sound) / rate - 40 / FPS) <= 1 / FPS + 2048 / 48000
    assert path.read_bytes() == b"earlier work"


def test_nothing_appended_makes_no_file(tmp_path) -> None:
    with VideoWriter(tmp_path / "out.mp4"):
        pass
    assert list(tmp_path.iterdir()) == []


CHILD = """
    import os, resource, sys
    import numpy as np, torch
    from wanvideo_infinitetalk.media.video import VideoWriter
    from wanvideo_infinitetalk.wanvideo.errors import InfiniteTalkError
    writer = VideoWriter(sys.argv[1], 25, np.zeros(16000 * 60, np.float32), 16000)
    noise = torch.randint(0, 255, (72, 96, 128, 3), dtype=torch.uint8)
"""


def _child(path: Path, code: str) -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(CHILD) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=120)


def test_a_killed_process_leaves_every_appended_frame(tmp_path) -> None:
    result = _child(tmp_path / "out.mp4", "for _ in range(2): writer.append(noise)\nos._exit(9)")
    assert result.returncode == 9, result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial.mp4"]
    assert len(_decode(tmp_path / "out.partial.mp4")[0]) == 144


def test_fragments_come_into_force_by_their_last_write(tmp_path, monkeypatch) -> None:
    """What is on the disk before it plays as what was there before."""
    partial = tmp_path / "out.partial.mp4"
    writer = VideoWriter(tmp_path / "out.mp4", FPS, _tone(3, 16000), 16000)
    writer.append(_frames(30))
    size, states = partial.stat().st_size, []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: fsync(number) or states.append(partial.read_bytes()))
    writer.append(_frames(30, start=30))
    before, after = states
    assert len(before) == len(after) == partial.stat().st_size > size
    assert [i for i in range(len(before)) if before[i] != after[i]] == [*range(size + 2, size + 8)]
    (tmp_path / "torn.mp4").write_bytes(before)
    assert len(_decode(tmp_path / "torn.mp4")[0]) == 30
    assert len(_decode(partial)[0]) == 60


def test_sound_is_where_it_was_in_the_recording(tmp_path) -> None:
    clicks = np.zeros(3 * 48000, np.float32)
    for second in (0.5, 1.0, 2.0, 2.5):
        clicks[round(second * 48000) :][:480] = 0.5
    with VideoWriter(tmp_path / "out.mp4", FPS, clicks, 48000) as writer:
        for start in (0, 25, 50):
            writer.append(_frames(25, start=start))
    _, sound, rate = _decode(tmp_path / "out.mp4")
    for second in (0.5, 1.0, 2.0, 2.5):
        near = np.abs(sound[round((second - 0.1) * rate) : round((second + 0.1) * rate)])
        assert abs(np.argmax(near > 0.2) / rate - 0.1) < 0.005


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.999])
def test_a_write_that_was_stopped_half_way_leaves_what_came_before(tmp_path, share) -> None:
    """What `_add_whole` has written at any moment before its last eight bytes."""
    path, partial = tmp_path / "out.mp4", tmp_path / "out.partial.mp4"
    writer = VideoWriter(path, FPS, _tone(3, 16000), 16000)
    before = writer.append(_frames(30))
    whole = partial.read_bytes()
    writer.append(_frames(30, start=30))
    more = partial.read_bytes()[len(whole) :]
    partial.write_bytes(whole + bytes(8) + more[8 : round(share * len(more))])
    assert len(_decode(partial)[0]) == 30
    with VideoWriter(path, FPS, _tone(3, 16000), 16000, written=before) as second:
        second.append(_frames(30, start=30))
    assert np.abs(_decode(path)[0].mean((1, 2, 3)) - np.arange(60) * 8 % 240).max() < 6


def test_a_full_disk_is_one_sentence_and_leaves_the_last_video_and_what_was_finished(tmp_path) -> None:
    """A limit on the file's size stands in for the disk: both make writes fail half-way."""
    path = tmp_path / "out.mp4"
    path.write_bytes(b"earlier work")
    result = _child(
        path,
        """
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))
        try:
            with writer:
                for _ in range(8): writer.append(noise)
        except InfiniteTalkError as error:
            print(error)
        print(writer.written.frames)
        """,
    )
    assert result.returncode == 0, result.stderr
    assert "could not be written: there is no space left for it" in result.stdout
    assert f"finished is in {tmp_path / 'out.partial.mp4'}" in result.stdout
    assert "Free some space" in result.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.mp4", "out.partial.mp4"]
    assert path.read_bytes() == b"earlier work"
    frames = int(result.stdout.split()[-1])
    assert 0 < frames == len(_decode(tmp_path / "out.partial.mp4")[0])


def test_a_disk_that_fills_while_the_video_is_put_in_place(tmp_path) -> None:
    path = tmp_path / "out.mp4"
    result = _child(
        path,
        """
        try:
            with writer:
                writer.append(noise)
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        except InfiniteTalkError as error:
            print(error)
        """,
    )
    assert "no space left" in result.stdout, result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial.mp4"]
    assert len(_decode(tmp_path / "out.partial.mp4")[0]) == 72


@pytest.mark.parametrize("existing", [True, False])
def test_a_symbolic_link_as_output_leads_to_the_file(tmp_path, existing) -> None:
    (tmp_path / "large disk").mkdir()
    file = tmp_path / "large disk" / "file.mp4"
    if existing:
        file.write_bytes(b"earlier work")
    (tmp_path / "out.mp4").symlink_to(file)
    _write(tmp_path / "out.mp4", 0.4, 16000)
    assert (tmp_path / "out.mp4").is_symlink()
    assert len(_decode(file)[0]) == 10
    assert [p.name for p in file.parent.iterdir()] == ["file.mp4"]


def test_a_second_name_of_the_last_video_keeps_it(tmp_path) -> None:
    (tmp_path / "out.mp4").write_bytes(b"earlier work")
    (tmp_path / "kept.mp4").hardlink_to(tmp_path / "out.mp4")
    _write(tmp_path / "out.mp4", 0.4, 16000)
    assert (tmp_path / "kept.mp4").read_bytes() == b"earlier work"


@pytest.mark.parametrize("name", ["pipe:1.mp4", "file:x.mp4", "concat:a|b.mp4", "a:b%03d.mp4", "-y.mp4", "é ü.mp4"])
def test_names_that_look_like_addresses_are_names(tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    _write(Path(name), 0.4, 16000)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert len(_decode(tmp_path / name)[0]) == 10


@pytest.mark.parametrize("name", ["http://x/out.mp4", "rtmp://x/out.mp4", "file:///tmp/out.mp4"])
def test_addresses_are_no_outputs(tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="address"):
        check_output(Path(name))
    assert list(tmp_path.iterdir()) == []


def _other_ways_to(path: Path) -> dict[str, Path]:
    """Paths that lead to an existing file."""
    folder = path.parent
    (folder / "soft.mp4").symlink_to(path)
    (folder / "softer.mp4").symlink_to(folder / "soft.mp4")
    (folder / "hard.mp4").hardlink_to(path)
    (folder / "linked").symlink_to(folder, target_is_directory=True)
    return {
        "itself": path,
        "relative": Path(os.path.relpath(path)),
        "dots": folder / "linked" / ".." / folder.name / path.name,
        "soft": folder / "soft.mp4",
        "softer": folder / "softer.mp4",
        "hard": folder / "hard.mp4",
        "through a folder": folder / "linked" / path.name,
    }


@pytest.mark.parametrize("way", ["itself", "relative", "dots", "soft", "softer", "hard", "through a folder"])
def test_an_output_that_is_an_input_is_rejected_whatever_leads_to_it(tmp_path, way) -> None:
    path = tmp_path / "in.mp4"
    path.write_bytes(b"a source")
    ways = _other_ways_to(path)
    before = sorted(tmp_path.iterdir())
    for out, given in ((ways[way], path), (path, ways[way])):
        with pytest.raises(InputError, match="overwrite its own input"):
            check_output(out, [tmp_path / "other.wav", given])
    assert path.read_bytes() == b"a source"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("file", ["partial", "journal", "lock", "temporary"])
def test_what_stands_beside_the_output_is_no_input_either(tmp_path, file) -> None:
    files = OutputFiles.of(tmp_path / "out.mp4")
    with pytest.raises(InputError, match="overwrite its own input"):
        check_output(files.video, [getattr(files, file)])


def test_one_run_at_a_time_writes_a_video(tmp_path) -> None:
    (tmp_path / "link.mp4").symlink_to(tmp_path / "out.mp4")
    first = OutputFiles.of(tmp_path / "out.mp4")
    with first.locked():
        for path in (first.video, tmp_path / "link.mp4", tmp_path / "x" / ".." / "out.mp4"):
            with pytest.raises(InputError, match="Another run is writing"), OutputFiles.of(path).locked():
                pass
        with OutputFiles.of(tmp_path / "other.mp4").locked():
            pass
    with first.locked():
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["link.mp4"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("out.avi", r"end in \.mp4"),
        ("folder.mp4", "is a folder"),
        ("file/out.mp4", "not be written"),
        ("fifo.mp4", "no file that can be replaced"),
        ("loop.mp4", "not be written|no file"),
        ("out.partial.mp4", "name the video itself, out.mp4"),
        ("n" * 240 + ".mp4", "too long"),
        ("n" * 300 + ".mp4", "too long"),
        ("a\0.mp4", "null byte"),
    ],
)
def test_paths_that_cannot_be_written(tmp_path, path, message) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    os.mkfifo(tmp_path / "fifo.mp4")
    with pytest.raises(InfiniteTalkError, match=message), VideoWriter(tmp_path / path) as writer:
        writer.append(_frames(1))


def test_what_does_not_fit_is_rejected(tmp_path) -> None:
    path = tmp_path / "out.mp4"
    with pytest.raises(InputError, match="one or two channels"):
        VideoWriter(path, sound=np.zeros((3, 10)), rate=16000)
    with pytest.raises(InputError, match="give its rate"):
        VideoWriter(path, sound=np.zeros(10))
    with pytest.raises(InputError, match="25"):
        VideoWriter(path, fps=0)
    with VideoWriter(path) as writer:
        with pytest.raises(InputError, match="height, width, 3"):
            writer.append(torch.zeros(3, 8, 8))
        writer.append(_frames(2))
        with pytest.raises(InputError, match="one size"):
            writer.append(_frames(2, 32, 32))


# --- reading


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "source.mp4"
    with VideoWriter(path, 25, crf=0) as writer:
        writer.append(_frames(29))
    return path


def _level(frame: np.ndarray) -> int:
    return round(frame.mean() / 8)


def test_frames_by_index(source) -> None:
    frames = VideoFrames(source, keep=5)
    assert len(frames) == 29
    assert frames[0].shape == (48, 64, 3)
    # forward, within what is kept, and back to the beginning
    assert [_level(frames[i]) for i in (0, 7, 8, 5, 28, 3, 4)] == [0, 7, 8, 5, 28, 3, 4]
    with pytest.raises(IndexError):
        frames[29]


@pytest.mark.parametrize(("fps", "length"), [(50, 58), (12.5, 14), (25, 29)])
def test_other_rates_repeat_and_leave_out(source, fps, length) -> None:
    frames = VideoFrames(source, fps=fps)
    assert abs(len(frames) - length) <= 1
    levels = [_level(frames[i]) for i in range(len(frames))]
    assert np.abs(np.array(levels) - np.arange(len(frames)) * 25 / fps).max() <= 1


def test_sources_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        VideoFrames(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(InputError, match="cannot be read as a video"):
        VideoFrames(tmp_path / "text.mp4")
