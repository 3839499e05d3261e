"""Using a trained network."""

from typing import TYPE_CHECKING

from crislit import import_on_use

if TYPE_CHECKING:
    from crislit.inference.arguments import add_trust, check_order, command_parser
    from crislit.inference.description import (
        Description,
        describe_network,
        empty_mask_warning,
        photo_warning,
    )
    from crislit.inference.masks import safe_file_name
    from crislit.inference.onnx_export import export_onnx
    from crislit.inference.onnx_network import (
        EXPORT_CONFIG,
        GROUNDING,
        IMAGE_ENCODER,
        OnnxNetwork,
    )
    from crislit.inference.segmentation import Segmentation, write_images
    from crislit.inference.segmenter import Segmenter, check_sentences, load
    from crislit.inference.web_page import STYLE, build_page
    from crislit.inference.web_requests import MAX_UPLOAD_BYTES, RequestFilter

__all__ = [
    "EXPORT_CONFIG",
    "GROUNDING",
    "IMAGE_ENCODER",
    "MAX_UPLOAD_BYTES",
    "STYLE",
    "Description",
    "OnnxNetwork",
    "RequestFilter",
    "Segmentation",
    "Segmenter",
    "add_trust",
    "build_page",
    "check_order",
    "check_sentences",
    "command_parser",
    "describe_network",
    "empty_mask_warning",
    "export_onnx",
    "load",
    "photo_warning",
    "safe_file_name",
    "write_images",
]

__getattr__ = import_on_use(
    __name__,
    {
        **dict.fromkeys(("add_trust", "check_order", "command_parser"), "arguments"),
        **dict.fromkeys(
            ("Description", "describe_network", "empty_mask_warning", "photo_warning"),
            "description",
        ),
        "safe_file_name": "masks",
        "export_onnx": "onnx_export",
        **dict.fromkeys(
            ("EXPORT_CONFIG", "GROUNDING", "IMAGE_ENCODER", "OnnxNetwork"), "onnx_network"
        ),
        **dict.fromkeys(("Segmentation", "write_images"), "segmentation"),
        **dict.fromkeys(("Segmenter", "check_sentences", "load"), "segmenter"),
        **dict.fromkeys(("STYLE", "build_page"), "web_page"),
        **dict.fromkeys(("MAX_UPLOAD_BYTES", "RequestFilter"), "web_requests"),
    },
)
