"""Packages that only the preparation of data and its tokenizers need."""

import importlib
from types import ModuleType

from flashtrain.errors import UserError


def require(package: str) -> ModuleType:
    """Import ``package``. Raises UserError that says how to install it if it is missing."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.split(".")[0]:
            raise
        raise UserError(f"{error.name} is not installed: pip install 'flashtrain[data]'") from None
