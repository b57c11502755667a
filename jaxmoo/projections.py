"""The names of the projections in a layer of a decoder, as Hugging Face's models have them."""

__all__ = ["PROJECTIONS"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
