"""Does once, in the process that cut runs are forked from, what each of them would do again."""

import gc
import importlib
import importlib.util
import logging

from transformers import LlamaForCausalLM  # noqa: F401  the models of these runs

from rlhf.runs.code import hash_of_library
from stages.stage_server import OPTIONAL_MODULES

logging.disable()  # DeepSpeed warns of a machine without a GPU
for name in OPTIONAL_MODULES:
    if importlib.util.find_spec(name) is not None:
        importlib.import_module(name)
logging.disable(logging.NOTSET)
hash_of_library()  # cached
gc.freeze()  # collections in the forked processes leave the imported modules' memory shared
