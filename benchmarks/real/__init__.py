"""Figures on real weights and real text: SmolLM2-135M-Instruct and Gemma-3-270M (docs/real.md)."""
