"""Images to model inputs, from the saved JSON alone: load, convert, resize, tile or cut into patches, normalise."""

from .base import EncodedImage, ImageProcessor
from .image import ImageLike, content_hash, load_image
from .registry import PROCESSORS, load_image_processor

__all__ = ["PROCESSORS", "EncodedImage", "ImageLike", "ImageProcessor", "content_hash", "load_image", "load_image_processor"]
