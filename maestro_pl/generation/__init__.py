"""Engines that sample responses, behind one protocol."""

from maestro_pl.generation.engine import Engine, Generation, Sampling
from maestro_pl.generation.hf import HFEngine
from maestro_pl.generation.native import NativeEngine
from maestro_pl.generation.vllm_local import VLLMEngine
from maestro_pl.generation.vllm_servers import VLLMServerEngine

__all__ = ["Engine", "Generation", "HFEngine", "NativeEngine", "Sampling", "VLLMEngine", "VLLMServerEngine"]
