"""What a bundle can be built for (data in export_configs/targets), and the driver that builds it (`targets.build`)."""

from .device import Context, Device
from .precision import parse_precision, resolve_precision
from .target import Options, Target, load_target, targets

__all__ = ["Context", "Device", "Options", "Target", "load_target", "parse_precision", "resolve_precision", "targets"]
