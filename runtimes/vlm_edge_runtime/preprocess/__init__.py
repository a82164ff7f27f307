"""Images to model inputs, from the saved JSON alone: load, convert, resize, tile or cut into patches, normalise.

The reference is transformers' PIL image processors (`CLIPImageProcessorPil` …), which are equalled bit for bit. Where torchvision
is installed transformers prefers its torchvision backend, which resizes with torch's own antialiasing: in bicubic resizing of a
photograph 0.3 % of the 8-bit values differ from Pillow's, by at most 2 of 255. That backend differs from its PIL twin, and from
this package, by as much.
"""

from .base import EncodedImage, ImageProcessor
from .image import ImageFile, ImageLike, content_hash, load_image, read_image
from .registry import PROCESSORS, load_image_processor
from .video import VIDEO_PROCESSORS, load_video_processor

__all__ = [
    "PROCESSORS",
    "VIDEO_PROCESSORS",
    "EncodedImage",
    "ImageFile",
    "ImageLike",
    "ImageProcessor",
    "content_hash",
    "load_image",
    "load_image_processor",
    "load_video_processor",
    "read_image",
]
