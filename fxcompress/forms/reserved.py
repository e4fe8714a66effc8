"""Names that a node of a template cannot have, as something else goes by them already.

A node becomes a module of an ``fx.GraphModule``, and its name a word of the source code of
``forward``.  What is refused: keywords of Python, attributes of ``nn.Module`` and of
``fx.GraphModule``, names that the code itself uses, and names that begin with an underscore, which
belong to torch and to Python.  Rules are checked without torch, so its names stand here; a test
compares them with those of the installed version.
"""

from __future__ import annotations

import keyword

_TORCH = (
    "T_destination add_module add_submodule apply bfloat16 buffers call_super_init children "
    "code compile cpu cuda delete_all_unused_submodules delete_submodule double dump_patches "
    "eval extra_repr float forward get_buffer get_extra_state get_parameter get_submodule graph "
    "half ipu load_state_dict meta modules mtia named_buffers named_children named_modules "
    "named_parameters parameters print_readable recompile register_backward_hook "
    "register_buffer register_forward_hook register_forward_pre_hook "
    "register_full_backward_hook register_full_backward_pre_hook "
    "register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module "
    "register_parameter register_state_dict_post_hook register_state_dict_pre_hook "
    "requires_grad_ self set_extra_state set_submodule shape_env share_memory smart_apply "
    "state_dict to to_empty to_folder train training type xpu zero_grad "
)
_NAMES = frozenset(_TORCH.split())


def is_reserved(name: str) -> bool:
    """Whether Python or torch has a use for a name.

    >>> is_reserved("lambda"), is_reserved("training"), is_reserved("down")
    (True, True, False)
    """
    return name.startswith("_") or keyword.iskeyword(name) or name in _NAMES
