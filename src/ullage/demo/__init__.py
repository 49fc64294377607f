"""The main job on real input: a byte-level GPT on English, three ways."""

from ullage.demo._demo import DemoResult, DemoRow, run_demo
from ullage.demo._gpt import GPT, english_bytes

__all__ = ["GPT", "DemoResult", "DemoRow", "english_bytes", "run_demo"]
