"""What containers say about sound and images: times, rates, turns, colors; and files that would lead elsewhere."""

from __future__ import annotations

import itertools
import math
import os
import socket
import struct
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from wanvideo_infinitetalk.media import audio
from wanvideo_infinitetalk.media.audio import load_speech, read_audio
from wanvideo_infinitetalk.media.video import VideoFrames, VideoWriter, _turned
from wanvideo_infinitetalk.wanvideo.errors import InputError

RATE = 16000
FPS = 25


def clicks(seconds: float, every: float = 0.5, rate: int = RATE, first: float = 0.0) -> np.ndarray:
    """Short bursts of noise at every half second, [samples]."""
    wave = np.zeros(round(seconds * rate), np.float32)
    burst = np.random.default_rng(0).uniform(-0.5, 0.5, rate // 50).astype(np.float32)
    for begin in np.arange(first, seconds - 0.02, every):
        at = round(begin * rate)
        wave[at : at + len(burst)] = burst
    return wave


def onsets(wave: np.ndarray, rate: int) -> list[float]:
    """Seconds at which a burst begins: the first loud sample after 0.1 s without one."""
    found: list[float] = []
    last = -1.0
    for index in np.flatnonzero(np.abs(wave) > 0.1):
        if index / rate - last > 0.1:
            found.append(index / rate)
        last = index / rate
    return found


def flashes(video: VideoFrames) -> list[int]:
    """Frames that begin to be white."""
    levels = [video[i].mean() > 128 for i in range(len(video))]
    return [i for i in range(len(levels)) if levels[i] and (i == 0 or not levels[i - 1])]


Interval = tuple[float, float]


def write_av(
    path: Path,
    *,
    video: list[float] = (),  # type: ignore[assignment]
    sound: list[Interval] = (),  # type: ignore[assignment]
    codec: str = "libx264",
    container: str | None = None,
) -> None:
    """A file whose frames are shown at the times of `video`, white for 0.2 s from each half second on, and whose sound,
    `clicks`, is there in the intervals of `sound`."""
    options = {"g": "5"} if codec == "libx264" else {}
    with av.open(str(path), "w", format=container) as file:
        streams = []
        if video:
            images = file.add_stream(codec, rate=FPS, options=options)
            images.width, images.height, images.pix_fmt = 32, 32, "yuv420p"
            streams.append(images)
        if sound:
            heard = file.add_stream(
                "libmp3lame" if path.suffix in (".avi", ".flv") else "aac", rate=44100, layout="mono"
            )
            streams.append(heard)
        packets = []
        for time in video:
            white = 255 * (round(time * FPS) % 12 < 5)
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), white, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time * FPS), Fraction(1, FPS)
            packets += images.encode(frame)
        packets += images.encode(None) if video else []
        for begin, end in sound:
            wave = clicks(60, every=12 / FPS, rate=44100)[round(begin * 44100) : round(end * 44100)]
            for at in range(0, len(wave) - 1151, 1152):
                part = av.AudioFrame.from_ndarray(wave[None, at : at + 1152].copy(), format="fltp", layout="mono")
                part.sample_rate, part.pts, part.time_base = 44100, round(begin * 44100) + at, Fraction(1, 44100)
                packets += heard.encode(part)
        packets += heard.encode(None) if sound else []
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            file.mux(packet)


# --- times ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.mov", "a.nut"])
@pytest.mark.parametrize(
    ("image_from", "sound_from"), [(0.0, 0.0), (0.48, 0.0), (0.0, 0.48), (0.2, 1.44), (5.0, 5.0), (0.96, 0.48)]
)
def test_sound_and_images_of_one_file_stay_together(tmp_path, name, image_from, sound_from) -> None:
    path = tmp_path / name
    write_av(path, video=[image_from + i / FPS for i in range(60)], sound=[(sound_from, 4.0 + sound_from)])
    wave, rate = read_audio(path)
    seen, heard = flashes(VideoFrames(path)), onsets(wave, rate)
    # Both flash and click come at each 12th frame; those at the border of a stream may be cut.
    seen = [frame / FPS for frame in seen if frame > 2]
    pairs = [(s, min(heard, key=lambda h, s=s: abs(h - s))) for s in seen if heard[0] <= s <= heard[-1]]
    assert len(pairs) >= 2
    for image, sound in pairs:
        assert abs(image - sound) < 1 / FPS + 1e-3


