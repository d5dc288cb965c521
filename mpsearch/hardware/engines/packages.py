"""Which libraries are there, and in which version."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_versions(*names: str) -> dict[str, str]:
    """Name -> version of what is installed.

    >>> list(package_versions("numpy", "no-such-package"))
    ['numpy']
    """
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def missing_packages(*names: str) -> str:
    """Say which libraries are not installed; empty when all are.

    >>> missing_packages("numpy", "no-such-package")
    'no-such-package is not installed'
    """
    there = package_versions(*names)
    missing = [name for name in names if name not in there]
    return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed" if missing else ""
