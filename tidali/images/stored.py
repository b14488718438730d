"""The image of a packed sample, as training decodes it."""

from __future__ import annotations

from PIL import Image

from tidali.dataset.contract import Dataset, SampleRecord, Shard
from tidali.errors import DatasetError
from tidali.images.errors import Unusable
from tidali.images.read import read_picture


def stored_image(dataset: Dataset, shard: Shard, record: SampleRecord) -> Image.Image:
    """RGB and upright.

    Raises:
        DatasetError: it cannot be read or decoded; names the shard and the sample.
    """
    where = f"{dataset.root / shard.name}: sample {record.key}"
    try:
        picture = read_picture(dataset.stored_bytes(shard, record), max_pixels=record.height * record.width)
    except OSError as error:
        raise DatasetError(f"{where} cannot be read ({error.strerror}); {dataset.fix}") from None
    except Unusable as error:
        raise DatasetError(f"{where} does not decode ({error}); 'tidali verify --decode' names all such samples") from None
    return Image.fromarray(picture.upright)
