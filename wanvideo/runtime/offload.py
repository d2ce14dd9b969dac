"""Where a model's weights lie while it runs: on the device, or in host memory with a few blocks on the device.

Block swap keeps the weights of some transformer blocks in pinned host memory. Just before such a block runs, its
weights are copied in one piece into a slot on the device, on a stream of their own, while an earlier block computes.
Nothing is ever copied back, because inference changes no weight: leaving a slot is only a matter of pointing the
parameters at the host memory again. The arithmetic is the same, so the results are bit-identical to not swapping.

The same code runs on the CPU, where the slots are ordinary memory and the copies are synchronous.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# cudaMalloc and the widest vector loads agree with this; it also keeps each tensor on its own cache lines.
ALIGNMENT = 256

# Bytes. Smaller buffers may share a memory page with another one, and a page is registered only once.
SMALLEST_REGISTERED = 1 << 20


@dataclass(frozen=True)
class BlockSwap:
    """How much of a model stays in host memory.

    Attributes:
        blocks: number of transformer blocks that are swapped; more than the model has means all.
        prefetch: how many blocks are copied ahead while one computes. Each needs the memory of one block.
        image_embedding: swap the image embedding layers (`img_emb`) too.
        text_embedding: swap the text embedding layers (`text_embedding`) too.
        log_waits: log after each forward how long it waited for weights.
    """

    blocks: int = 0
    prefetch: int = 1
    image_embedding: bool = False
    text_embedding: bool = False
    log_waits: bool = False


def spread(swapped: int, total: int) -> list[int]:
    """Which `swapped` of `total` blocks to swap: evenly spread, so that resident blocks compute while others arrive."""
    swapped = max(0, min(swapped, total))
    return [(2 * i + 1) * total // (2 * swapped) for i in range(swapped)]


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of `module`, each once."""
    return list({id(t): t for t in (*module.parameters(), *module.buffers())}.values())


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


class _Unit:
    """One swapped module: its weights packed into a single host buffer, and the tensors that point there."""

    def __init__(self, name: str, module: nn.Module, *, pin: bool) -> None:
        self.name = name
        self.module = module
        self.tensors = tensors_of(module)
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in self.tensors]
        *self.offsets, self.size = accumulate(sizes, initial=0)
        self.host = _host_buffer(self.size, pin)
        for tensor, home in zip(self.tensors, self._views(self.host), strict=True):
            home.copy_(_plain(tensor))
        self.slot: _Slot | None = None
        self.point_at(self.host)

    def _views(self, buffer: Tensor) -> list[Tensor]:
        """`buffer` (uint8) seen as the tensors of this unit."""
        return [
            buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for tensor, offset in zip(self.tensors, self.offsets, strict=True)
        ]

    def point_at(self, buffer: Tensor) -> None:
        for tensor, view in zip(self.tensors, self._views(buffer), strict=True):
            tensor.data = view


class _Slot:
    """Room on the device for one unit at a time."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.unit: _Unit | None = None
        cuda = device.type == "cuda"
        self.arrived = torch.cuda.Event() if cuda else None  # the weights are in the buffer
        self.used = torch.cuda.Event() if cuda else None  # the last computation that reads them is done


class _Waits:
    """How long the compute stream stood still for weights during one forward."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def report(self) -> None:
        seconds = self.seconds
        if self.events:
            self.events[-1][1].synchronize()
            seconds += sum(begin.elapsed_time(end) for begin, end in self.events) / 1000
        logger.info("block swap: waited %.1f ms for weights in this forward", seconds * 1000)
        self.seconds, self.events = 0.0, []


