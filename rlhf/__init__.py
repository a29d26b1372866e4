"""The library that all stages share: records, rendering, packing, models and the maths of RLHF."""
