"""The benchmark's data: what a training sample takes, stage by stage, and an index of RefCOCO's full size."""

import argparse
import json
import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from crislit.data.datamodule import ReferDataModule
from crislit.data.dataset import TrainKey, read_image
from crislit.data.letterbox import BORDER, Image, letterbox_image, letterbox_mask, letterbox_matrices, normalise
from crislit.data.refer import ReferIndex
from crislit.data.shapes import make_scene, segmentation
from crislit.losses import text_to_pixel_contrastive_loss
from crislit.models.cris import CRIS
from crislit.models.rearranged import rearrange
from crislit.timing import Measurement, Work, compare, interleave

PICTURES = 160
"""How many are drawn, enough for two workers."""
BATCH = 16
TRAINED, STEPS = 4, 6
"""Sentences of a training step, and how many steps are taken to see whether they wait for data."""
FULL_SIZE = {"images": 20_000, "refs": 50_000, "sentences": 142_000, "annotations": 200_000}
"""RefCOCO's."""


def measure(model: CRIS, options: argparse.Namespace) -> Iterator[Measurement]:
    """Measure stages, waiting and index; on drawn pictures of COCO's size unless there are others."""
    with tempfile.TemporaryDirectory() as folder:
        root = options.data_root or draw_photographs(Path(folder), PICTURES)
        known = {"root": root, "folder": "refcoco", "refs": "refs(unc).p", "image_size": options.image_size}
        yield from in_a_process(stages, known, options.rounds)  # as a worker is, which has no network's memory behind it
        yield waiting(model, ReferDataModule(**known, batch_size=TRAINED, workers=2))
        write_full_size(Path(folder), FULL_SIZE)
        yield from index(Path(folder))


# -- One process's samples ----------------------------------------------------------------------------------------------------


def stages(known: Mapping[str, Any], rounds: int) -> list[Measurement]:
    """Time what a sample consists of, in one process and thread; ratios are of the first line, the floor.

    There is nothing to collate: pixels are written into their batch.
    """
    module = ReferDataModule(**known, batch_size=BATCH)
    module.prepare_data()
    data, index, size = module.train_set(), module.index, module.image_size
    keys = [TrainKey(0, position) for position in range(min(len(data), PICTURES))]
    refs = [data.draw_refs(key)[0] for key in keys]
    paths = [index.image_path(ref) for ref in refs]
    files = [path.read_bytes() for path in paths]
    pictures, masks = [read_image(index, ref) for ref in refs], [255 * index.mask(ref) for ref in refs]

    def decode(content: bytes) -> Any:
        return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)

    def finish(part: Sequence[TrainKey]) -> Any:
        batch = data.__getitems__(part)
        return normalise(batch.images), batch.masks / 255

    batches = [keys[start : start + BATCH] for start in range(0, len(keys), BATCH)]
    squares = [data.__getitems__(part).images for part in batches]

    work: dict[str, Work] = {
        "decode and cubic warp: the floor": each(lambda content: plain_warp(decode(content), size), files),
        "whole sample, collated": each(data.__getitems__, batches),
        "and made floats, as the training process does": each(finish, batches),
        "read": each(Path.read_bytes, paths),
        "decode": each(decode, files),
        "read, check and decode": each(lambda ref: read_image(index, ref), refs),
        "warp": each(lambda picture: letterbox_image(picture, size), pictures),
        "mask": each(index.mask, refs),
        "mask's warp": each(lambda mask: letterbox_mask(mask, size), masks),
        "choice and tokens": each(data.draw_words, batches),
        "made floats": each(normalise, squares),
    }
    threads, others = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        seconds = interleave(work, rounds)
    finally:
        torch.set_num_threads(threads)
        cv2.setNumThreads(others)
    return compare("data", seconds, dict.fromkeys(work, len(keys)), "s a sample and core")


def each(step: Callable[[Any], Any], given: Sequence[Any]) -> Work:
    """Return what takes a step with one after another, and keeps nothing, for new memory takes time."""

    def work() -> None:
        for one in given:
            step(one)

    return work


def plain_warp(image: Image, size: int) -> Any:
    """Warp a picture into a square as the released loader does; it stays as it is, for the floor is made of it."""
    matrix, _ = letterbox_matrices(image.shape[0], image.shape[1], size)
    return cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_CUBIC, borderValue=BORDER)


def waiting(model: CRIS, module: ReferDataModule) -> Measurement:
    """Train some steps on two workers' data, and return the share of the time in which none was there."""
    module.prepare_data()
    model = rearrange(model.train().to(memory_format=torch.channels_last))  # the fastest step, which waits soonest
    adam = torch.optim.Adam(model.parameters(), lr=1e-6, fused=True)
    loader = module.train_dataloader()
    batches = iter(loader)
    next(batches)  # until the workers have started
    start, waited = time.perf_counter(), 0.0
    for _ in range(STEPS):
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        adam.zero_grad()
        torch.autograd.backward(text_to_pixel_contrastive_loss(model(normalise(batch.images), batch.tokens), batch.masks / 255))
        adam.step()
    return Measurement(
        "data",
        f"a training step of {TRAINED} waits for {loader.num_workers} workers",
        100 * waited / (time.perf_counter() - start),
        "%",
    )