class BlockSwapper:
    """Brings the units of a model to the device in the order in which they run.

    `install` and `remove` may be called any number of times; between them the model must be called on `device`.
    """

    def __init__(self, units: list[_Unit], device: torch.device, prefetch: int, log_waits: bool = False) -> None:
        self.units = units
        self.device = device
        self.prefetch = max(0, prefetch)
        self._index = {unit.name: i for i, unit in enumerate(units)}
        self._slots: list[_Slot] = []
        self._hooks: list[Any] = []
        self._stream: torch.cuda.Stream | None = None
        self._waits = _Waits() if log_waits else None

    @property
    def slot_bytes(self) -> int:
        """Device memory that the slots take once installed."""
        return max((unit.size for unit in self.units), default=0) * min(self.prefetch + 1, len(self.units))

    def install(self) -> None:
        if self._hooks or not self.units:
            return
        count = min(self.prefetch + 1, len(self.units))
        size = max(unit.size for unit in self.units)
        self._slots = [_Slot(size, self.device) for _ in range(count)]
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
            # The slots may lie where earlier work of the compute stream still reads.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        for unit in self.units:
            self._hooks.append(unit.module.register_forward_pre_hook(self._before(unit)))
            # Also after an exception: an interrupted forward must leave the parameters in host memory.
            self._hooks.append(unit.module.register_forward_hook(self._after(unit), always_call=True))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._stream is not None:
            torch.cuda.synchronize(self.device)
            self._stream = None
        for unit in self.units:
            unit.point_at(unit.host)
            unit.slot = None
        self._slots = []

    def _before(self, unit: _Unit) -> Any:
        index = self._index[unit.name]

        def hook(module: nn.Module, args: Any) -> None:
            slot = unit.slot or self._fetch(unit, keep=())
            assert slot is not None
            self._wait(slot, first=index == 0)
            unit.point_at(slot.buffer)
            upcoming = [self.units[(index + 1 + i) % len(self.units)] for i in range(self.prefetch)]
            for ahead in upcoming:
                if ahead.slot is None:
                    self._fetch(ahead, keep=(unit, *upcoming))

        return hook

    def _after(self, unit: _Unit) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if unit.slot is not None and unit.slot.used is not None:
                unit.slot.used.record(torch.cuda.current_stream(self.device))
            unit.point_at(unit.host)

        return hook

    def _wait(self, slot: _Slot, first: bool) -> None:
        """Let the compute stream wait until the weights of `slot` have arrived."""
        if slot.arrived is None:
            return
        stream = torch.cuda.current_stream(self.device)
        if self._waits is None:
            stream.wait_event(slot.arrived)
            return
        if first and self._waits.events:
            self._waits.report()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        stream.wait_event(slot.arrived)
        end.record(stream)
        self._waits.events.append((begin, end))

    def _fetch(self, unit: _Unit, keep: tuple[_Unit, ...]) -> _Slot | None:
        """Start copying `unit` into a slot that none of `keep` holds; None when there is no such slot."""
        slot = self._free_slot(unit, keep)
        if slot is None:
            return None
        if slot.unit is not None:
            slot.unit.slot = None
        slot.unit, unit.slot = unit, slot
        if self._stream is None:
            begin = time.perf_counter()
            slot.buffer[: unit.size].copy_(unit.host)
            if self._waits is not None:
                self._waits.seconds += time.perf_counter() - begin
            return slot
        assert slot.used is not None
        assert slot.arrived is not None
        self._stream.wait_event(slot.used)
        with torch.cuda.stream(self._stream):
            slot.buffer[: unit.size].copy_(unit.host, non_blocking=True)
            slot.arrived.record(self._stream)
        return slot

    def _free_slot(self, unit: _Unit, keep: tuple[_Unit, ...]) -> _Slot | None:
        """An empty slot, else the one whose unit runs again last."""
        here = self._index[unit.name]

        def distance(slot: _Slot) -> int:
            if slot.unit is None:
                return len(self.units)
            return (self._index[slot.unit.name] - here) % len(self.units)

        candidates = [slot for slot in self._slots if slot.unit is None or slot.unit not in keep]
        return max(candidates, key=distance, default=None)


