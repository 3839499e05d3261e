"""``scripts/profile_network.py``: times every box and leaves the network unchanged."""

import functools
import re
import time
from pathlib import Path

import pytest
import torch

from crislit.benchmarks import inference
from crislit.inference.onnx_export import export_onnx
from crislit.models.build import build_cris
from crislit.models.config import CRISConfig
from scripts import profile_network
from tests.models.networks import CLIP, sentences


@pytest.mark.slow
def test_profiles_time_every_part_and_leave_the_network_unchanged(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CRISConfig(
        clip=CLIP, neck=(32, 64, 128), decoder_layers=1, decoder_heads=4, decoder_ffn=96
    )
    model = build_cris(config).eval()
    images, tokens = torch.randn(1, 3, 64, 64), sentences(3)
    before = model(images, tokens)

    def run() -> None:
        time.sleep(0.05)
        model(images, tokens)

    parts = profile_network.time_parts(model, run, 3)
    assert set(parts) == {*profile_network.PARTS, "all"}
    total = sum(seconds for name, seconds in parts.items() if name != "all")
    assert total < parts["all"] - 0.05, "nothing is counted twice"
    assert torch.equal(model(images, tokens), before)
    for module in model.modules():
        assert not {"forward", "project_maps", "fuse"} & vars(module).keys()

    # The export to int8 is tested in test_onnx_export.
    export_once = functools.cache(export_onnx)

    def export(source: Path, target: Path, calibrate: Path | None) -> None:
        export_once(source, tmp_path / "onnx")
        target.symlink_to(tmp_path / "onnx")

    monkeypatch.setattr(inference, "export_onnx", export)
    profile_network.main(["--model", "tiny", "--image-size", "64", "--rounds", "1"])
    page = capsys.readouterr().out
    assert page.count(": operations by self time") == 6 + len(profile_network.STEPS) + 2
    tables = re.findall(r"^### ONNX Runtime.*\n\n.*\n.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        # At this size, other work on the machine decides which operation takes longest.
        names, times = zip(
            *re.findall(r"^\| `(.+)` \| ([\d.]+) ", table, re.MULTILINE), strict=True
        )
        assert {"Conv", "FusedConv"} & set(names)
        assert [float(time) for time in times] == sorted(map(float, times), reverse=True)
    for part in profile_network.PARTS:
        assert re.search(rf"^\| {part} \| - \| \d", page, re.MULTILINE), part
