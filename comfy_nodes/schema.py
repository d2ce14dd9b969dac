"""What all node schemas share: the types on the wires, the category, and the sockets that only saved workflows need."""

from __future__ import annotations

import functools
from typing import Any

from ..pipeline.bounds import BOUNDS, Bound, shown
from ..wanvideo.errors import InputError
from .comfyui import io, make_schema
from .types import SigmaLevel

CATEGORY = "InfiniteTalk"

# The types that travel between our nodes, under the names that saved workflows know.
WanModelType = io.Custom("WANVIDEOMODEL")
WanVaeType = io.Custom("WANVAE")
AdapterType = io.Custom("MULTITALKMODEL")
Wav2VecType = io.Custom("WAV2VECMODEL")
TextEncoderType = io.Custom("WANTEXTENCODER")
TextEmbedsType = io.Custom("WANVIDEOTEXTEMBEDS")
ClipEmbedsType = io.Custom("WANVIDIMAGE_CLIPEMBEDS")
ImageEmbedsType = io.Custom("WANVIDIMAGE_EMBEDS")
SpeechEmbedsType = io.Custom("MULTITALK_EMBEDS")
LoraType = io.Custom("WANVIDLORA")
BlockSwapType = io.Custom("BLOCKSWAPARGS")
CompileType = io.Custom("WANCOMPILEARGS")
VramManagementType = io.Custom("VRAM_MANAGEMENTARGS")
EnhanceVideoType = io.Custom("FETAARGS")
SkipLayersType = io.Custom("SLGARGS")
StepCacheType = io.Custom("CACHEARGS")
SchedulerType = io.Custom("WANVIDEOSCHEDULER")
ExtraArgsType = io.Custom("WANVIDSAMPLEREXTRAARGS")
SamplerArgsType = io.Custom("SAMPLER_ARGS")

# The output of a value for combo widgets: io.Combo.Output has, in some versions, the list of values as its type.
ComboType = io.Custom("COMBO")

# Inputs that saved workflows may carry for models and methods that this pack does not run. The socket exists, so that
# the workflow loads; connecting it is answered with one sentence.
FOREIGN = {
    "VACEPATH": "VACE models",
    "FANTASYTALKINGMODEL": "FantasyTalking models (use an InfiniteTalk or MultiTalk model)",
    "FANTASYPORTRAITMODEL": "FantasyPortrait models",
    "SELECTEDBLOCKS": "LoRAs on selected blocks (here every block gets the LoRA)",
    "WANVIDEOPROMPTEXTENDER_ARGS": "prompt extension (write the longer prompt into positive_prompt)",
    "WANVIDCONTEXT": "context windows (InfiniteTalk Long Video makes long videos in windows)",
    "FLOWEDITARGS": "FlowEdit",
    "LOOPARGS": "looped sampling",
    "EXPERIMENTALARGS": "experimental sampling options",
    "UNIANIMATE_POSE": "UniAnimate",
    "FANTASYTALKING_EMBEDS": "FantasyTalking (connect multitalk_embeds)",
    "UNI3C_EMBEDS": "Uni3C camera control",
    "FREEINITARGS": "FreeInit",
    "ADD_COND_LATENTS": "additional condition latents",
}


def foreign(type_name: str, input_id: str, tooltip: str) -> Any:
    """An optional socket of a type in `FOREIGN`: it lets workflows load; `reject_foreign` rejects what is connected."""
    return io.Custom(type_name).Input(input_id, optional=True, tooltip=tooltip)


def reject_foreign(node: Any, sockets: dict[str, Any]) -> None:
    """Raise InputError for the first socket of a foreign type that something is connected to.

    `sockets` are the keyword arguments that `node.execute` has no name for; each must be a foreign socket of it.
    """
    types = {socket.id: str(socket.get_io_type()) for socket in node.define_schema().inputs}
    for input_id, value in sockets.items():
        if types.get(input_id) not in FOREIGN:
            raise TypeError(f"{node.__name__} has no input {input_id!r}")
        if value is not None:
            raise InputError(
                f"{input_id} is for {FOREIGN[types[input_id]]}: not part of this pack, disconnect {input_id}."
            )


def check_numbers_of(node: Any) -> None:
    """Make `node.execute` reject numbers outside the range of their widget, and NaN, before it runs.

    ComfyUI checks what is typed into a widget; NaN, and numbers that come by a link, pass it.
    """
    execute = node.execute.__func__
    sigma_levels = getattr(node, "SIGMA_LEVELS", ())

    @functools.cache
    def bounds() -> dict[str, Bound]:
        found = {}
        for widget in node.define_schema().inputs:
            options = widget.as_dict()
            if widget.get_io_type() in ("INT", "FLOAT") and {"min", "max"} <= options.keys():
                lists = widget.id in BOUNDS and BOUNDS[widget.id].per_step
                whole = widget.get_io_type() == "INT"
                found[widget.id] = Bound(
                    options["min"], options["max"], whole, optional=widget.optional, per_step=lists
                )
        return found

    @functools.wraps(execute)
    def checked(cls: Any, **given: Any) -> Any:
        for name, bound in bounds().items():
            if name in sigma_levels and isinstance(given.get(name), SigmaLevel):
                continue
            if name in given and not bound.accepts(given[name]):
                raise InputError(f"{name} {shown(given[name])} cannot be used: give {bound.words}.")
        return execute(cls, **given)

    node.execute = classmethod(checked)


def node_schema(
    node_id: str,
    display_name: str,
    description: str,
    *,
    group: str,
    aliases: list[str],
    inputs: list[Any],
    outputs: list[Any],
    hidden: list[Any] | None = None,
    output_node: bool = False,
) -> Any:
    """An io.Schema in the category of this pack."""
    return make_schema(
        {"search_aliases": aliases},
        node_id=node_id,
        display_name=display_name,
        category=f"{CATEGORY}/{group}",
        description=description,
        inputs=inputs,
        outputs=outputs,
        hidden=hidden or [],
        is_output_node=output_node,
    )
