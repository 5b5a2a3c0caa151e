"""The generative model of a workload: fit it to a trace, scale it, draw new traces; and the built-in profiles."""

from squall.workload.baselines import bootstrap, rearranged, smooth
from squall.workload.drawing import generate, generate_file, rescale
from squall.workload.fitting import fit
from squall.workload.model import ClassFit, ClassModel, Workload, read_workload, save_workload
from squall.workload.profiles import PROFILES, profile
from squall.workload.slots import burst_ramp

__all__ = [
    "PROFILES",
    "ClassFit",
    "ClassModel",
    "Workload",
    "bootstrap",
    "burst_ramp",
    "fit",
    "generate",
    "generate_file",
    "profile",
    "read_workload",
    "rearranged",
    "rescale",
    "save_workload",
    "smooth",
]
