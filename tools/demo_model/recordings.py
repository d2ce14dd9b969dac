"""The recordings that the demo model is trained with: synthesized speech, pauses, noise, silence.

`python -m wanvideo_infinitetalk.tools.demo_model.recordings OUT.npz` writes them with espeak-ng, which must be
installed. Nothing is fetched: the sentences below and numbers read aloud are all the text there is.

OUT.npz holds `speech` int16 [samples], all recordings end to end at 16 kHz, each at -23 LUFS and scaled by 2^13, and
`ends` int64 [recordings], where each one ends.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.signal import fftconvolve

from ...media.audio import load_speech, normalize_loudness, read_audio
from ...multitalk.wav2vec import SAMPLE_RATE

__all__ = ["SCALE", "make_recordings", "read_recordings"]

SCALE = 2.0**13
SECONDS = 36.0

SENTENCES = {
    "en-us": (
        "Good morning, and welcome to our little programme about the sea.",
        "She put the old blue bowl on the table and laughed.",
        "Why would anybody walk home through the rain tonight?",
        "We have bread, butter, honey, and a large pot of tea.",
    ),
    "en-gb": (
        "The train to the north leaves in about a quarter of an hour.",
        "I never thought that I would see the garden so green again.",
        "Please open the window a little; the room is far too warm.",
    ),
    "de": (
        "Guten Abend, heute sprechen wir über das Wetter und den Wald.",
        "Der kleine Hund läuft jeden Morgen am Fluss entlang.",
        "Könnten Sie mir bitte sagen, wann der nächste Zug fährt?",
    ),
    "fr-fr": (
        "Bonjour à tous, nous allons parler de la mer et du vent.",
        "Elle a posé le bol bleu sur la table avant de partir.",
        "Où est-ce que nous pouvons acheter du pain ce matin?",
    ),
    "es": (
        "Buenos días, hoy vamos a hablar de la montaña y del río.",
        "La niña puso la manzana roja sobre la mesa grande.",
        "¿A qué hora sale el próximo autobús para la ciudad?",
    ),
    "it": ("Buongiorno a tutti, oggi parliamo di musica e di cucina.", "Il gatto nero dorme sul muro sotto il sole."),
    "pt": ("Bom dia, hoje falamos sobre o mar e a cidade velha.", "A menina colocou a tigela azul em cima da mesa."),
    "pl": ("Dzień dobry, dzisiaj opowiemy o lesie i o rzece.", "Mały pies biega każdego ranka nad wodą."),
    "ru": ("Доброе утро, сегодня мы поговорим о море и о ветре.", "Маленькая собака бежит вдоль реки каждое утро."),
    "cmn": ("早上好,今天我们来谈谈天气和大海。", "她把蓝色的碗放在桌子上,然后笑了。"),
    "tr": ("Günaydın, bugün deniz ve rüzgar hakkında konuşacağız.", "Küçük köpek her sabah nehir boyunca koşar."),
    "hi": ("नमस्ते, आज हम समुद्र और हवा के बारे में बात करेंगे।",),
}
VARIANTS = ("", "+m1", "+m2", "+m3", "+m4", "+m5", "+m6", "+m7", "+f1", "+f2", "+f3", "+f4", "+f5", "+croak", "+klatt")

Wave = NDArray[np.float32]


def make_recordings(out: str | Path, minutes: float, seed: int = 0) -> int:
    """Write about so many minutes to `out` and return the number of recordings."""
    count = max(1, round(minutes * 60 / SECONDS))
    seeds = np.random.SeedSequence(seed).spawn(count)
    with ThreadPoolExecutor() as pool:  # espeak-ng is a process of its own
        waves = list(pool.map(lambda s: _recording(np.random.default_rng(s)), seeds))
    numbers = [np.clip(np.round(wave * SCALE), -32768, 32767).astype(np.int16) for wave in waves]
    np.savez_compressed(out, speech=np.concatenate(numbers), ends=np.cumsum([len(n) for n in numbers]))
    return count


def read_recordings(path: str | Path) -> list[Wave]:
    """The recordings of a file that `make_recordings` wrote, float32 at 16 kHz and -23 LUFS."""
    with np.load(path) as file:
        speech, ends = file["speech"], file["ends"]
    return [part.astype(np.float32) / np.float32(SCALE) for part in np.split(speech, ends[:-1])]


def _recording(rng: np.random.Generator) -> Wave:
    """One recording of about SECONDS: a voice with pauses, filtered, with or without noise; one in ten no voice."""
    total = int(SECONDS * SAMPLE_RATE)
    kind = rng.random()
    if kind < 0.03:
        wave = np.zeros(total, np.float32)
    elif kind < 0.07:
        wave = _noise(rng, total)
    elif kind < 0.11:
        wave = _pulses(rng, total)
    else:
        wave = _speech(rng, total)
        if rng.random() < 0.7:
            wave = _colored(rng, wave)
        if rng.random() < 0.5:
            wave = _in_a_room(rng, wave)
        if rng.random() < 0.5:
            level = rng.uniform(10, 45)  # dB below the speech
            wave = wave + _noise(rng, total) * np.float32(_rms(wave) / 10 ** (level / 20))
    return normalize_loudness(wave.astype(np.float32))


def _speech(rng: np.random.Generator, total: int) -> Wave:
    """One voice; sentences, numbers and pauses of 0.1 to 2.5 s."""
    language = str(rng.choice(list(SENTENCES)))
    voice = language + str(rng.choice(VARIANTS))
    speed, pitch = int(rng.integers(115, 235)), int(rng.integers(15, 85))
    pieces: list[Wave] = []
    length = 0
    while length < total:
        if rng.random() < 0.5:
            text = str(rng.choice(SENTENCES[language]))
        else:
            text = ", ".join(
                str(int(rng.integers(1, 10 ** int(rng.integers(1, 5))))) for _ in range(rng.integers(2, 7))
            )
        spoken = _say(text, voice, speed, pitch) * np.float32(10 ** (rng.uniform(-8, 0) / 20))
        pause = rng.uniform(0.1, 0.6) if rng.random() < 0.7 else rng.uniform(0.6, 2.5)
        pieces += [spoken, np.zeros(int(pause * SAMPLE_RATE), np.float32)]
        length += len(spoken) + len(pieces[-1])
    return np.concatenate(pieces)[:total]


def _say(text: str, voice: str, speed: int, pitch: int) -> Wave:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "said.wav"
        command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(file), "--", text]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        samples, rate = read_audio(file)
    return load_speech(samples, rate)


def _noise(rng: np.random.Generator, length: int) -> Wave:
    """Noise whose power falls with frequency to a random power between 0 and -2, with a hum in half of the cases."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    hertz = np.maximum(np.fft.rfftfreq(length, 1 / SAMPLE_RATE), 20)
    noise = np.fft.irfft(spectrum * hertz ** (-rng.uniform(0, 1)), length)
    noise /= _rms(noise)
    if rng.random() < 0.5:
        seconds = np.arange(length) / SAMPLE_RATE
        base = rng.uniform(50, 180)
        noise += sum(rng.uniform(0, 1) / k * np.sin(2 * np.pi * base * k * seconds) for k in range(1, 5))
    return (noise / _rms(noise)).astype(np.float32)


