"""The methods of recovery.

To add a method, write a file with a subclass of ``Recovery``, add a line here, and add the name to
``RecoveryName`` in ``megamask/config/recover_tree.py``.
"""

from __future__ import annotations

from megamask.recovery.blockwise import Blockwise
from megamask.recovery.reconstruct import Reconstruct
from megamask.recovery.recovery import Recovery
from megamask.recovery.training import Finetune, Lora

# recover.method -> the method
RECOVERIES: dict[str, Recovery] = {
    "reconstruct": Reconstruct(),
    "blockwise": Blockwise(),
    "finetune": Finetune(),
    "lora": Lora(),
}