def in_players(path: Path) -> tuple[list[float], list[float]]:
    """(seconds at which flashes begin, seconds at which clicks begin), by the time stamps of the decoded frames."""
    with av.open(str(path)) as file:
        shown = [(f.time, f.to_ndarray(format="gray").mean() > 128) for f in file.decode(video=0)]
    with av.open(str(path)) as file:
        parts = [(f.time, f.to_ndarray()[0]) for f in file.decode(audio=0)]
        rate = file.streams.audio[0].rate
    seen = [time for (_, before), (time, white) in itertools.pairwise([(0.0, False), *shown]) if white and not before]
    return seen, [time + parts[0][0] for time in onsets(np.concatenate([samples for _, samples in parts]), rate)]


@pytest.mark.parametrize("rate", [16000, 22050])  # AAC knows the first one, the other is resampled
@pytest.mark.parametrize(
    "seconds", [5, pytest.param(60, marks=pytest.mark.slow), pytest.param(300, marks=pytest.mark.slow)]
)
def test_sound_and_images_stay_together_over_all_windows(tmp_path, seconds, rate) -> None:
    """Written as a job does, window by window with a lossy encoder; each flash has its click."""
    every = 12  # frames
    sound = clicks(seconds, every=every / FPS, rate=rate)
    white = torch.arange(seconds * FPS) % every < 5
    writer = VideoWriter(tmp_path / "a.mp4", FPS, sound, rate)
    with writer:
        for begin in [0, *range(81, len(white), 72)]:
            part = white[begin : 81 if begin == 0 else begin + 72]
            writer.append(part[:, None, None, None].expand(-1, 32, 32, 3).float())
        partial = in_players(writer.files.partial)
    # In partial files the sound comes as much later as its encoder's first packet lasts.
    for (seen, heard), bound in ((partial, 1 / FPS), (in_players(tmp_path / "a.mp4"), 0.001)):
        count = math.ceil(seconds * FPS / every)
        assert len(seen) == len(heard) == count
        apart = max(abs(s - h) for s, h in zip(seen, heard, strict=True))
        assert apart < bound
        assert max(abs(s - n * every / FPS) for n, s in enumerate(seen)) < 1e-6
    assert len(VideoFrames(tmp_path / "a.mp4")) == seconds * FPS


def test_gaps_of_sound_are_silence_and_gaps_of_images_a_standing_one(tmp_path) -> None:
    path = tmp_path / "gap.mkv"
    write_av(path, video=[*(i / FPS for i in range(24)), *(i / FPS for i in range(72, 96))], sound=[(0, 0.9), (2.4, 4)])
    wave, rate = read_audio(path)
    heard = onsets(wave, rate)
    assert all(min(abs(onset - expected) for onset in heard) < 0.03 for expected in (0, 0.48, 2.88, 3.36, 3.84))
    assert np.abs(wave[round(1.2 * rate) : round(2.3 * rate)]).max() < 0.01
    video = VideoFrames(path)
    assert len(video) == pytest.approx(97, abs=2)  # the last one's length is a mean
    assert flashes(video)[-2:] == [72, 84]


def test_a_gap_of_hours_is_damage(tmp_path) -> None:
    path = tmp_path / "gap.mkv"
    write_av(path, sound=[(0, 0.5)])
    with av.open(str(path)) as source, av.open(str(tmp_path / "late.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux():
            if packet.dts is not None:
                late = round(36000 / packet.time_base) if packet.pts * packet.time_base > 0.2 else 0
                packet.pts, packet.dts, packet.stream = packet.pts + late, packet.dts + late, stream
                target.mux(packet)
    with pytest.raises(InputError, match=r"leave 3\d+ s without sound at 0\.2 s"):
        read_audio(tmp_path / "late.mkv")


def test_a_video_whose_images_have_no_presentation_times(tmp_path) -> None:
    path = tmp_path / "a.avi"
    write_av(path, video=[i / FPS for i in range(50)], sound=[(0, 2)], codec="mpeg4")
    video = VideoFrames(path)
    assert len(video) == pytest.approx(50, abs=1)
    assert flashes(video) == pytest.approx([0, 12, 24, 36, 48], abs=1)


# --- rates and lengths ----------------------------------------------------------------------------------------------


def tone(seconds: float, rate: int, channels: int) -> np.ndarray:
    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)
    return np.stack([wave] * channels).astype(np.float32)


def pitch(wave: np.ndarray, rate: int) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(wave))) * rate / len(wave))


