# The chain of the tiny world at a smaller size: it shows that everything runs, and teaches little.
include configs/presets/tiny.mk
SIZES := --num_texts 3000 --num_texts_held_out 100 --num_demonstrations 600 --num_prompts_rm 150 \
	--num_prompts_ppo 256 --num_prompts_held_out 64
PLAN = "A quick look at all stages on a small tiny world: under a minute on two cores after the set-up; results in" \
	"$(RUN). It shows that everything runs; its figures mean nothing."
