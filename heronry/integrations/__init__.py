"""heronry's models as classes of other packages; each file imports the package that it is for."""

from importlib import import_module


def require(package: str, install: str) -> None:
    """ModuleNotFoundError, which says what to install, where a package is missing that a module here is made for."""
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModuleNotFoundError(f"this needs {package}: pip install '{install}'", name=package) from None
