"""The main job on real input: a byte-level GPT on English, three ways."""

from ullage.demo._demo import DemoRow, Verdict, run_demo
from ullage.demo._gpt import GPT, english_bytes

__all__ = ["GPT", "DemoRow", "Verdict", "english_bytes", "run_demo"]
