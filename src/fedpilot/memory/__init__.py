"""The bytes of a training step, predicted to the byte by arithmetic over a few traces.

``trace`` runs a model's step a few times on fake tensors: no weights, no GPU. ``peak_bytes`` puts the parts of the
traces together for any plan: any rank of a module, any set of trained blocks, any set of recomputed ones. It walks
through the step as the step runs,

    pre · blocks forward · head and loss · blocks backward · clipping · optimiser,

adds up what each part leaves behind and takes the highest moment. ``cost_table`` writes the same down by block and
choice, as allocation wants it.
"""

from fedpilot.memory.arithmetic import Breakdown, breakdown, calibrate, peak_bytes, seconds
from fedpilot.memory.assembly import BlockBytes
from fedpilot.memory.attached import candidates, trace_attached, trace_plans
from fedpilot.memory.counting import LiveStorages, StepProgram, measure_peak
from fedpilot.memory.probing import ProgramFor, trace
from fedpilot.memory.profile import MemoryProfile
from fedpilot.memory.table import cost_table

__all__ = [
    "BlockBytes",
    "Breakdown",
    "LiveStorages",
    "MemoryProfile",
    "ProgramFor",
    "StepProgram",
    "breakdown",
    "calibrate",
    "candidates",
    "cost_table",
    "measure_peak",
    "peak_bytes",
    "seconds",
    "trace",
    "trace_attached",
    "trace_plans",
]