@pytest.mark.parametrize("codec", ["aac", "mp3"])
@pytest.mark.parametrize(
    ("one", "other"), [((24000, 1), (48000, 2)), ((48000, 2), (24000, 1)), ((44100, 1), (44100, 1))]
)
def test_a_rate_that_changes_midway(tmp_path, codec, one, other) -> None:
    data = b""
    for number, (rate, channels) in enumerate((one, other)):
        part = tmp_path / f"{number}.{codec}"
        with av.open(str(part), "w", format={"aac": "adts"}.get(codec, codec)) as file:
            layout = "mono" if channels == 1 else "stereo"
            stream = file.add_stream({"mp3": "libmp3lame"}.get(codec, codec), rate=rate, layout=layout)
            frame = av.AudioFrame.from_ndarray(tone(1, rate, channels), format="fltp", layout=layout)
            frame.sample_rate, frame.pts = rate, 0
            for packet in stream.encode(frame) + stream.encode(None):
                file.mux(packet)
        data += part.read_bytes()
    (tmp_path / f"both.{codec}").write_bytes(data)
    wave, rate = read_audio(tmp_path / f"both.{codec}")
    assert len(wave) / rate == pytest.approx(2.0, abs=0.15)
    for begin in (0.2, 1.3):
        assert pitch(wave[round(begin * rate) : round((begin + 0.5) * rate)], rate) == pytest.approx(440, abs=4)


@pytest.mark.parametrize("form", ["mp3", "ogg"])
def test_recordings_that_were_appended_to_one_another(tmp_path, form) -> None:
    path = tmp_path / f"a.{form}"
    soundfile.write(path, tone(1, RATE, 1)[0], RATE)
    alone, _ = read_audio(path)
    assert len(alone) == RATE
    path.write_bytes(path.read_bytes() * 2)
    wave, rate = read_audio(path)
    assert len(wave) / rate == pytest.approx(2.0, abs=0.15)
    assert pitch(wave[round(1.3 * rate) : round(1.8 * rate)], rate) == pytest.approx(440, abs=4)


