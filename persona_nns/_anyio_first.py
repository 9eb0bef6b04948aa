"""Import anyio before nnsight.

nnsight mounts ``.save`` on ``object``. anyio then refuses to define some of its classes, which
it does only when they are first used (``TypeError: Attribute 'save' is missing its type
annotation``): in an asynchronous HTTP client, in an upload. What has been imported before the
mount is safe, so this comes first in the rooms that load models and talk to servers (a store is
read without it). Where nnsight is already there, the mount is lifted for the moment.
"""

import sys


def import_anyio() -> None:
    """Make anyio's late classes exist, whether or not nnsight has been imported."""
    nnsight = sys.modules.get("nnsight")
    if nnsight is None:
        _import()
        return
    from nnsight._c import mount, unmount

    if mount is None or unmount is None or "save" not in vars(object):
        _import()
        return
    unmount("save")
    try:
        _import()
    finally:
        mount(nnsight.save, "save")


def _import() -> None:
    import anyio._backends._asyncio
    import anyio.abc  # noqa: F401


import_anyio()
