"""Engines that sample responses, behind one protocol."""

from maestro_pl.generation.engine import Engine, Generation, Sampling
from maestro_pl.generation.hf import HFEngine
from maestro_pl.generation.native import NativeEngine

__all__ = ["Engine", "Generation", "HFEngine", "NativeEngine", "Sampling"]
