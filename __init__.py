"""InfiniteTalk on Wan2.1: an image of a person and a recording of speech become a talking video.

The repository root is this package (`wanvideo_infinitetalk`) when installed, and a ComfyUI custom node pack when it
lies in `custom_nodes`. Importing it outside ComfyUI loads nothing heavy.
"""

import sys

__version__ = "0.1.0"

WEB_DIRECTORY = "./web"

# ComfyUI has imported its `folder_paths` long before it looks at custom nodes; nobody else has a module of that name.
if "folder_paths" in sys.modules:
    from pathlib import Path

    from .comfy_nodes.requirements import check_requirements

    check_requirements(Path(__file__).with_name("requirements.txt"))

    from .nodes import comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "__version__", "comfy_entrypoint"]
else:
    __all__ = ["WEB_DIRECTORY", "__version__"]
