"""What every benchmark does with its result."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any


def write_record(settings: Any, result: dict[str, Any]) -> None:
    """Write the result to `settings.out` (JSON) behind the settings that made it, folders and files left out, and say so."""
    from dedpo_diffusion.core.console import say
    from dedpo_diffusion.core.files import write_json

    kept = {key: value for key, value in asdict(settings).items() if not isinstance(value, Path)}
    write_json(settings.out, {"settings": kept, **result})
    say(f"wrote {settings.out}")
