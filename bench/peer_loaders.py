"""The loaders that are measured, each set up as its own documentation shows, with one worker or thread per core.

Each function takes the job and returns batches: images (N, 3, res, res), shuffled, flipped horizontally at random and
normalised, and labels (N,). If the job asks for crops, each image is a random resized crop, otherwise the centre square. A
loader that has a bicubic kernel resizes with it. If the stored images have the requested size, loaders whose resize would copy
them omit it. They run in processes of their own, see `bench.case_worker`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench.case_worker import DataJob
from bench.crops import CROP_RATIO, CROP_SCALE
from tidali.config import Augment, CacheChoice, Preprocess
from tidali.files import replacing

Batches = Iterable[Any]


class _Epochs:
    """An iterable that makes a new iterator for each epoch."""

    def __init__(self, epoch: Callable[[], Iterator[Any]]) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        return self._epoch()


def files_of(job: DataJob) -> list[tuple[str, int]]:
    """Path and label of every image, in a random order, for loaders that shuffle only partly: tidali's shards are shuffled
    too."""
    files = [(str(path), int(path.parent.name)) for path in sorted(Path(job.folder).glob("*/*"))]
    return random.Random(0).sample(files, len(files))


def reference(job: DataJob) -> Batches:
    """Every sample once, in order, not flipped, by PIL and torchvision: what the others are checked against."""
    from torch.utils.data import DataLoader
    from torchvision import datasets

    images = datasets.ImageFolder(job.folder, transform_v1(job, flip=False))
    return DataLoader(images, batch_size=job.batch_size, num_workers=job.cores)


# ---------------------------------------------------------------------------------------------------------------- torchvision


def transform_v1(job: DataJob, *, flip: bool = True) -> Callable[[Any], Any]:
    """PIL image -> tensor."""
    from torchvision import transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    steps: list[Any] = [transforms.Resize(job.res, bicubic), transforms.CenterCrop(job.res)]
    if job.crops:
        steps = [transforms.RandomResizedCrop(job.res, CROP_SCALE, CROP_RATIO, bicubic)]
    steps += [transforms.RandomHorizontalFlip()] if flip else []
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(job.mean, job.std)])


def transform_v2(job: DataJob, first: Any) -> Callable[[Any], Any]:
    """Whatever ``first`` turns into a uint8 image tensor -> tensor."""
    import torch
    from torchvision.transforms import InterpolationMode, v2

    bicubic = InterpolationMode.BICUBIC
    square = [v2.Resize(job.res, bicubic, antialias=True), v2.CenterCrop(job.res)]
    if job.crops:
        square = [v2.RandomResizedCrop(job.res, CROP_SCALE, CROP_RATIO, bicubic, antialias=True)]
    last = [v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(job.mean, job.std)]
    return v2.Compose([first, *square, *last])


def _image_folder(job: DataJob, transform: Callable[[Any], Any]) -> Batches:
    from torch.utils.data import DataLoader
    from torchvision import datasets

    return DataLoader(
        datasets.ImageFolder(job.folder, transform),
        batch_size=job.batch_size,
        shuffle=True,
        num_workers=job.cores,
        drop_last=True,
        persistent_workers=True,
    )


def torchvision_v1(job: DataJob) -> Batches:
    return _image_folder(job, transform_v1(job))


def torchvision_v2(job: DataJob) -> Batches:
    from torchvision.transforms import v2

    return _image_folder(job, transform_v2(job, v2.ToImage()))


# ----------------------------------------------------------------------------------------------------------------- webdataset


def webdataset(job: DataJob) -> Batches:
    """Reads tidali's own tars. Batches are made in the workers. The documentation's second shuffle, over the samples of all
    workers, would take the batches apart and copy them once more; it is omitted, in webdataset's favour."""
    import webdataset as wds

    from tidali.dataset.contract import open_dataset

    dataset = open_dataset(Path(job.root))
    tars = [str(path) for path in dataset.tar_paths("train")]
    images = ";".join(dataset.split("train").extensions)
    samples = (
        wds.WebDataset(tars, shardshuffle=len(tars))
        .shuffle(1000)
        .decode("pilrgb")
        .to_tuple(images, "cls")
        .map_tuple(transform_v1(job), int)
        .batched(job.batch_size, partial=False)
    )
    workers = max(min(job.cores, len(tars), job.samples // job.batch_size), 1)  # each worker reads its own tars
    return wds.WebLoader(samples, batch_size=None, num_workers=workers, persistent_workers=True)


# ----------------------------------------------------------------------------------------------------------------------- DALI


def dali_file(job: DataJob) -> Batches:
    """Reads as DALI's own ResNet training example does."""
    from nvidia.dali import fn
    from nvidia.dali.plugin.pytorch import DALIClassificationIterator, LastBatchPolicy

    def read() -> Any:
        return fn.readers.file(name="Reader", file_root=job.folder, random_shuffle=True, pad_last_batch=True)

    pipe = _dali_pipeline(job, read)
    batches = DALIClassificationIterator(pipe, reader_name="Reader", last_batch_policy=LastBatchPolicy.DROP, auto_reset=True)
    return _Epochs(lambda: ((batch[0]["data"], batch[0]["label"]) for batch in batches))


def dali_webdataset(job: DataJob) -> Batches:
    """Reads as DALI's webdataset example does, with the default buffer sizes. It has no epochs of its own."""
    import numpy as np
    import torch
    from nvidia.dali import fn, types

    from tidali.dataset.contract import open_dataset
    from tidali.dataset.shard_bytes import LABEL_EXTENSION

    dataset = open_dataset(Path(job.root))
    weights = np.array([10**k for k in reversed(range(dataset.manifest.label_digits))], np.int32)

    def read() -> Any:
        found: Any = fn.readers.webdataset(
            paths=[str(path) for path in dataset.tar_paths("train")],
            index_paths=[str(path) for path in dataset.index_paths("train")],
            ext=[";".join(dataset.split("train").extensions), LABEL_EXTENSION],
            missing_component_behavior="error",
            random_shuffle=True,
        )
        images, digits = found
        return images, fn.reductions.sum((fn.cast(digits, dtype=types.INT32) - ord("0")) * types.Constant(weights))

    pipe = _dali_pipeline(job, read)
    pipe.build()

    def epoch() -> Iterator[Any]:
        for _ in range(job.samples // job.batch_size):
            yield tuple(torch.from_dlpack(output.as_tensor()) for output in pipe.run())

    return _Epochs(epoch)


def _dali_pipeline(job: DataJob, read: Callable[[], Any]) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=job.batch_size, num_threads=job.cores, device_id=None)
    def define() -> tuple[Any, Any]:
        encoded, labels = read()
        if job.crops:
            images = fn.decoders.image_random_crop(
                encoded, device="cpu", output_type=types.RGB, random_area=CROP_SCALE, random_aspect_ratio=CROP_RATIO
            )
            images = fn.resize(images, size=(job.res, job.res), interp_type=types.INTERP_CUBIC)
        else:
            images = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        if not (job.crops or job.as_stored):
            images = fn.resize(images, size=job.res, mode="not_smaller", interp_type=types.INTERP_CUBIC)
        images = fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            output_layout="CHW",
            crop=(job.res, job.res),
            mean=[255 * value for value in job.mean],
            std=[255 * value for value in job.std],
            mirror=fn.random.coin_flip(),
        )
        return images, labels

    return define()


# ----------------------------------------------------------------------------------------------------------------------- FFCV


FFCV_CROPS_FROM_PX = 400
"""The longer side that FFCV's ImageNet example for a ResNet-18 shrinks images to before they are cropped."""


def _ffcv(job: DataJob, mode: str, *, longer_side_px: int | None = None) -> Batches:
    """As jpg, FFCV encodes the decoded pixels as JPEG again."""
    import numpy as np
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import (
        CenterCropRGBImageDecoder,
        IntDecoder,
        RandomResizedCropRGBImageDecoder,
        SimpleRGBImageDecoder,
    )
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter
    from torchvision import datasets

    path = Path(job.scratch) / f"{mode}.beton"
    if not path.exists():
        fields = {"image": RGBImageField(write_mode=mode, max_resolution=longer_side_px), "label": IntField()}
        with replacing(path) as temporary:
            writer = DatasetWriter(str(temporary), fields, num_workers=job.cores)
            writer.from_indexed_dataset(datasets.ImageFolder(job.folder))
    size = (job.res, job.res)
    if job.crops:
        decoder: Any = RandomResizedCropRGBImageDecoder(size, CROP_SCALE, CROP_RATIO)
    else:
        decoder = SimpleRGBImageDecoder() if job.as_stored else CenterCropRGBImageDecoder(size, 1.0)
    normalise = NormalizeImage(255 * np.array(job.mean), 255 * np.array(job.std), np.float32)
    return Loader(
        str(path),
        batch_size=job.batch_size,
        num_workers=job.cores,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines={
            "image": [decoder, RandomHorizontalFlip(), normalise, ToTensor(), ToTorchImage()],
            "label": [IntDecoder(), ToTensor()],
        },
    )


def ffcv_raw(job: DataJob) -> Batches:
    return _ffcv(job, "raw", longer_side_px=FFCV_CROPS_FROM_PX if job.crops else None)


ffcv_jpg = partial(_ffcv, mode="jpg")
ffcv_jpg_400 = partial(_ffcv, mode="jpg", longer_side_px=FFCV_CROPS_FROM_PX)

# ------------------------------------------------------------------------------------------------ LitData, MosaicML, SPDL


def litdata(job: DataJob) -> Batches:
    """The unchanged JPEGs, in LitData's chunks."""
    from litdata import StreamingDataLoader, StreamingDataset, optimize
    from torchvision.transforms import v2

    chunks = Path(job.scratch) / "chunks"
    if not (chunks / "index.json").exists():
        settings: dict[str, Any] = {"chunk_bytes": "64MB", "num_workers": job.cores}
        # Its default start method would also apply to the loader's workers in this process: spawned, which start slowly.
        optimize(litdata_sample, files_of(job), output_dir=str(chunks), start_method="fork", **settings)
    transform = transform_v2(job, v2.RGB())  # a grey JPEG has one channel

    class Images(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return transform(sample["image"]), sample["label"]

    images = Images(str(chunks), shuffle=True, drop_last=True)
    return StreamingDataLoader(
        images, batch_size=job.batch_size, num_workers=job.cores, drop_last=True, persistent_workers=True
    )


def litdata_sample(item: tuple[str, int]) -> dict[str, Any]:
    from PIL import Image

    path, label = item
    return {"image": Image.open(path), "label": label}


def mosaic(job: DataJob) -> Batches:
    """The unchanged JPEGs, in MosaicML's shards."""
    from PIL import Image
    from streaming import MDSWriter, StreamingDataLoader, StreamingDataset

    shards = Path(job.scratch) / "mds"
    if not (shards / "index.json").exists():
        with MDSWriter(out=str(shards), columns={"image": "jpeg", "label": "int"}) as writer:
            for path, label in files_of(job):
                with Image.open(path) as image:
                    writer.write({"image": image, "label": label})
    transform = transform_v1(job)

    class Images(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return transform(sample["image"].convert("RGB")), sample["label"]

    images = Images(local=str(shards), shuffle=True, batch_size=job.batch_size)
    return StreamingDataLoader(
        images, batch_size=job.batch_size, num_workers=job.cores, drop_last=True, persistent_workers=True
    )


def spdl(job: DataJob) -> Batches:
    """FFmpeg's libraries decode and resize batches in threads, as in SPDL's ImageNet example. Its documentation writes crops as
    FFmpeg's filter; the box is drawn by torchvision, from the size in the JPEG's header."""
    import spdl.io
    import torch
    from spdl.pipeline import PipelineBuilder
    from torchvision.transforms import RandomResizedCrop

    files = files_of(job)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (job.mean, job.std))
    scale = {"scale_width": job.res, "scale_height": job.res, "scale_mode": "crop", "scale_algo": "bicubic"}
    described = spdl.io.get_video_filter_desc(
        **({} if job.as_stored else scale), crop_width=job.res, crop_height=job.res, pix_fmt="rgb24"
    )

    def cropped(path: str) -> Any:
        packets = spdl.io.demux_image(path)
        of_size = torch.empty(1).expand(1, packets.codec.height, packets.codec.width)
        top, left, height, width = RandomResizedCrop.get_params(of_size, list(CROP_SCALE), list(CROP_RATIO))
        # exact: otherwise a box in an image with chroma subsampling is moved to even pixels.
        box = f"crop={width}:{height}:{left}:{top}:exact=1"
        filters = f"{box},scale={job.res}:{job.res}:flags=bicubic,format=pix_fmts=rgb24"
        return spdl.io.decode_packets(packets, filter_desc=filters)

    def load(paths: list[str]) -> Any:
        if job.crops:
            return spdl.io.convert_frames([cropped(path) for path in paths])
        return spdl.io.load_image_batch(paths, width=None, height=None, pix_fmt=None, filter_desc=described)

    def decode(items: list[tuple[str, int]]) -> tuple[Any, Any]:
        paths, labels = zip(*items, strict=True)
        buffer = load(list(paths))
        images = spdl.io.to_torch(buffer).permute(0, 3, 1, 2)
        flipped = torch.rand(len(images)) < 0.5
        images[flipped] = images[flipped].flip(3)
        return images.float().sub_(255 * mean).div_(255 * std), torch.tensor(labels)

    decode(files[:1])  # the pipeline drops what fails: without FFmpeg's libraries that is everything, and the reason is lost

    def epoch() -> Iterator[Any]:
        pipeline = (
            PipelineBuilder()
            .add_source(random.sample(files, len(files)))
            .aggregate(job.batch_size, drop_last=True)
            .pipe(decode, concurrency=job.cores)
            .add_sink()
            .build(num_threads=job.cores)
        )
        with pipeline.auto_stop():
            yield from pipeline

    return _Epochs(epoch)


# --------------------------------------------------------------------------------------------------------------------- tidali


def _tidali(job: DataJob, cache: CacheChoice, dtype: str) -> Batches:
    """In bfloat16, the input of a training step under bf16 autocast, or in float32."""
    import torch

    from tidali.dataset.contract import open_dataset
    from tidali.loading.batches import Training
    from tidali.loading.data import Data

    crops: dict[str, Any] = {"crop_scale": CROP_SCALE, "crop_ratio": CROP_RATIO} if job.crops else {}
    return Data(open_dataset(Path(job.root)), torch.device("cpu"), cache=cache).batches(
        "train",
        Preprocess(res=job.res, mean=job.mean, std=job.std),
        job.batch_size,
        training=Training(augment=Augment(flip="random", **crops)),
        dtype=getattr(torch, dtype),
    )


tidali_streaming = partial(_tidali, cache="off", dtype="float32")
tidali_cached = partial(_tidali, cache="device", dtype="float32")
tidali_cached_bf16 = partial(_tidali, cache="device", dtype="bfloat16")
