"""Pictures with their classes, from wherever people keep them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .images import open_picture

if TYPE_CHECKING:
    from PIL.Image import Image

HUB = "hf://"


class Pictures:
    """Pictures with their classes: a folder of one folder a class, a .parquet file or a folder of them, or
    hf://NAME[:SPLIT], all through the package `datasets`.

    Attributes:
        labels: the names of the classes.
    """

    tokenizer_file = None

    def __init__(self, source: str):
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise InputError(f"pictures need {error.name}: pip install 'heronry[vision]'") from error
        self.source = source
        path = Path(source).expanduser()
        datasets.disable_progress_bars()
        try:
            if source.startswith(HUB):
                name, _, split = source.removeprefix(HUB).partition(":")
                found = datasets.load_dataset(name, split=split or "train")
            elif path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
                files = [str(path)] if path.is_file() else sorted(map(str, path.glob("*.parquet")))
                if not path.exists():
                    raise InputError("no such file")
                found = datasets.load_dataset("parquet", data_files=files, split="train")
            elif path.is_dir():
                found = datasets.load_dataset("imagefolder", data_dir=str(path), split="train")
            else:
                raise InputError("no folder of pictures, no .parquet file and no hf:// name")
            picture, label = _columns(found)
            self.rows = found.cast_column(picture, datasets.Image(decode=False)).select_columns([picture, label])
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
        except Exception as error:  # a library's, of whatever is wrong with the data
            raise InputError(f"{source}: cannot be read ({str(error).splitlines()[0]})") from error
        self._picture, self._label = picture, label
        feature = found.features[label]
        names = getattr(feature, "names", None)
        self.labels: list[str] = list(names) if names else [str(i) for i in range(1 + max(found[label]))]

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, i: int) -> tuple[Image, int]:
        """A picture, in RGB, and its class."""
        row = self.rows[i]
        held = row[self._picture]
        try:
            picture = open_picture(held["bytes"] if held["bytes"] is not None else held["path"])
        except InputError as error:
            raise InputError(f"{self.source}: picture {i}: {error}") from error
        return picture, int(row[self._label])


def _columns(found: Any) -> tuple[str, str]:
    """The names of the pictures' and the classes' column."""
    names = found.column_names
    picture = next((name for name in ("image", "img", "picture") if name in names), None)
    label = next((name for name in ("label", "labels", "fine_label", "class") if name in names), None)
    if picture is None or label is None:
        raise InputError(f"has the columns {', '.join(names)}; pictures stand in 'image', their classes in 'label'")
    return picture, label
