"""A small host that runs API-format workflows against the node classes, with the core nodes that our workflows use."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Coroutine, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from support import comfy_stubs

Prompt = dict[str, dict[str, Any]]


class NodeError(Exception):
    """What ComfyUI shows on a node: its id, and the exception that it ended with."""

    def __init__(self, node_id: str, class_type: str, error: BaseException) -> None:
        super().__init__(f"node {node_id} ({class_type}): {error}")
        self.node_id, self.class_type, self.error = node_id, class_type, error


class Rejected(Exception):
    """What a node says of its widgets before anything runs."""


class Host:
    """Our nodes, core nodes, and the outputs of nodes whose inputs have not changed since."""

    def __init__(self, base: Path, nodes: list[Any]) -> None:
        self.base = base
        self.nodes = {node.GET_SCHEMA().node_id: node for node in nodes}
        self.core = CoreNodes(base)
        self.cache: dict[str, tuple[Any, tuple[Any, ...]]] = {}
        self.executed: list[str] = []
        self.shown: list[str] = []  # what ComfyUI shows of the last rejection

    @property
    def management(self) -> comfy_stubs.Management:
        return sys.modules["comfy.model_management"]  # type: ignore[return-value]

    def run(self, prompt: Prompt, wanted: str | None = None) -> dict[str, tuple[Any, ...]]:
        """Execute `wanted` and what it needs, or all nodes; the outputs by node id. Raises NodeError.

        Like ComfyUI it first asks all of them whether they accept their widgets, and then makes lazy inputs last.
        """
        self.executed = []
        ends = [wanted] if wanted is not None else _ends(prompt)
        for node_id in _in_order(prompt, ends):
            self._validate(node_id, prompt[node_id])
        outputs: dict[str, tuple[Any, ...]] = {}
        for node_id in ends:
            self._make(node_id, prompt, outputs)
        return outputs

    def _validate(self, node_id: str, node: dict[str, Any]) -> None:
        """What `validate_inputs` says: of linked inputs it is given None. Nothing is shown where none that it names is
        there."""
        cls = self.nodes.get(node["class_type"])
        if cls is None or not hasattr(cls, "validate_inputs"):
            return
        names = inspect.getfullargspec(cls.validate_inputs).args[1:]
        assert names, "ComfyUI asks only where inputs are named"
        given = {k: None if _is_link(v) else v for k, v in node["inputs"].items() if k in names}
        answer = cls.validate_inputs(**given)
        self.shown = [] if answer is True else [f"{name} - {answer}" for name in given]
        if self.shown:
            raise NodeError(node_id, node["class_type"], Rejected(answer))

    def _make(self, node_id: str, prompt: Prompt, outputs: dict[str, tuple[Any, ...]]) -> None:
        if node_id in outputs:
            return
        node = prompt[node_id]
        cls = self.nodes.get(node["class_type"])
        links = {k: v for k, v in node["inputs"].items() if _is_link(v)}
        lazy = {} if cls is None else {i.id: i for i in cls.GET_SCHEMA().inputs if i.options.get("lazy")}
        for name, (source, _) in links.items():
            if name not in lazy:
                self._make(source, prompt, outputs)
        later = [name for name in links if name in lazy]
        if later and cls is not None:
            given = {k: outputs[v[0]][v[1]] if k in links and k not in later else v for k, v in node["inputs"].items()}
            try:
                later = cls.check_lazy_status(**{k: None if k in later else v for k, v in given.items()})
            except Exception as error:
                raise NodeError(node_id, node["class_type"], error) from error
        for name in later:
            self._make(links[name][0], prompt, outputs)
        outputs[node_id] = self._run_node(node_id, node, outputs)

    def _run_node(self, node_id: str, node: dict[str, Any], outputs: dict[str, tuple[Any, ...]]) -> tuple[Any, ...]:
        given = {k: outputs[v[0]][v[1]] if _is_link(v) else v for k, v in node["inputs"].items()}
        links = {k: id(given[k]) for k, v in node["inputs"].items() if _is_link(v)}
        state = (node["class_type"], {**node["inputs"], **links})
        if node_id in self.cache and self.cache[node_id][0] == state:
            return self.cache[node_id][1]
        try:
            with torch.inference_mode():  # as ComfyUI does
                result = self._execute(node["class_type"], given)
        except Exception as error:
            raise NodeError(node_id, node["class_type"], error) from error
        self.executed.append(node_id)
        self.cache[node_id] = (state, result)
        return result

    def _execute(self, class_type: str, given: dict[str, Any]) -> tuple[Any, ...]:
        if class_type not in self.nodes:
            return getattr(self.core, class_type)(**given)
        node = self.nodes[class_type]
        schema = node.GET_SCHEMA()
        known = {i.id: i for i in schema.inputs}
        assert set(given) <= set(known), f"{class_type} has no input {set(given) - set(known)}"
        missing = [i.id for i in schema.inputs if not i.optional and i.id not in given]
        assert not missing, f"{class_type} lacks {missing}"
        for name, value in given.items():
            _check_value(known[name], value)
        result = node.execute(**given)
        assert len(result.args) == len(schema.outputs)
        return result.args


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def _ends(prompt: Prompt) -> list[str]:
    """Nodes whose outputs nobody takes."""
    taken = {value[0] for node in prompt.values() for value in node["inputs"].values() if _is_link(value)}
    return [node_id for node_id in prompt if node_id not in taken]


def _in_order(prompt: Prompt, ends: list[str]) -> list[str]:
    order: list[str] = []

    def visit(node_id: str) -> None:
        if node_id in order:
            return
        for value in prompt[node_id]["inputs"].values():
            if _is_link(value):
                visit(value[0])
        order.append(node_id)

    for node_id in ends:
        visit(node_id)
    return order


def _check_value(widget: Any, value: Any) -> None:
    """What ComfyUI validates before it runs a prompt."""
    if widget.get_io_type() == "COMBO" and value not in widget.options["options"]:
        raise ValueError(f"Value not in list: {widget.id}: {value!r} not in {widget.options['options']}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        least, most = widget.options.get("min"), widget.options.get("max")
        if (least is not None and value < least) or (most is not None and value > most):
            raise ValueError(f"{widget.id}: {value} is not within {least} to {most}")


class CoreNodes:
    """ComfyUI's own nodes, as far as our workflows use them."""

    def __init__(self, base: Path) -> None:
        self.input, self.output = base / "input", base / "output"

    def LoadImage(self, image: str) -> tuple[Any, ...]:
        from PIL import Image

        opened = Image.open(self.input / image)
        pixels = torch.from_numpy(np.asarray(opened.convert("RGB"), dtype=np.float32) / 255)[None]
        return pixels, torch.zeros(1, *pixels.shape[1:3])

    def LoadAudio(self, audio: str, **upload: Any) -> tuple[Any, ...]:
        import soundfile

        samples, rate = soundfile.read(self.input / audio, dtype="float32", always_2d=True)
        return ({"waveform": torch.from_numpy(samples.T.copy())[None], "sample_rate": rate},)

    def LoadVideo(self, file: str, **upload: Any) -> tuple[Any, ...]:
        return (self.input / file,)

    def GetVideoComponents(self, video: Path) -> tuple[Any, ...]:
        import av

        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            return torch.from_numpy(np.stack(frames)).float() / 255, None, float(stream.average_rate)

    def ImageScale(
        self, image: torch.Tensor, upscale_method: str, width: int, height: int, crop: str
    ) -> tuple[Any, ...]:
        scaled = torch.nn.functional.interpolate(image.movedim(-1, 1), size=(height, width), mode="bilinear")
        return (scaled.movedim(1, -1),)

    def SolidMask(self, value: float, width: int, height: int) -> tuple[Any, ...]:
        return (torch.full((1, height, width), value),)

    def CreateVideo(self, images: torch.Tensor, fps: float, audio: dict[str, Any] | None = None) -> tuple[Any, ...]:
        return ((images, fps, audio),)

    def SaveVideo(self, video: Any, filename_prefix: str, format: str, codec: str) -> tuple[Any, ...]:
        import av

        images, fps, audio = video
        path = (self.output / f"{filename_prefix}_00001_").with_suffix(".mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("h264", rate=Fraction(round(fps * 1000), 1000))
            stream.height, stream.width = (int(side) for side in images.shape[1:3])
            stream.pix_fmt = "yuv420p"
            track = None if audio is None else container.add_stream("aac", rate=int(audio["sample_rate"]))
            for image in images:
                frame = av.VideoFrame.from_ndarray((image * 255).clamp(0, 255).byte().numpy(), format="rgb24")
                container.mux(stream.encode(frame.reformat(format="yuv420p")))
            container.mux(stream.encode(None))
            if track is not None and audio is not None:
                mono = audio["waveform"][0].mean(0, keepdim=True).float().numpy()
                samples = av.AudioFrame.from_ndarray(mono, format="flt", layout="mono")
                samples.sample_rate, samples.pts = int(audio["sample_rate"]), 0
                container.mux(track.encode(samples))
                container.mux(track.encode(None))
        return (path,)


@contextlib.contextmanager
def hosted(base: Path) -> Iterator[Host]:
    """The pack in a host whose ComfyUI folder is `base` (models, input, output below it)."""
    for folder in ("models/wav2vec2", "input", "output", "user"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    remove = comfy_stubs.install(base)
    _forget_pack()
    comfy_stubs.Progress.seen.clear()
    try:
        from wanvideo_infinitetalk.nodes import comfy_entrypoint

        yield Host(base, _result(_result(comfy_entrypoint()).get_node_list()))
    finally:
        _forget_pack()
        remove()


def _result(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine that awaits nothing returns, also inside of a running event loop."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it awaited something")


def _forget_pack() -> None:
    """The node modules hold on to the stand-ins that they were imported with."""
    package = "wanvideo_infinitetalk"
    for name in list(sys.modules):
        if name in (f"{package}.nodes",) or name.startswith(f"{package}.comfy_nodes"):
            del sys.modules[name]
    for name in ("nodes", "comfy_nodes"):  # where `from package import name` looks first
        if hasattr(sys.modules.get(package), name):
            delattr(sys.modules[package], name)
