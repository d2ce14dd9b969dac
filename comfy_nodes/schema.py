"""What all node schemas share: the types on the wires, the category, and the sockets that only saved workflows need."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from ..pipeline.bounds import BOUNDS, Bound, shown
from ..wanvideo.errors import InfiniteTalkError, InputError
from .comfyui import io, make_schema
from .types import SigmaLevel

CATEGORY = "InfiniteTalk"

# The types that travel between our nodes, under the names that saved workflows know.
WanModelType = io.Custom("WANVIDEOMODEL")
WanVaeType = io.Custom("WANVAE")
AdapterType = io.Custom("MULTITALKMODEL")
Wav2VecType = io.Custom("WAV2VECMODEL")
WhisperType = io.Custom("WHISPERMODEL")
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


ANSWERED = {"WANVIDCONTEXT", "LOOPARGS", "FREEINITARGS", "EXPERIMENTALARGS"}
"""Those of them whose nodes are there and answer by themselves."""


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
    """Make `node` reject numbers outside the range of their widget, and NaN, before it runs.

    ComfyUI checks what is typed into a widget; NaN, and numbers that come by a link, pass it.
    """
    bounds = functools.cache(lambda: _bounds_of(node))
    sigma_levels = getattr(node, "SIGMA_LEVELS", ())

    def check(given: dict[str, Any]) -> None:
        _check_numbers(
            bounds(), {k: v for k, v in given.items() if k not in sigma_levels or not isinstance(v, SigmaLevel)}
        )

    check_before(node, check)


def check_before(node: Any, check: Callable[[dict[str, Any]], None]) -> None:
    """Have `check` called with the inputs before each method of `node` that is given objects, not only widgets."""
    for name in ("execute", "check_lazy_status"):
        if name in vars(node):
            setattr(node, name, classmethod(_after(check, getattr(node, name).__func__)))


def _after(check: Callable[[dict[str, Any]], None], method: Any) -> Any:
    @functools.wraps(method)
    def checked(cls: Any, **given: Any) -> Any:
        check(given)
        return method(cls, **given)

    return checked


def _bounds_of(node: Any) -> dict[str, Bound]:
    """The ranges of a node's number widgets, by name."""
    found = {}
    for widget in node.define_schema().inputs:
        options = widget.as_dict()
        if widget.get_io_type() in ("INT", "FLOAT") and {"min", "max"} <= options.keys():
            lists = widget.id in BOUNDS and BOUNDS[widget.id].per_step
            whole = widget.get_io_type() == "INT"
            found[widget.id] = Bound(options["min"], options["max"], whole, optional=widget.optional, per_step=lists)
    return found


def _check_numbers(bounds: dict[str, Bound], given: dict[str, Any]) -> None:
    for name, bound in bounds.items():
        if name in given and not bound.accepts(given[name]):
            raise InputError(f"{name} {shown(given[name])} cannot be used: give {bound.words}.")


UNCONNECTED: Any = type("Unconnected", (), {"__repr__": lambda self: "UNCONNECTED"})()
"""In `check_early`: nothing is linked to a socket. None: something is, and what it gives is not known yet."""


def answer_early(node: Any) -> None:
    """Make `node` answer when Run is pressed, before anything is executed: give it `validate_inputs`.

    That is its method `check_early`, which takes some of its inputs by name, None for what is linked, and raises what
    `execute` would; and the rejection of foreign sockets to which something is connected. ComfyUI shows the answer once
    for each input that is named and there, so few should be; of those it checks neither ranges nor values of combos,
    which is done here.
    """
    if "validate_inputs" in vars(node):
        return
    schema = node.define_schema()
    own = vars(node).get("check_early")
    named = [] if own is None else list(inspect.signature(own.__func__).parameters.values())[1:]
    sockets = [entry.id for entry in schema.inputs if str(entry.get_io_type()) in FOREIGN.keys() - ANSWERED]
    if not named and not sockets:
        return
    names = {parameter.name for parameter in named}

    def validate_inputs(cls: Any, **given: Any) -> str | bool:
        widgets = {name: value for name, value in given.items() if name in names}
        try:
            reject_foreign(cls, {name: UNCONNECTED for name in given if name in sockets})
            if own is not None:
                own.__func__(cls, **widgets)
            known = {name: value for name, value in widgets.items() if value is not None}
            _check_numbers(_bounds_of(cls), known)
            _check_combos(cls, known)
        except InfiniteTalkError as error:
            return str(error)
        return True

    first = inspect.Parameter("cls", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    later = [inspect.Parameter(name, first.kind, default=None) for name in sockets]
    validate_inputs.__signature__ = inspect.Signature([first, *named, *later])  # type: ignore[attr-defined]
    node.validate_inputs = classmethod(validate_inputs)


def _check_combos(node: Any, given: dict[str, Any]) -> None:
    for widget in node.define_schema().inputs:
        values = widget.as_dict()["options"] if widget.get_io_type() == "COMBO" else []
        if widget.id in given and values and given[widget.id] not in values:
            raise InputError(f"{widget.id} {shown(given[widget.id])} is none of its values: {', '.join(values)}.")


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
