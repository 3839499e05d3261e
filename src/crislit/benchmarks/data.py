"""Benchmarks data loading: a training sample stage by stage, and an index of RefCOCO's size."""

import itertools
import json
import multiprocessing
import os
import pickle
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from crislit.benchmarks.accelerated_training import BATCH as ACCELERATOR_BATCH
from crislit.benchmarks.devices import CPU
from crislit.benchmarks.inference import build_network
from crislit.benchmarks.measurements import Measurement, compare_to_reference
from crislit.benchmarks.options import Options
from crislit.benchmarks.timing import Work, interleave, run_in_new_process
from crislit.benchmarks.waiting import (
    CPU_BATCH,
    measure_accelerated_waiting,
    measure_waiting,
    needed_samples,
)
from crislit.config import compose_config
from crislit.data import (
    ReferDataModule,
    ReferIndex,
    TrainKey,
    encode_segmentation,
    make_scene,
    read_image,
)
from crislit.io import Image, write_text
from crislit.training import build_data
from crislit.transforms import (
    BORDER,
    letterbox_image,
    letterbox_mask,
    letterbox_matrices,
    normalize,
)

IMAGES = 160
"""Number of generated images, enough for two workers."""
BATCH = 16
FULL_SIZE = {"images": 20_000, "refs": 50_000, "sentences": 142_000, "annotations": 200_000}
"""RefCOCO's sizes."""


def measure_data(options: Options, device: torch.device = CPU) -> Iterator[Measurement]:
    """Measure stages, waiting and index, on generated images of COCO's size without a data root."""
    with tempfile.TemporaryDirectory() as folder:
        copies = 1 if device.type == "cpu" else -(-needed_samples() // IMAGES)
        root = options.data_root or write_images(Path(folder), IMAGES, copies)
        # Like a worker, a new process holds no network's memory.
        yield from run_in_new_process(measure_stages, root, options.image_size, options.rounds)
        model, size = build_network(options.model), options.image_size
        if device.type == "cpu":
            yield measure_waiting(model, build_module(root, size, CPU_BATCH, workers=2))
        else:
            build = partial(build_module, root, size, ACCELERATOR_BATCH)
            yield from measure_accelerated_waiting(model, build, device)
        write_full_size(Path(folder), FULL_SIZE)
        yield from measure_index(Path(folder))


def build_module(
    root: Path, image_size: int, batch_size: int, workers: int | None
) -> ReferDataModule:
    """Build the data module of RefCOCO in a folder; None is a run's default number of workers."""
    config = compose_config(["dataset=refcoco"]) | {"data_root": str(root), "workers": workers}
    return build_data(config | {"image_size": image_size, "batch_size": batch_size})


def measure_stages(root: Path, image_size: int, rounds: int) -> list[Measurement]:
    """Time the stages of a sample in one thread of one process.

    The baseline of the ratios is the floor: decoding and warping. Nothing is collated, as pixels
    are written into their batch.
    """
    module = build_module(root, image_size, BATCH, workers=0)
    data, index = module.train_set(), module.index
    keys = [TrainKey(0, position) for position in range(min(len(data), IMAGES))]
    refs = [data.draw_refs(key)[0] for key in keys]
    paths = [index.image_path(ref) for ref in refs]
    files = [path.read_bytes() for path in paths]
    batches = [keys[start : start + BATCH] for start in range(0, len(keys), BATCH)]

    def decode(content: bytes) -> Any:
        return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)

    def load_as_float(batch: Sequence[TrainKey]) -> Any:
        loaded = data.__getitems__(batch)
        return normalize(loaded.images), loaded.masks / 255

    work = {
        "decode and cubic warp: the floor": for_each(
            lambda content: reference_warp(decode(content), image_size), files
        ),
        "whole sample, collated": for_each(data.__getitems__, batches),
        "and made floats, as the training process does": for_each(load_as_float, batches),
        "read": for_each(Path.read_bytes, paths),
        "decode": for_each(decode, files),
        "read, check and decode": for_each(lambda ref: read_image(index, ref), refs),
        "warp": for_each(
            lambda image: letterbox_image(image, image_size),
            [read_image(index, ref) for ref in refs],
        ),
        "mask": for_each(index.mask, refs),
        "mask's warp": for_each(
            lambda mask: letterbox_mask(mask, image_size), [255 * index.mask(ref) for ref in refs]
        ),
        "choice and tokens": for_each(data.draw_words, batches),
        "made floats": for_each(normalize, [data.__getitems__(batch).images for batch in batches]),
    }
    torch_threads, cv2_threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        seconds = interleave(work, rounds)
    finally:
        torch.set_num_threads(torch_threads)
        cv2.setNumThreads(cv2_threads)
    return compare_to_reference(
        "data", seconds, dict.fromkeys(work, len(keys)), "s per sample and core"
    )


def for_each(step: Callable[[Any], Any], items: Iterable[Any]) -> Work:
    """Return work that calls a step with each item and discards the result.

    Results that were kept would need new memory, which takes time.
    """
    return lambda: deque(map(step, items), maxlen=0)


def reference_warp(image: Image, size: int) -> Any:
    """Warp an image into a square like the released loader; not to be optimized."""
    matrix, _ = letterbox_matrices(image.shape[0], image.shape[1], size)
    return cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_CUBIC, borderValue=BORDER)


