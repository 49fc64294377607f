"""`ullage devices`."""

from __future__ import annotations

import click

from ullage_cli._options import json_option, show, verb


@verb
@json_option
def devices(as_json: bool) -> None:
    """List the device table; every number has its source in the package's devices.json."""
    import ullage as ul
    from ullage._bytes import format_bytes

    table = ul.devices()
    if as_json:
        show(table, True)
        return
    rows = [("name", "memory", "bandwidth", "bf16, dense", "margin")]
    for name, d in sorted(table.items()):
        rate = d.flops.get("bfloat16") or d.flops.get("float16") or d.flops["float32"]
        rows.append(
            (
                name,
                format_bytes(d.memory_bytes),
                f"{d.memory_bandwidth_bytes_per_s / 1e9:,.0f} GB/s",
                f"{rate / 1e12:,.1f} TFLOP/s",
                f"{d.margin:.0%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        click.echo(f"{first:<{widths[0]}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(rest, widths[1:], strict=True)))
    click.echo("\nnames may be short: h100, rtx4090; a100 is the one with more memory")
