"""Checks custom data: finds unreadable images, summarizes the splits, notes pitfalls."""

from collections import Counter, defaultdict

from tqdm import tqdm

from crislit.data.custom_builder import CustomData, Problem
from crislit.errors import InputError
from crislit.io import decode_image
from crislit.transforms import truncated_words


def find_unreadable(data: CustomData) -> list[Problem]:
    """Decode every image, and return the lines whose image cannot be decoded."""
    lines: dict[int, set[int]] = defaultdict(set)
    for ref in data.refs:
        lines[ref["image_id"]].update(sentence["line"] for sentence in ref["sentences"])
    problems = []
    for image in tqdm(
        data.instances["images"], "reading images", unit="image", mininterval=1, disable=None
    ):
        try:
            decode_image(data.folder / image["file_name"], (image["height"], image["width"]))
        except InputError as error:
            problems += [Problem(line, str(error)) for line in lines[image["id"]]]
    return problems


def summarize(data: CustomData) -> list[str]:
    """Return one line per split with its numbers of objects, sentences and images."""
    objects = Counter(ref["split"] for ref in data.refs)
    sentences = Counter(ref["split"] for ref in data.refs for _ in ref["sentences"])
    images = Counter(split for split, _ in {(ref["split"], ref["image_id"]) for ref in data.refs})
    return [
        f"{split}: {objects[split]} objects, {sentences[split]} sentences, {images[split]} images"
        for split in sorted(objects)
    ] or ["no line can be used"]


def find_notes(data: CustomData, max_tokens: int) -> list[str]:
    """Return remarks on data that can be used, but may not give the expected results."""
    splits: dict[str, set[int]] = defaultdict(set)
    for ref in data.refs:
        splits[ref["split"]].add(ref["image_id"])
    notes = [
        f"split {split!r} is missing, which training needs"
        for split in ("train", "val")
        if split not in splits
    ]
    notes += [
        f"{len(shared)} images of {split} are also in train, so metrics on {split} will be too high"
        for split, images in sorted(splits.items())
        if split != "train" and (shared := images & splits["train"])
    ]
    truncated = [
        sentence["line"]
        for ref in data.refs
        for sentence in ref["sentences"]
        if truncated_words(sentence["sent"], max_tokens)
    ]
    if truncated:
        lines = ", ".join(map(str, truncated[:5])) + (", ..." if len(truncated) > 5 else "")
        notes.append(
            f"{len(truncated)} sentences longer than {max_tokens} tokens are truncated (lines "
            f"{lines}): raise dataset.max_words"
        )
    return notes
