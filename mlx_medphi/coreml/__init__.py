"""Weights in, a Core ML package out, and the proof that it is the same model; no torch, no Mac."""