@pytest.mark.parametrize("riff", [None, 0, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("length", [None, 0, 0x7FFFF000, 0xFFFFFFFF])
@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT", "ULAW"])
def test_sizes_in_wav_headers_that_were_never_completed(tmp_path, riff, length, subtype) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, clicks(2), RATE, subtype=subtype)
    expected, _ = read_audio(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    end = at + 4 + len(expected) * {"PCM_16": 2, "FLOAT": 4, "ULAW": 1}[subtype]
    data = data[:end]  # what is behind the samples would be read as some
    if riff is not None:
        data[4:8] = struct.pack("<I", riff)
    if length is not None:
        data[at : at + 4] = struct.pack("<I", length)
    path.write_bytes(data)
    wave, rate = read_audio(path)
    assert rate == RATE
    assert np.array_equal(wave, expected)


@pytest.mark.parametrize(
    ("subtype", "form"),
    [
        *((subtype, "wav") for subtype in ("GSM610", "ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM", "NMS_ADPCM_32")),
        *(
            ("G721_32", "au"),
            ("ULAW", "au"),
            ("ALAW", "aiff"),
            ("PCM_16", "rf64"),
            ("PCM_24", "w64"),
            ("ALAC_16", "caf"),
        ),
    ],
)
def test_recordings_of_telephones_and_rarer_forms(tmp_path, subtype, form) -> None:
    path = tmp_path / f"a.{form}"
    soundfile.write(path, tone(1, 8000, 1)[0], 8000, subtype=subtype, format=form.upper())
    wave, rate = read_audio(path)
    assert rate == 8000
    assert len(wave) == pytest.approx(8000, abs=400)
    assert pitch(wave, rate) == pytest.approx(440, abs=2)


@pytest.mark.parametrize("rate", [1, 100, 1999, 768_001, 2**31 - 1])
def test_rates_that_no_speech_has(tmp_path, rate) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(5000), rate)
    with pytest.raises(InputError, match=f"states {rate} samples a second"):
        read_audio(tmp_path / "a.wav")
    with pytest.raises(InputError, match=f"states {rate} samples a second"):
        load_speech(np.zeros(5000, np.float32), rate)


# --- turns and colors -----------------------------------------------------------------------------------------------

MATRICES = [(a, b, c, d) for a, b, c, d in ((1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0))]
MATRICES += [(-a, b, -c, d) for a, b, c, d in MATRICES]


def moved(pixels: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """Each pixel put where x' = a x + c y, y' = b x + d y says, and the whole moved to the origin."""
    height, width = pixels.shape[:2]
    places = {(a * x + c * y, b * x + d * y): pixels[y, x] for y in range(height) for x in range(width)}
    left, top = min(x for x, _ in places), min(y for _, y in places)
    out = np.zeros((max(y for _, y in places) - top + 1, max(x for x, _ in places) - left + 1, 3), pixels.dtype)
    for (x, y), value in places.items():
        out[y - top, x - left] = value
    return out


@pytest.mark.parametrize("matrix", MATRICES)
def test_turned_and_mirrored_videos_look_as_players_show_them(tmp_path, matrix) -> None:
    a, b, c, d = matrix
    image = np.zeros((32, 64, 3), np.uint8)
    image[:16, :32, 0] = image[:16, 32:, 1] = image[16:, :32, 2] = 255  # red, green / blue, black
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=FPS, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv444p"
        for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")) + stream.encode(None):
            file.mux(packet)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # ISO/IEC 14496-12, 8.3.2
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    frame = VideoFrames(path)[0]
    expected = moved(image, a, b, c, d)
    assert frame.shape == expected.shape
    assert np.abs(frame.astype(int) - expected).mean() < 12


def test_angles_between_quarter_turns_are_the_nearest_one() -> None:
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    angle = np.deg2rad(80)
    cos, sin = round(65536 * np.cos(angle)), round(65536 * np.sin(angle))
    matrix = np.array([cos, sin, 0, -sin, cos, 0, 0, 0, 1 << 30], np.int32)
    assert np.array_equal(_turned(image, matrix), moved(image, 0, 1, -1, 0))


@pytest.mark.parametrize(("aspect", "width"), [("4/3", 85), ("1/2", 32), ("1/1", 64), ("1000/1", 64)])
def test_pixels_that_are_not_square(tmp_path, aspect, width) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 64, 3), np.uint8), format="rgb24")
        for packet in stream.encode(frame) + stream.encode(None):
            file.mux(packet)
    assert VideoFrames(path)[0].shape == (32, width, 3)