class Offloader:
    """Moves a model between host and device, with block swap where asked for.

    Args:
        model: any module; block swap needs `model.blocks` (and `img_emb`, `text_embedding` where those are swapped).
        device: where it runs.
        swap: what stays in host memory while it runs.
    """

    def __init__(self, model: nn.Module, device: str | torch.device, swap: BlockSwap | None = None) -> None:
        self.model = model
        self.device = torch.device(device)
        self.swap = swap or BlockSwap()
        self.loaded = False
        self._packed: dict[str, _Unit] = {}
        self._swapper = self._make_swapper()

    # --- what is where -------------------------------------------------------------------------------------------

    @property
    def device_bytes(self) -> int:
        """Bytes on the device when loaded: resident weights and the slots of swapped ones."""
        return num_bytes(self._resident()) + self._swapper.slot_bytes

    @property
    def loaded_bytes(self) -> int:
        return self.device_bytes if self.loaded else 0

    def load(self) -> None:
        """Bring everything that is not swapped to the device."""
        if not self.loaded:
            _move(self._resident(), self.device)
            self._swapper.install()
            self.loaded = True

    def unload(self) -> None:
        """Leave the device: resident weights move to host memory, swapped ones are there already."""
        if self.loaded:
            self._swapper.remove()
            _move(self._resident(), torch.device("cpu"))
            self.loaded = False

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Inside of it the weights are in host memory and tensors may be added, replaced or taken away."""
        was_loaded = self.loaded
        self.unload()
        try:
            yield
        finally:
            self._packed = {}
            self._swapper = self._make_swapper()
        if was_loaded:
            self.load()

    def set_swap(self, swap: BlockSwap | None) -> None:
        """Another block swap from now on; where the model is loaded, it is moved as needed."""
        swap = swap or BlockSwap()
        if swap == self.swap:
            return
        was_loaded = self.loaded
        self.unload()
        self.swap = swap
        self._swapper = self._make_swapper()
        if was_loaded:
            self.load()

    # --- inside --------------------------------------------------------------------------------------------------

    def _make_swapper(self) -> BlockSwapper:
        modules: dict[str, nn.Module] = {}
        for wanted, name in ((self.swap.text_embedding, "text_embedding"), (self.swap.image_embedding, "img_emb")):
            module = getattr(self.model, name, None)
            if wanted and isinstance(module, nn.Module):
                modules[name] = module
        blocks: Any = getattr(self.model, "blocks", [])
        for i in spread(self.swap.blocks, len(blocks)):
            modules[f"blocks.{i}"] = blocks[i]
        pin = self.device.type == "cuda"
        # What was packed for an earlier setting stays packed: it is ordinary host memory to everybody else.
        known = self._packed
        self._packed = {name: known.get(name) or _Unit(name, module, pin=pin) for name, module in modules.items()}
        return BlockSwapper(list(self._packed.values()), self.device, self.swap.prefetch, self.swap.log_waits)

    def _resident(self) -> list[Tensor]:
        swapped = {id(t) for unit in self._swapper.units for t in unit.tensors}
        return [t for t in tensors_of(self.model) if id(t) not in swapped]


def _plain(tensor: Tensor) -> Tensor:
    """The numbers of a parameter as an ordinary tensor, also where its class has an arithmetic of its own (GGUF)."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(Tensor)


def _move(tensors: Iterable[Tensor], device: torch.device) -> None:
    for tensor in tensors:
        if tensor.device != device:
            tensor.data = _plain(tensor).to(device)


def _host_buffer(size: int, pin: bool) -> Tensor:
    """`size` bytes of host memory, pinned where possible: only then do copies overlap with computation."""
    if pin and size >= SMALLEST_REGISTERED:
        buffer = torch.empty(size, dtype=torch.uint8)
        if _register(buffer):
            return buffer
    if pin:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            logger.warning("Block swap runs without pinned memory: copies do not overlap with computation (%s)", error)
    return torch.empty(size, dtype=torch.uint8)


def _register(buffer: Tensor) -> bool:
    """Pin memory that is there already. torch's own pinned memory would be rounded up to a power of two."""
    cudart: Any = torch.cuda.cudart()
    address = buffer.data_ptr()
    if int(cudart.cudaHostRegister(address, buffer.numel(), 0)) != 0:
        _forget_cuda_error()
        return False
    # Before the memory goes. At the end of the process the driver does it.
    weakref.finalize(buffer, cudart.cudaHostUnregister, address).atexit = False
    return True


def _forget_cuda_error() -> None:
    """A rejected call leaves its error behind, and the next kernel launch would report it as its own."""
    try:
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    except RuntimeError as error:
        logger.debug("pinning failed: %s", error)
