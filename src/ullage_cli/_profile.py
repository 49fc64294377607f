"""`ullage profile`."""

from __future__ import annotations

from typing import Any

from ullage_cli._options import (
    cost_options,
    json_option,
    load,
    show,
    show_plot,
    small_plot,
    target_options,
    verb,
    verbose_option,
)
from ullage_cli._progress import progress


@verb
@target_options
@cost_options
@verbose_option
@json_option
def profile(as_json: bool, verbose: bool, device: str | None, costs: str, **options: Any) -> None:
    """Capture one step without running it: the peak, what holds it, the units."""
    from ullage.planner.plan._profile import study_and_profile

    with progress(as_json) as report:
        wanted = verbose or as_json  # without them no option is shown, so none is captured
        study, result = study_and_profile(load(options), device, costs, progress=report, options=wanted)
        plot = small_plot(study, None, report) if not as_json else None
    show(result, as_json, verbose)
    if plot is not None:
        show_plot(plot)
