"""Load device profiles: built-in ones from `devices/`, or files of users."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from passes.cost.device_profile import DeviceProfile, read_profile
from passes.errors import OptionError

_SUFFIX = ".toml"
_FOLDER = files(__package__) / "devices"


def built_in_profiles() -> tuple[str, ...]:
    """Return the names of the built-in profiles; their files name the sources of all figures."""
    names = (entry.name for entry in _FOLDER.iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)))


def load_profile(source: str | Path) -> DeviceProfile:
    """Read a device profile.

    Args:
        source: The name of a built-in profile ("h100"), or the path of a TOML file.

    Raises:
        OptionError: There is no such profile, or it is incomplete.
    """
    name = str(source)
    if name.lower() in built_in_profiles():
        text = _FOLDER.joinpath(f"{name.lower()}{_SUFFIX}").read_text(encoding="utf-8")
        return read_profile(text, f"the built-in profile {name!r}")
    path = Path(source)
    if path.suffix != _SUFFIX and not path.is_file():
        raise OptionError(
            f"no built-in device profile is called {name!r}: take one of "
            f"{', '.join(built_in_profiles())}, or a file ending in {_SUFFIX} that `pnn-compile "
            "profile -o FILE` writes"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read the device profile {name!r} ({error})") from error
    return read_profile(text, f"the device profile {name!r}")
