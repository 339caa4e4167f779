from fedpilot.allocation.costs import Allocation, choice_values, flops, peak
from fedpilot.allocation.exact import allocate, allocate_many
