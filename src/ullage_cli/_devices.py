"""`ullage devices`."""

from __future__ import annotations

from ullage_cli._options import json_option, show, verb


@verb
@json_option
def devices(as_json: bool) -> None:
    """List the device table; every number has its source in the package's devices.json."""
    from rich.console import Console
    from rich.table import Table

    import ullage as ul
    from ullage._bytes import format_bytes

    table = ul.devices()
    if as_json:
        show(table, True)
        return
    view = Table("name", "device", "memory", "bandwidth", "bf16 dense", "margin")
    for name, d in sorted(table.items()):
        rate = d.flops.get("bfloat16") or d.flops.get("float16") or d.flops["float32"]
        view.add_row(
            name,
            d.title,
            format_bytes(d.memory_bytes),
            f"{d.memory_bandwidth_bytes_per_s / 1e9:,.0f} GB/s",
            f"{rate / 1e12:,.1f} TFLOP/s",
            f"{d.margin:.0%}",
        )
    Console().print(view)
