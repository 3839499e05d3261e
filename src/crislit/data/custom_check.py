"""Checks custom data: unreadable images, a summary of the splits, and remarks."""

from collections import defaultdict

from tqdm import tqdm

from crislit.data.custom import CustomData, Problem
from crislit.errors import InputError
from crislit.io.images import decode_image
from crislit.transforms.tokenizer import truncated_words


def find_unreadable(data: CustomData) -> list[Problem]:
    """Return the lines whose picture has pixels that cannot be read."""
    lines: dict[int, set[int]] = defaultdict(set)
    for ref in data.refs:
        lines[ref["image_id"]].update(told["line"] for told in ref["sentences"])
    found = []
    for image in tqdm(
        data.instances["images"], "reading pictures", unit="picture", mininterval=1, disable=None
    ):
        try:
            decode_image(data.folder / image["file_name"], (image["height"], image["width"]))
        except InputError as error:
            found += [Problem(line, str(error)) for line in lines[image["id"]]]
    return found


def summarize(data: CustomData) -> list[str]:
    """Return, line by line, how many refs, sentences and pictures each split has."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    pictures: dict[str, set[int]] = defaultdict(set)
    for ref in data.refs:
        counts[ref["split"]][0] += 1
        counts[ref["split"]][1] += len(ref["sentences"])
        pictures[ref["split"]].add(ref["image_id"])
    lines = [
        f"{split}: {refs} objects, {sentences} sentences, {len(pictures[split])} pictures"
        for split, (refs, sentences) in sorted(counts.items())
    ]
    return lines or ["nothing that can be used"]


def find_notes(data: CustomData, max_tokens: int) -> list[str]:
    """Return what is no error and yet worth knowing."""
    found = []
    splits: dict[str, set[int]] = defaultdict(set)
    for ref in data.refs:
        splits[ref["split"]].add(ref["image_id"])
    for split in ("train", "val"):
        if split not in splits:
            found.append(f"there is no split {split!r}, which training needs")
    for split, images in sorted(splits.items(), key=lambda item: item[0]):
        if split != "train" and (shared := images & splits["train"]):
            found.append(
                f"{len(shared)} pictures of {split} are in train too: what is measured on {split} is too good"
            )
    cut = [
        told["line"]
        for ref in data.refs
        for told in ref["sentences"]
        if truncated_words(told["sent"], max_tokens)
    ]
    if cut:
        lines = ", ".join(map(str, cut[:5])) + (", ..." if len(cut) > 5 else "")
        found.append(
            f"{len(cut)} sentences longer than {max_tokens} tokens are cut (lines {lines}): raise dataset.max_words"
        )
    return found
