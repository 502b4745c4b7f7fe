"""Images with their classes, from folders, .parquet files and the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .. import hub
from ..errors import InputError
from .images import open_image

if TYPE_CHECKING:
    from PIL.Image import Image

HUB = "hf://"


class ImageDataset:
    """Images with their classes, read through the package `datasets`. `dataset[i]` is an RGB image and its class.

    Attributes:
        source: where they come from.
        class_names: the name of each class.
    """

    def __init__(self, source: str):
        """
        Args:
            source: a folder with one folder per class, a .parquet file or a folder of them, or hf://NAME[:SPLIT].

        Raises:
            InputError: unreadable or damaged data, or the package `datasets` is not installed.
        """
        try:
            import datasets  # an optional package that takes seconds to import
        except ModuleNotFoundError as error:
            package = str(error.name).partition(".")[0]
            raise InputError(f"image datasets need {package}: pip install 'heronry[vision]'") from error
        self.source = source
        path = Path(source).expanduser()
        datasets.disable_progress_bars()
        try:
            if source.startswith(HUB):
                rows = hub.load_dataset(source)
            elif path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
                files = [str(path)] if path.is_file() else sorted(map(str, path.glob("*.parquet")))
                if not path.exists():
                    raise InputError("no such file")
                rows = datasets.load_dataset("parquet", data_files=files, split="train")
            elif path.is_dir():
                rows = datasets.load_dataset("imagefolder", data_dir=str(path), split="train")
            else:
                raise InputError("not a folder of images, a .parquet file or an hf:// name")
            self._image_column, self._label_column = _find_columns(rows.column_names)
            columns = [self._image_column, self._label_column]
            self._rows = rows.cast_column(columns[0], datasets.Image(decode=False)).select_columns(columns)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
        except Exception as error:  # the library raises many kinds, depending on what is wrong with the data
            raise InputError(
                f"{source}: cannot be read ({' '.join(str(error).split()) or type(error).__name__})"
            ) from error
        names = getattr(rows.features[self._label_column], "names", None)
        n_classes = 0 if names else 1 + max(rows[self._label_column])
        self.class_names: list[str] = list(names) if names else [str(i) for i in range(n_classes)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> tuple[Image, int]:
        row = self._rows[i]
        encoded = row[self._image_column]
        try:
            image = open_image(encoded["bytes"] if encoded["bytes"] is not None else encoded["path"])
        except InputError as error:
            raise InputError(f"{self.source}: image {i}: {error}") from error
        return image, int(row[self._label_column])


def _find_columns(names: list[str]) -> tuple[str, str]:
    """The names of the columns with the images and with their classes."""
    image = next((name for name in ("image", "img", "picture") if name in names), None)
    label = next((name for name in ("label", "labels", "fine_label", "class") if name in names), None)
    if image is None or label is None:
        raise InputError(f"has the columns {', '.join(names)}; expected 'image' and 'label'")
    return image, label
