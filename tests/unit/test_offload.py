"""Block swap changes where weights lie and nothing else."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from wanvideo_infinitetalk.wanvideo.runtime.offload import BlockSwap, Offloader, num_bytes, spread, tensors_of

DIM, BLOCKS = 12, 5


class Block(nn.Module):
    def __init__(self, i: int) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM + i)  # blocks of different sizes, as with unequal quantization
        self.back = nn.Linear(DIM + i, DIM, bias=False, dtype=torch.float64)
        self.register_buffer("scale", torch.tensor(1.5 + i))
        self.places: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.places.append(self.linear.weight.data_ptr())
        return x + self.scale * self.back(self.linear(x).double()).float()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text_embedding = nn.Sequential(nn.Linear(4, DIM), nn.GELU(), nn.Linear(DIM, DIM))
        self.img_emb = nn.Linear(3, DIM)
        self.blocks = nn.ModuleList(Block(i) for i in range(BLOCKS))
        self.head = nn.Linear(DIM, 2)

    def forward(self, text: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
        x = self.text_embedding(text)
        if image is not None:
            x = x + self.img_emb(image)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def model() -> Model:
    return Model().requires_grad_(False).eval()


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 4), torch.randn(3, 3)


@pytest.mark.parametrize(("blocks", "prefetch"), [*itertools.product((0, 2, BLOCKS, 99), (0, 1, 2, 9))])
@pytest.mark.parametrize("embeddings", [False, True])
def test_results_are_bit_identical(model, inputs, blocks: int, prefetch: int, embeddings: bool) -> None:
    expected = model(*inputs)
    swap = BlockSwap(blocks, prefetch, image_embedding=embeddings, text_embedding=embeddings)
    offloader = Offloader(model, "cpu", swap)
    offloader.load()
    for _ in range(3):
        assert torch.equal(model(*inputs), expected)
    assert torch.equal(model(inputs[0]), model(inputs[0]))  # the image embedding left out: another order of units
    offloader.unload()
    assert torch.equal(model(*inputs), expected)


@pytest.mark.cuda
@pytest.mark.parametrize(("blocks", "prefetch"), [*itertools.product((0, 2, BLOCKS), (0, 1, 3))])
def test_results_are_bit_identical_on_the_gpu(model, inputs, blocks: int, prefetch: int) -> None:
    on_gpu = [x.cuda() for x in inputs]
    expected = copy.deepcopy(model).cuda()(*on_gpu)
    offloader = Offloader(model, "cuda", BlockSwap(blocks, prefetch, text_embedding=True, log_waits=True))
    offloader.load()
    for _ in range(20):
        assert torch.equal(model(*on_gpu), expected)
    offloader.unload()
    assert all(t.device.type == "cpu" for t in tensors_of(model))


@pytest.mark.cuda
def test_large_blocks_lie_in_pinned_memory_of_their_own_size() -> None:
    from wanvideo_infinitetalk.wanvideo.runtime import offload

    buffer = offload._host_buffer((3 << 20) + 17, pin=True)
    assert buffer.is_pinned()
    assert buffer.untyped_storage().nbytes() == (3 << 20) + 17
    copy_there = buffer.random_(0, 256).to("cuda", non_blocking=True)
    assert torch.equal(copy_there.cpu(), buffer)
    for _ in range(3):  # registered and let go again and again
        assert offload._host_buffer(2 << 20, pin=True).is_pinned()


def test_swapped_blocks_run_from_few_slots(model, inputs) -> None:
    offloader = Offloader(model, "cpu", BlockSwap(BLOCKS, prefetch=1))
    offloader.load()
    for _ in range(2):
        model(*inputs)
    places = {place for block in model.blocks for place in block.places}
    assert len(places) == 2  # prefetch + 1
    hosts = {block.linear.weight.data_ptr() for block in model.blocks}
    assert len(hosts) == BLOCKS
    assert not places & hosts  # after the run every parameter points at its host memory again


def test_device_memory_is_counted(model) -> None:
    everything = Offloader(model, "cpu")
    total = num_bytes(tensors_of(model))
    assert everything.device_bytes == total
    half = Offloader(model, "cpu", BlockSwap(3, prefetch=0)).device_bytes
    all_swapped = Offloader(model, "cpu", BlockSwap(BLOCKS, prefetch=0)).device_bytes
    assert all_swapped < half < total
    offloader = Offloader(model, "cpu", BlockSwap(BLOCKS))
    assert offloader.loaded_bytes == 0
    offloader.load()
    assert offloader.loaded_bytes == offloader.device_bytes


def test_an_interrupted_forward_leaves_the_weights_at_home(model, inputs) -> None:
    expected = model(*inputs)
    offloader = Offloader(model, "cpu", BlockSwap(BLOCKS))
    homes = [block.linear.weight.data_ptr() for block in model.blocks]
    offloader.load()
    broken = model.blocks[2].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(*inputs)
    broken.remove()
    assert torch.equal(model(*inputs), expected)
    assert [block.linear.weight.data_ptr() for block in model.blocks] == homes


def test_swap_can_change_while_loaded(model, inputs) -> None:
    expected = model(*inputs)
    offloader = Offloader(model, "cpu")
    offloader.load()
    for blocks in (2, BLOCKS, 0, 3):
        offloader.set_swap(BlockSwap(blocks))
        assert offloader.loaded
        assert torch.equal(model(*inputs), expected)


def test_tensors_may_come_and_go(model, inputs) -> None:
    offloader = Offloader(model, "cpu", BlockSwap(BLOCKS))
    offloader.load()
    with offloader.changing():
        model.blocks[1].extra = nn.Linear(DIM, DIM, bias=False)
        model.blocks[1].scale = torch.tensor(9.0)
    assert offloader.loaded
    assert model.blocks[1].extra.weight.untyped_storage().data_ptr() == (
        model.blocks[1].scale.untyped_storage().data_ptr()
    )
    swapped = model(*inputs)
    offloader.unload()
    assert torch.equal(model(*inputs), swapped)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_weights_move_in_and_out_of_inference_mode(mode, inputs) -> None:
    with mode():
        model = Model().requires_grad_(False)
        expected = model(*inputs)
        offloader = Offloader(model, "cpu", BlockSwap(BLOCKS))
        offloader.load()
        assert torch.equal(model(*inputs), expected)
        offloader.unload()
        assert torch.equal(model(*inputs), expected)


def test_the_host_buffer_is_the_only_copy(model) -> None:
    weight = model.blocks[0].linear.weight
    Offloader(model, "cpu", BlockSwap(BLOCKS))
    scale = model.blocks[0].scale
    assert weight.untyped_storage().data_ptr() == scale.untyped_storage().data_ptr()
    assert weight.data_ptr() % 64 == 0


def test_spread_is_even() -> None:
    assert spread(0, 40) == []
    assert spread(40, 40) == list(range(40))
    assert spread(99, 4) == [0, 1, 2, 3]
    assert spread(20, 40) == list(range(1, 40, 2))
    for swapped in range(41):
        chosen = spread(swapped, 40)
        assert len(set(chosen)) == swapped
        assert all(0 <= i < 40 for i in chosen)
