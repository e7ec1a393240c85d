"""The data sheets of devices in `conf/device`."""

import re
from typing import Any

from leanlm.common.errors import UserError
from leanlm.common.files import CONF, defaults


def sheet(name: str) -> dict[str, Any]:
    """The data sheet of `conf/device` whose file's name stands in a GPU's.

    Raises:
        UserError: there is none.
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    known = {*words, *(first + second for first, second in zip(words, words[1:], strict=False))}  # RTX 4090 is rtx4090
    for file in sorted(CONF.glob("device/*.yaml")):
        node = defaults(f"device/{file.name}")
        if "flops" in node and {*file.stem.split("-")} <= known:
            return node
    raise UserError(
        f"{name}: conf/device has no data sheet of it; write the nearest and its memory: device=h100 device.memory=80GiB"
    )


def size(text: Any) -> int:
    """Bytes of `6GiB`, `500 MB` or a number.

    Raises:
        UserError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B|B?)\s*", str(text))
    if match is None or float(match[1]) <= 0:
        raise UserError(f"device.memory={text}: write a size such as 6GiB, 500MB, or a number of bytes")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " "))
