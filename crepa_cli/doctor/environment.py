"""The machine: Python, libraries, devices, video encoding and the Hub's login."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from crepa_cli.doctor.findings import Check


def check_environment() -> list[Check]:
    """Check everything about this machine that does not depend on a run's settings.

    If a library is missing or too old, checks that import libraries are skipped.
    """
    try:
        package = metadata.distribution("crepa")
    except metadata.PackageNotFoundError:
        unknown = Check(
            "crepa", "warning", "not installed as a package, so no version can be checked", "pip install crepa"
        )
        return [unknown, *_check_machine()]
    checks = [check_python(package.metadata["Requires-Python"]), *check_libraries(package.requires or [])]
    broken = any(check.status == "failure" for check in checks)
    return checks if broken else [*checks, *_check_machine()]


def _check_machine() -> list[Check]:
    from crepa_cli.libraries import silence_libraries

    silence_libraries()
    from crepa_cli.doctor.devices import check_devices

    return [*check_devices(), check_encoding(), check_login()]


def check_python(required: str) -> Check:
    """Check Python against the version that the package requires."""
    version = platform.python_version()
    if version not in SpecifierSet(required):
        return Check(
            "python",
            "failure",
            f"{version}; crepa needs {required}",
            "create an environment with another Python version",
        )
    return Check("python", "fine", f"{version}, {sys.executable}")


def check_libraries(requirements: Sequence[str]) -> list[Check]:
    """Check each required library against its oldest supported version and its tested version."""
    tested = pinned_versions()
    needed = [Requirement(text) for text in requirements]
    return [
        check_library(one, tested.get(one.name))
        for one in needed
        if one.marker is None or one.marker.evaluate({"extra": ""})
    ]


def check_library(requirement: Requirement, tested: Version | None) -> Check:
    """Check one library against its requirement and the tested version."""
    name = requirement.name
    install = f"pip install '{requirement}'"
    try:
        version = Version(metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, "failure", "not installed", install)
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(name, "failure", f"{version}; crepa needs {requirement.specifier}", install)
    if tested is None:
        return Check(name, "fine", str(version))
    if version.release > tested.release:
        advice = f"if it fails: pip install '{name}=={tested}'"
        return Check(name, "warning", f"{version} is newer than {tested}, the tested version", advice)
    return Check(name, "fine", str(version) if version.release == tested.release else f"{version}; tested: {tested}")


def pinned_versions() -> dict[str, Version]:
    """The versions with which the tests pass, from the installed package or from its source checkout."""
    package = Path(__file__).parents[1]
    file = next((path for path in (package, package.parent) if (path / "constraints.txt").is_file()), None)
    if file is None:
        return {}
    lines = (file / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {name.strip(): Version(version.strip()) for name, version in pinned}


def check_encoding() -> Check:
    """Whether validation videos can be written."""
    import av

    try:
        av.codec.Codec("libx264", "w")
    except ValueError:
        advice = "install PyAV from PyPI, which includes it: pip install --force-reinstall av"
        return Check("video", "failure", "this FFmpeg cannot encode H.264 (libx264)", advice)
    return Check("video", "fine", "H.264 can be encoded (libx264)")


def check_login() -> Check:
    """Whether there is a token for the Hub; the token is not verified."""
    from huggingface_hub import get_token

    if get_token():
        return Check("hub login", "fine", "a token is set")
    return Check("hub login", "fine", "no token; only gated and private repositories need one", "hf auth login")
