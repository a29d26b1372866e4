# Adapters in all stages over the weights of the preset smollm2, on its data.
SHARED := runs/smollm2
include configs/presets/smollm2.mk
