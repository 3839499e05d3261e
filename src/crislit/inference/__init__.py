"""Using a trained network."""

from crislit.inference.masks import safe_file_name, to_json, write_images
from crislit.inference.onnx_export import export_onnx
from crislit.inference.onnx_network import EXPORT_CONFIG, GROUNDING, IMAGE_ENCODER, OnnxNetwork
from crislit.inference.segmenter import Segmentation, Segmenter, check_sentences, load
from crislit.inference.web_page import MAX_UPLOAD_BYTES, RequestFilter, build_page

__all__ = [
    "EXPORT_CONFIG",
    "GROUNDING",
    "IMAGE_ENCODER",
    "MAX_UPLOAD_BYTES",
    "OnnxNetwork",
    "RequestFilter",
    "Segmentation",
    "Segmenter",
    "build_page",
    "check_sentences",
    "export_onnx",
    "load",
    "safe_file_name",
    "to_json",
    "write_images",
]
