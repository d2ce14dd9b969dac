"""InfiniteTalk on Wan2.1: an image of a person and a recording of speech become a talking video.

The repository root is this package (`wanvideo_infinitetalk`) when installed, and a ComfyUI custom node pack when it
lies in `custom_nodes`. Importing it outside ComfyUI loads nothing heavy.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cli.tiny_models import make_tiny as make_tiny
    from .pipeline.make_video import Events as Events
    from .pipeline.make_video import Job as Job
    from .pipeline.make_video import ModelFiles as ModelFiles
    from .pipeline.make_video import make_video as make_video
    from .pipeline.plan import GenerateConfig as GenerateConfig
    from .pipeline.stream import generate_stream as generate_stream
    from .pipeline.stream import stream_video as stream_video

__version__ = "0.1.0"

WEB_DIRECTORY = "./web"

EXPORTS = {
    "Events": ".pipeline.make_video",
    "GenerateConfig": ".pipeline.plan",
    "Job": ".pipeline.make_video",
    "ModelFiles": ".pipeline.make_video",
    "generate_stream": ".pipeline.stream",
    "make_tiny": ".cli.tiny_models",
    "make_video": ".pipeline.make_video",
    "stream_video": ".pipeline.stream",
}
"""What programs use -> the module that has it, imported when the name is used: that takes seconds."""


def __getattr__(name: str) -> Any:
    if name in EXPORTS:
        return getattr(import_module(EXPORTS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["WEB_DIRECTORY", "__version__", *EXPORTS]

# ComfyUI has imported its `folder_paths` long before it looks at custom nodes; nobody else has a module of that name.
if "folder_paths" in sys.modules:
    from .comfy_nodes.requirements import check_requirements

    check_requirements(Path(__file__).with_name("requirements.txt"))

    from .nodes import comfy_entrypoint as comfy_entrypoint

    __all__ += ["comfy_entrypoint"]