# -- The index ----------------------------------------------------------------------------------------------------------------


def index(root: Path) -> list[Measurement]:
    """Measure building, opening and sharing an index, each in a new process."""
    built, opened = in_a_process(use_index, root), in_a_process(use_index, root)
    lines = [
        Measurement("data", "index of RefCOCO's size, built", built["seconds"], "s"),
        Measurement("data", "index of RefCOCO's size, opened", opened["seconds"], "s"),
        Measurement("data", "opened: memory", opened["memory"], "MB"),
    ]
    shared = in_a_process(use_index, root, 2)
    return [*lines, Measurement("data", "opened: memory of a worker's own", shared["own"], "MB")]


def in_a_process(work: Any, *arguments: Any) -> Any:
    """Return what a new process computes."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:  # whose process may have children
        return pool.submit(work, *arguments).result()


def use_index(root: Path, workers: int = 0) -> dict[str, float]:
    """Open the index, and read it in workers; return the seconds, and MB of memory of this process and of each worker's own."""
    before, start = resident(), time.perf_counter()
    opened = ReferIndex.open(root, "refcoco", "refs(unc).p")
    found = {"seconds": time.perf_counter() - start, "memory": resident() - before}
    if workers:
        pipe = multiprocessing.get_context("fork").SimpleQueue()
        processes = [multiprocessing.get_context("fork").Process(target=read_all, args=(opened, pipe)) for _ in range(workers)]
        for process in processes:
            process.start()
        found["own"] = max(pipe.get() for _ in processes)
        for process in processes:
            process.join()
    return found


def read_all(opened: ReferIndex, pipe: Any) -> None:
    """Read as a worker does in an epoch, and tell how much memory that has made this process's own."""
    before = own()
    for ref in range(len(opened)):
        for row in opened.sentence_rows(ref):
            opened.sentence(row)
        if ref % 50 == 0:
            opened.mask(ref)
    pipe.put(own() - before)


def resident() -> float:
    """Return this process's memory in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def own() -> float:
    """Return the memory in MB that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3


# -- Drawn data ---------------------------------------------------------------------------------------------------------------


def draw_photographs(root: Path, count: int) -> Path:
    """Write ``refcoco`` with drawn pictures of COCO's size, noisy as photographs are."""
    images, annotations, refs = [], [], []
    folder = root / "images/train2014"
    folder.mkdir(parents=True)
    for number in range(1, count + 1):
        image, drawn, described = make_scene(0, "shapes", "train", number)
        grain = np.random.default_rng(number).normal(0, 6, (480, 640, 1))
        large = (cv2.resize(image, (640, 480), interpolation=cv2.INTER_CUBIC) + grain).clip(0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{number}.jpg"), large, [cv2.IMWRITE_JPEG_QUALITY, 90])
        images.append({"id": number, "file_name": f"{number}.jpg", "height": 480, "width": 640})
        outline = segmentation(np.kron(drawn[described[0][0]].visible, np.ones((2, 2), bool)))
        annotations.append({"id": number, "image_id": number, "category_id": 1, "segmentation": outline})
        refs.append(describe(number, number, number, described[0][1], number * 10))
    write_set(root, images, annotations, refs)
    return root


def write_full_size(root: Path, sizes: dict[str, int]) -> None:
    """Write ``refcoco`` with as many of everything, and no pictures."""
    rng = np.random.default_rng(0)
    (root / "images/train2014").mkdir(parents=True, exist_ok=True)
    images = [
        {"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", "height": 480, "width": 640} for i in range(sizes["images"])
    ]
    annotations: list[dict[str, Any]] = []
    for i in range(sizes["annotations"]):
        places = rng.uniform(0, 400, size=(2, 1)) + rng.uniform(0, 80, size=(2, 50))  # two parts of 25 points
        polygons = places.round(2).tolist()
        annotations.append({"id": i, "image_id": i % sizes["images"], "category_id": 1, "segmentation": polygons})
    ends = np.linspace(0, sizes["sentences"], sizes["refs"] + 1).astype(int)
    refs = [
        describe(i, i, annotations[i]["image_id"], ["the second man from the left"] * int(ends[i + 1] - ends[i]), int(ends[i]))
        for i in range(sizes["refs"])
    ]
    write_set(root, images, annotations, refs)


def describe(ref: int, annotation: int, image: int, sentences: Sequence[str], first: int) -> dict[str, Any]:
    """Return a ref as REFER has it."""
    told = [{"sent": text, "raw": text, "tokens": text.split(), "sent_id": first + i} for i, text in enumerate(sentences)]
    known = {"ref_id": ref, "ann_id": annotation, "image_id": image, "category_id": 1, "split": "train"}
    return known | {"sentences": told, "sent_ids": [sentence["sent_id"] for sentence in told]}


def write_set(root: Path, images: list[Any], annotations: list[Any], refs: list[Any]) -> None:
    """Write a set's two files."""
    (root / "refcoco").mkdir(exist_ok=True)
    (root / "refcoco/instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
