"""`infinitetalk serve DIR`: workers, the queue and the HTTP API in front of them."""

from __future__ import annotations

import importlib.util
import logging
import shlex
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..wanvideo.errors import InfiniteTalkError, InputError
from .access import Access, is_loopback
from .folder import ServiceFolder
from .workers import Workers, devices_of

if TYPE_CHECKING:
    from .cluster import ClusterWorkers

__all__ = ["PACKAGES", "check_packages", "serve"]

logger = logging.getLogger(__name__)

PACKAGES = {
    "serve": {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"},
    "web": {"gradio": "gradio"},
    "cluster": {"ray": "ray", "fsspec": "fsspec"},
}
"""Extra -> modules that it adds to the library, and the packages that bring them."""

PATIENCE = 3
"""Seconds that requests get to end when the service does: those that follow a job never would."""


def check_packages(extra: str) -> None:
    """Raise InfiniteTalkError with the command that installs what is missing of an extra."""
    missing = [package for module, package in PACKAGES[extra].items() if importlib.util.find_spec(module) is None]
    if missing:
        raise InfiniteTalkError(
            f"This needs packages that are not installed ({', '.join(missing)}): in the folder of this repository, run "
            f"{shlex.quote(sys.executable)} -m pip install '.[{extra}]'"
        )


def serve(
    folder: str | Path,
    base: Mapping[str, Any],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    tokens: str | Path | None = None,
    device: str = "auto",
    retries: int = 1,
    page: bool = False,
    cluster: Mapping[str, Any] | None = None,
    verbose: bool = False,
    started: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve until the process is interrupted.

    Args:
        folder: where queue, uploads and videos are; made where there is none.
        base: settings of all jobs, see `settings.build`.
        port: 0 takes a free one.
        tokens: a file with NAME TOKEN on each line; None: without, for this machine alone.
        device: "auto" is one worker for each GPU.
        retries: how many workers may die while they run a job, before it fails.
        page: show the page, too.
        cluster: arguments of `cluster.ClusterWorkers` that say on which machines and how jobs are made; None: on this
            one.
        started: called with the address when requests are taken.

    Raises InfiniteTalkError for packages that are missing, and InputError for a host without tokens that other machines
    reach, for an address that is taken, for a folder that another service uses, and for a cluster that cannot be used.
    """
    check_packages("serve")
    if page:
        check_packages("web")
    if cluster is not None:
        check_packages("cluster")
    import uvicorn

    from .api import create_app
    from .requests import Requests

    access = Access() if tokens is None else Access.from_file(tokens)
    if not access.tokens and not is_loopback(host):
        raise InputError(f"Other machines reach {host}: give each client a token with --tokens FILE.")
    place = ServiceFolder.make(folder)
    makers: Workers | ClusterWorkers
    if cluster is None:
        makers = Workers(place, base, devices_of(device), retries=retries, verbose=verbose)
    else:
        from .cluster import ClusterWorkers

        makers = ClusterWorkers(place, base, device=device, retries=retries, verbose=verbose, **cluster)
    with _listening(host, port) as listener, makers as workers:
        requests = Requests(place, workers.base)
        app = create_app(requests, workers, access)
        if page:
            from .page import add_page

            add_page(app, requests, access)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=PATIENCE)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        logger.info("%s serves %s with %s.", address, place.path, ", ".join(workers.devices))
        started(address)
        uvicorn.Server(config).run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{host}, port {port}, cannot be listened to ({reason}): choose another one.") from error
