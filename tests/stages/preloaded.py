"""Does once, in the process that cut runs are forked from, what each of them would do again."""

from transformers import LlamaForCausalLM  # noqa: F401  the models of these runs

from stages.stage_server import prepare_to_fork

prepare_to_fork()