# Luma weights of red and blue (ITU-T H.273, table 4).
WEIGHTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("tag", "lines", "standard"),
    [
        (1, 64, "bt709"),
        (1, 720, "bt709"),
        (5, 720, "bt601"),
        (6, 64, "bt601"),
        (9, 64, "bt2020"),
        (None, 64, "bt601"),
        (None, 718, "bt601"),
        (None, 720, "bt709"),
        (None, 1080, "bt709"),
    ],
)
def test_colors_are_what_the_tags_mean(tmp_path, tag, lines, standard, full) -> None:
    red, green, blue = 0.8, 0.3, 0.1
    kr, kb = WEIGHTS[standard]
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = ((blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr))
    y, u, v = (
        (255 * luma, *(128 + 255 * c for c in chroma)) if full else (16 + 219 * luma, *(128 + 224 * c for c in chroma))
    )
    planes = np.full((lines * 3 // 2, 64), round(y), np.uint8)
    planes[lines : lines + lines // 4], planes[lines + lines // 4 :] = round(u), round(v)
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=FPS, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, lines, "yuv420p"
        if tag is not None:
            stream.codec_context.colorspace = tag
        stream.codec_context.color_range = 2 if full else 1
        frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
        for packet in stream.encode(frame) + stream.encode(None):
            file.mux(packet)
    pixel = VideoFrames(path)[0][lines // 2, 32]
    assert np.abs(pixel - 255 * np.array([red, green, blue])).max() < 4


# --- files, not addresses -------------------------------------------------------------------------------------------


@pytest.fixture
def visitors() -> Iterator[list[bytes]]:
    """What comes to a server on this machine; `port` is its first item."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        seen.append(str(server.getsockname()[1]).encode())

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(2)
                    seen.append(connection.recv(100))

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield seen
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)


LISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{target}'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio {port} RTP/AVP 0\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
    '<Representation id="1" mimeType="audio/wav"><BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period>'
    "</MPD>",
}


@pytest.mark.parametrize("name", ["a.wav", "a.mp4", "a.m3u8", "a.ffconcat"])
@pytest.mark.parametrize("kind", sorted(LISTS))
@pytest.mark.parametrize("where", ["net", "file"])
def test_lists_lead_nowhere(tmp_path, visitors, kind, where, name) -> None:
    soundfile.write(tmp_path / "secret.wav", clicks(1), RATE)
    port = visitors[0].decode()
    target = f"http://127.0.0.1:{port}/x.wav" if where == "net" else "secret.wav"
    (tmp_path / name).write_text(LISTS[kind].format(target=target, port=port))
    with pytest.raises(InputError, match="cannot be read as a recording"):
        read_audio(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read as a video"):
        VideoFrames(tmp_path / name)
    assert len(visitors) == 1


@pytest.mark.parametrize(
    "scheme", ["http://127.0.0.1:{port}/x.mp4", "tcp://127.0.0.1:{port}", "concat:secret.wav", "pipe:0"]
)
def test_addresses_are_names_of_files_that_are_not_there(tmp_path, monkeypatch, visitors, scheme) -> None:
    monkeypatch.chdir(tmp_path)
    soundfile.write("secret.wav", clicks(1), RATE)
    for read in (read_audio, VideoFrames):
        with pytest.raises(InputError, match="does not exist"):
            read(scheme.format(port=visitors[0].decode()))
    assert len(visitors) == 1


@pytest.mark.parametrize("name", ["http:x.m4a", "concat:a|b.mp4", "file:x.m4a", "pipe:0.m4a", "%03d.m4a", "ü ö.m4a"])
def test_files_whose_names_look_like_addresses(tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    write_av(tmp_path / "plain.mp4", video=[i / FPS for i in range(25)], sound=[(0, 1)])
    os.rename("plain.mp4", name)
    assert len(read_audio(name)[0]) == pytest.approx(44100, rel=0.1)
    assert len(VideoFrames(name)) == 25


def test_pipes_and_devices_are_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    for path in (tmp_path / "pipe.wav", Path("/dev/zero"), Path("/dev/stdin")):
        if path.exists() and not path.is_file():
            for read in (read_audio, VideoFrames):
                with pytest.raises(InputError, match="a pipe or a device"):
                    read(path)


@pytest.mark.parametrize("ending", ["au", "snd", "vox", "raw", "gsm", "wav"])
@pytest.mark.parametrize("content", [bytes(9000), np.random.default_rng(0).bytes(9000)], ids=["zeros", "noise"])
def test_a_name_makes_no_recording(tmp_path, ending, content) -> None:
    """libsndfile would take some of them for samples without a header."""
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read as a recording|states .* samples a second"):
        read_audio(path)


def test_a_cover_is_no_video(tmp_path) -> None:
    with av.open(str(tmp_path / "a.m4a"), "w", format="mp4") as file:
        cover = file.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        sound = file.add_stream("aac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(clicks(1)[None], format="fltp", layout="mono")
        frame.sample_rate = RATE
        image = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        for packet in (*cover.encode(image), *cover.encode(None), *sound.encode(frame), *sound.encode(None)):
            file.mux(packet)
    with pytest.raises(InputError, match="holds no video"):
        VideoFrames(tmp_path / "a.m4a")
    assert len(read_audio(tmp_path / "a.m4a")[0]) == pytest.approx(RATE, rel=0.1)


def test_tags_in_another_encoding_do_not_matter(tmp_path) -> None:
    path = tmp_path / "a.avi"
    write_av(path, video=[0.0, 0.04], codec="mpeg4")
    data = path.read_bytes()
    at = data.index(b"Lavf")
    path.write_bytes(data[:at] + b"\xff\xfe\xe9!" + data[at + 4 :])
    assert len(VideoFrames(path)) == 2


def test_timed_formats_are_those_that_are_opened() -> None:
    from wanvideo_infinitetalk.media.containers import FORMATS

    assert set(FORMATS.split(",")) >= audio.TIMED