def _pulses(rng: np.random.Generator, length: int) -> Wave:
    """Buzzes and bursts of noise that come and go, so that loudness and spectrum are learned apart from any voice."""
    points = np.arange(0, length + 4000, 2400)
    loud = np.interp(np.arange(length), points, rng.uniform(-50, 0, len(points)) * (rng.random(len(points)) < 0.8))
    seconds = np.arange(length) / SAMPLE_RATE
    base = rng.uniform(90, 240)
    buzz = sum(np.sin(2 * np.pi * base * k * seconds) / k ** rng.uniform(0.3, 1.5) for k in range(1, 16))
    mix = rng.random()
    sound: NDArray[np.float32] = ((mix * buzz + (1 - mix) * _noise(rng, length)) * 10 ** (loud / 20)).astype(np.float32)
    return sound


def _colored(rng: np.random.Generator, wave: Wave) -> Wave:
    """A random smooth equaliser, within 9 dB: microphones and rooms differ."""
    hertz = np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)
    knots = np.log([60, 200, 500, 1200, 2500, 5000, 8000])
    gain = np.interp(np.log(np.maximum(hertz, 60)), knots, np.cumsum(rng.uniform(-4, 4, len(knots))).clip(-9, 9))
    return np.fft.irfft(np.fft.rfft(wave) * 10 ** (gain / 20), len(wave)).astype(np.float32)


def _in_a_room(rng: np.random.Generator, wave: Wave) -> Wave:
    """With the reverberation of a room: noise that falls by 60 dB in 0.1 to 0.6 s."""
    seconds = np.arange(int(0.6 * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(len(seconds)) * 10 ** (-3 * seconds / rng.uniform(0.1, 0.6))
    tail *= 10 ** (rng.uniform(-14, 0) / 20) / np.sqrt(np.sum(tail**2))
    tail[0] += 1
    heard: NDArray[np.float32] = fftconvolve(wave, tail)[: len(wave)].astype(np.float32)
    return heard


def _rms(wave: NDArray[np.floating]) -> float:
    return float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)))) + 1e-9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=48.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if shutil.which("espeak-ng") is None:
        parser.error("the program espeak-ng, which speaks the sentences, is not on the PATH; install it first")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    make_recordings(given.out, given.minutes, given.seed)


if __name__ == "__main__":
    main()
