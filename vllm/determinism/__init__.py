"""The parts of the determinism harness; `vllm/test_determinism.py` is the command.

Needs httpx alone: no torch, no vLLM, so that it runs on a laptop against any OpenAI-compatible server.
"""