def measure_index(root: Path) -> list[Measurement]:
    """Measure building, opening and sharing an index, each in a new process."""
    built, opened, shared = (run_in_new_process(use_index, root, n) for n in (0, 0, 2))
    return [
        Measurement("data", "index of RefCOCO's size, built", built["seconds"], "s"),
        Measurement("data", "index of RefCOCO's size, opened", opened["seconds"], "s"),
        Measurement("data", "opened: memory", opened["memory"], "MB"),
        Measurement("data", "opened: memory of a worker's own", shared["private"], "MB"),
    ]


def use_index(root: Path, workers: int) -> dict[str, float]:
    """Open the index, and read it in worker processes.

    Returns:
        Seconds and memory in MB of opening, and the largest private memory of a worker in MB.
    """
    before, start = resident_memory_mb(), time.perf_counter()
    index = ReferIndex.open(root, "refcoco", "refs(unc).p")
    seconds, memory = time.perf_counter() - start, resident_memory_mb() - before
    context = multiprocessing.get_context("fork")
    pipe = context.SimpleQueue()
    processes = [context.Process(target=read_all, args=(index, pipe)) for _ in range(workers)]
    for process in processes:
        process.start()
    private = max((pipe.get() for _ in processes), default=0.0)
    for process in processes:
        process.join()
    return {"seconds": seconds, "memory": memory, "private": private}


def read_all(index: ReferIndex, pipe: Any) -> None:
    """Read like a worker in an epoch; send the private memory in MB that this adds."""
    before = private_memory_mb()
    for ref in range(len(index)):
        for row in index.sentence_rows(ref):
            index.sentence(row)
        if ref % 50 == 0:
            index.mask(ref)
    pipe.put(private_memory_mb() - before)


def resident_memory_mb() -> float:
    """Return this process's resident memory in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def private_memory_mb() -> float:
    """Return this process's memory in MB that it shares with no other process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3


def write_images(root: Path, count: int, copies: int = 1) -> Path:
    """Write ``refcoco`` with drawn images of COCO's size and a camera's noise; return the root.

    Args:
        root: The folder of all data.
        count: Number of image files.
        copies: Number of refs, annotations and images of the index for each file.
    """
    images, annotations, refs = [], [], []
    folder = root / "images/train2014"
    folder.mkdir(parents=True)
    for number in range(1, count + 1):
        scene, objects, described = make_scene(0, "shapes", "train", number)
        described_object, sentences = described[0]
        image = cv2.resize(scene, (640, 480), interpolation=cv2.INTER_CUBIC)
        noisy = image + np.random.default_rng(number).normal(0, 6, (480, 640, 1))
        image = noisy.clip(0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{number}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 90])
        mask = np.kron(objects[described_object].visible, np.ones((2, 2), bool))
        segmentation = encode_segmentation(mask)
        for i in range(number, number + copies * count, count):
            images.append({"id": i, "file_name": f"{number}.jpg", "height": 480, "width": 640})
            annotations.append(make_annotation(i, i, segmentation))
            refs.append(make_ref(i, i, sentences, i * 10))
    write_refer_files(root, images, annotations, refs)
    return root


def write_full_size(root: Path, sizes: dict[str, int]) -> None:
    """Write ``refcoco`` with given numbers of everything, but without image files."""
    rng = np.random.default_rng(0)
    (root / "images/train2014").mkdir(parents=True, exist_ok=True)
    images = [
        {"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "height": 480, "width": 640}
        for i in range(sizes["images"])
    ]
    # Two polygons of 25 points each.
    polygons = (
        rng.uniform(0, 400, size=(2, 1)) + rng.uniform(0, 80, size=(2, 50))
        for _ in range(sizes["annotations"])
    )
    annotations = [
        make_annotation(i, i % sizes["images"], points.round(2).tolist())
        for i, points in enumerate(polygons)
    ]
    ends = np.linspace(0, sizes["sentences"], sizes["refs"] + 1).astype(int).tolist()
    refs = [
        make_ref(i, i % sizes["images"], ["the second man from the left"] * (end - start), start)
        for i, (start, end) in enumerate(itertools.pairwise(ends))
    ]
    write_refer_files(root, images, annotations, refs)


def make_annotation(number: int, image: int, segmentation: Any) -> dict[str, Any]:
    """Return an annotation in COCO's format."""
    return {"id": number, "image_id": image, "category_id": 1, "segmentation": segmentation}


def make_ref(number: int, image: int, sentences: Sequence[str], first: int) -> dict[str, Any]:
    """Return a ref in REFER's format, of the annotation of the same number.

    Args:
        number: Its id and its annotation's.
        image: Its image's id.
        sentences: Its sentences.
        first: Id of its first sentence.
    """
    return {
        "ref_id": number,
        "ann_id": number,
        "image_id": image,
        "category_id": 1,
        "split": "train",
        "sentences": [
            {"sent": text, "raw": text, "tokens": text.split(), "sent_id": i}
            for i, text in enumerate(sentences, start=first)
        ],
        "sent_ids": list(range(first, first + len(sentences))),
    }


def write_refer_files(
    root: Path, images: list[Any], annotations: list[Any], refs: list[Any]
) -> None:
    """Write the annotations and the refs file of ``refcoco``."""
    instances = json.dumps({"images": images, "annotations": annotations})
    write_text(root / "refcoco/instances.json", instances)  # makes the folder
    (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
